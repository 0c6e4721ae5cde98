#include "emulation/engine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <numeric>
#include <set>

#include "emulation/fiber.h"
#include "emulation/memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace visionllm::emulation {

Running running;

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kMaxThreads = 1024;
constexpr std::size_t kMaxStaticShared = 48 * 1024;

enum class State { ready, at_barrier, at_collective, returned };

struct AsyncCopy {
  char* shared;
  const char* global;
  int bytes;
  bool valid;
};

struct Thread {
  Context context;
  uint3 index;
  State state;
  Site site;                     // where it waits
  int predicate;                 // of the block barrier
  const Collective* collective;  // that it waits in
  std::uint32_t stamp;           // number of its latest __syncwarp in its warp
  std::uint32_t known[kWarp];    // see ThreadClock
  std::vector<AsyncCopy> open;   // copies not yet in a group
  std::deque<std::vector<AsyncCopy>> groups;
};

// The lanes of a warp that wait in a collective, and those that have returned or wait at a block barrier: what a
// collective asks at each arrival.
struct Warp {
  unsigned meeting = 0, away = 0;
};

// A small generator, the same everywhere (the standard's distributions are not): splitmix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
  }

 private:
  std::uint64_t state_;
};

std::string index_text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string place(const Site& site) {
  return std::string(site.what) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && same_text(a.what, b.what) && same_text(a.file, b.file);
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

uint3 coordinates(std::uint64_t linear, dim3 size) {
  return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
          static_cast<unsigned>(linear / size.x / size.y)};
}

class Engine {
 public:
  // ---- state that outlives a launch
  Options options;
  std::vector<LaunchRecord> launches;
  std::string error;
  std::string operation;
  alignas(64) char parameters[4096];

  // ---- the launch
  const char* name = nullptr;
  int current = 0;  // its number
  int count = 0;    // threads of a block
  std::uint32_t interval = 1, block_interval = 1, launch_interval = 1;
  Site dynamic_site{};

  bool run(const char* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes, std::size_t parameter_bytes,
           void (*body)(const void*), const void* closure);
  [[noreturn]] void fail(const std::string& what);
  int barrier(Site site, Vote vote, int predicate);
  void collective(const Collective& call);
  void sync_clocks(unsigned mask);
  void* dynamic_shared(Site site);
  void* static_shared(const void* site, const char* array, std::size_t bytes, std::size_t alignment);
  void begin_atomic(const void* address, std::size_t bytes);
  bool acquired(std::uint32_t at);
  std::string block_text(std::uint32_t at);
  const char* position();

  bool overflowed(const void* address) const { return stacks_.overflowed(address) >= 0; }
  Thread& me() { return threads_[current]; }
  Moment moment(int i) const {
    return {i,
            static_cast<std::uint8_t>(i / kWarp),
            1u << i % kWarp,
            threads_[i].stamp,
            threads_[i].known,
            interval,
            block_interval,
            launch_interval};
  }
  uint3 thread_index(int i) const { return threads_[i].index; }
  bool fenced = false;  // the block has called __threadfence
  std::set<std::size_t>
      acquired_blocks;  // numbers in started_ of blocks the running one has synchronised with

 private:
  void start_block(std::uint64_t block);
  bool run_block();
  void resume(int i);
  void wait(State state);
  bool bad_launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, std::size_t parameter_bytes);
  void check_reachable(int thread, int other);
  void check_not_awaited();
  Warp& warp() { return warps_[current / kWarp]; }
  unsigned lane_bit() const { return 1u << current % kWarp; }
  std::string stuck();
  std::size_t block_at(std::uint32_t at) const;
  static void entry();

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Site barrier_site_{};  // where the waiting threads wait
  FiberStacks stacks_;
  Context scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* closure_ = nullptr;
  std::size_t dynamic_bytes_ = 0;
  std::vector<int> ready_, next_;
  int returned_ = 0, waiting_ = 0;
  bool failed_ = false;
  std::uint64_t random_ = 0;
  std::vector<std::pair<std::uint32_t, std::uint64_t>> started_;  // first interval and number of each block
  std::map<const void*, std::set<std::size_t>>
      published_;  // by address of an atomic: blocks that fenced before
};

Engine& engine() {
  static Engine instance;
  return instance;
}

void Engine::entry() {
  enter_fiber();
  Engine& self = engine();
  self.body_(self.closure_);
  Thread& me = self.me();
  me.state = State::returned;
  self.warp().away |= self.lane_bit();
  ++self.returned_;
  for (int i = 0; self.waiting_ > 0 && i < self.count; ++i) {
    if (self.threads_[i].state == State::at_barrier) self.check_reachable(i, self.current);
  }
  self.check_not_awaited();
  running.active = false;
  switch_context(me.context, self.scheduler_, true);
  std::abort();
}

// Fails when a lane waits for the running one, which will not come, in a collective.
void Engine::check_not_awaited() {
  const int first = current / kWarp * kWarp;
  for (unsigned rest = warp().meeting; rest != 0; rest &= rest - 1) {
    const int other = first + __builtin_ctz(rest);
    if ((threads_[other].collective->mask & lane_bit()) != 0) check_reachable(other, current);
  }
}

// Fails when `thread` waits for `other` in vain.
void Engine::check_reachable(int thread, int other) {
  const Thread& a = threads_[thread];
  const Thread& b = threads_[other];
  if (b.state != State::returned && !(b.state == State::at_barrier && a.state == State::at_collective))
    return;
  std::string text = "thread " + index_text(a.index) + " waits at " + place(a.site);
  if (a.state == State::at_collective) text += " with mask " + hexadecimal(a.collective->mask);
  text += ", which thread " + index_text(b.index);
  text += b.state == State::returned ? " never reaches: it has returned from the kernel"
                                     : " never reaches: it waits at " + place(b.site);
  fail((a.state == State::at_collective ? "divergent warp: " : "divergent barrier: ") + text);
}

void Engine::resume(int i) {
  current = i;
  threadIdx = threads_[i].index;
  running.moment = moment(i);
  running.stack = static_cast<const char*>(threads_[i].context.stack_bottom);
  running.stack_bytes = threads_[i].context.stack_bytes;
  running.active = true;
  switch_context(scheduler_, threads_[i].context);
  running.active = false;
}

void Engine::wait(State state) {
  Thread& self = me();
  self.state = state;
  running.active = false;
  switch_context(self.context, scheduler_);
}

void Engine::fail(const std::string& what) {
  if (error.empty()) error = std::string(position()) + ": " + what;
  failed_ = true;
  running.active = false;
  switch_context(me().context, scheduler_, true);
  std::abort();
}

const char* Engine::position() {
  static std::string text;
  text = operation.empty() ? "" : operation + ": ";
  if (name != nullptr) {
    text += std::string("kernel '") + name + "', block " + index_text(blockIdx) + ", thread " +
            index_text(threads_[current].index);
  }
  return text.c_str();
}

void Engine::start_block(std::uint64_t block) {
  block_interval = ++interval;
  started_.emplace_back(interval, block);
  blockIdx = coordinates(block, gridDim);
  fenced = false;
  acquired_blocks.clear();
  memory().begin_block();
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    stacks_.prepare(i, thread.context, &Engine::entry);
    thread.index = coordinates(i, blockDim);
    thread.state = State::ready;
    thread.stamp = 0;
    std::memset(thread.known, 0, sizeof thread.known);
    thread.open.clear();
    thread.groups.clear();
  }
  next_.resize(count);
  std::iota(next_.begin(), next_.end(), 0);
  returned_ = waiting_ = 0;
  warps_.assign((count + kWarp - 1) / kWarp, Warp{});
}

bool Engine::run_block() {
  Random random(random_ + 0x5851f42d4c957f2du * block_interval);
  while (!next_.empty()) {
    ready_.swap(next_);
    next_.clear();
    if (options.thread_order == Order::seeded) {
      random.shuffle(ready_);
    } else {
      std::sort(ready_.begin(), ready_.end());
      if (options.thread_order == Order::reversed) std::reverse(ready_.begin(), ready_.end());
    }
    for (const int i : ready_) {
      resume(i);
      if (failed_) return false;
    }
  }
  if (returned_ == count) return true;
  current = 0;
  for (int i = 0; i < count; ++i) {
    if (threads_[i].state != State::returned) {
      current = i;
      break;
    }
  }
  error = std::string(position()) + ": " + stuck();
  return false;
}

// Nobody can go on: one thread that waits, and one that it waits for.
std::string Engine::stuck() {
  for (int i = 0; i < count; ++i) {
    const Thread& a = threads_[i];
    if (a.state != State::at_collective) continue;
    const int first = i / kWarp * kWarp;
    for (int j = first; j < std::min(first + kWarp, count); ++j) {
      const Thread& b = threads_[j];
      if ((a.collective->mask >> (j - first) & 1u) == 0) continue;
      if (b.state == State::at_collective && same_place(a.site, b.site) &&
          a.collective->mask == b.collective->mask) {
        continue;
      }
      current = i;
      std::string text = "divergent warp: thread " + index_text(a.index) + " waits at " + place(a.site) +
                         " with mask " + hexadecimal(a.collective->mask) + ", thread " + index_text(b.index) +
                         " at " + place(b.site);
      if (b.state == State::at_collective) text += " with mask " + hexadecimal(b.collective->mask);
      return text;
    }
  }
  return "no thread of the block can go on";
}

bool Engine::bad_launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, std::size_t parameter_bytes) {
  std::string wrong;
  const auto threads = static_cast<std::uint64_t>(block.x) * block.y * block.z;
  const auto text = [](dim3 d) { return index_text({d.x, d.y, d.z}); };
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > kMaxThreads) {
    wrong = "a block of " + text(block) + " threads: at most 1024, with z at most 64, and at least one";
  } else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 ||
             grid.z > 65535) {
    wrong = "a grid of " + text(grid) + " blocks: none may be 0, y and z at most 65535, x at most 2147483647";
  } else if (dynamic_bytes > static_cast<std::size_t>(options.max_shared_bytes)) {
    wrong = std::to_string(dynamic_bytes) + " bytes of dynamic shared memory: the device has " +
            std::to_string(options.max_shared_bytes) + " for a block";
  } else if (parameter_bytes > sizeof parameters) {
    wrong = std::to_string(parameter_bytes) + " bytes of parameters: at most 4096";
  }
  if (wrong.empty()) return false;
  if (error.empty())
    error = (operation.empty() ? "" : operation + ": ") + "kernel '" + name + "': launched with " + wrong;
  return true;
}

bool Engine::run(const char* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes,
                 std::size_t parameter_bytes, void (*body)(const void*), const void* closure) {
  name = kernel;
  const bool bad = bad_launch(grid, block, dynamic_bytes, parameter_bytes);
  if (bad || !error.empty()) {
    name = nullptr;
    return false;
  }
  gridDim = grid, blockDim = block;
  body_ = body, closure_ = closure;
  dynamic_bytes_ = dynamic_bytes;
  dynamic_site = Site{};
  count = static_cast<int>(block.x * block.y * block.z);
  if (static_cast<int>(threads_.size()) < count) threads_.resize(count);
  stacks_.reserve(count);
  if (scheduler_.stack_bottom == nullptr) describe_own_stack(scheduler_);
  launch_interval = interval + 1;
  started_.clear();
  published_.clear();
  launches.push_back({kernel, grid, block, dynamic_bytes, 0});
  memory().begin_launch();
  Random random(options.seed * 0x2545f4914f6cdd1du + launches.size());
  random_ = random.next();
  std::vector<std::uint64_t> order(static_cast<std::uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  if (options.block_order == Order::seeded) random.shuffle(order);
  if (options.block_order == Order::reversed) std::reverse(order.begin(), order.end());
  failed_ = false;
  for (const std::uint64_t number : order) {
    start_block(number);
    if (!run_block()) break;
  }
  if (!error.empty()) stacks_.clear_abandoned();
  name = nullptr;
  return error.empty();
}

int Engine::barrier(Site site, Vote vote, int predicate) {
  Thread& self = me();
  self.site = site;
  self.predicate = predicate;
  self.state = State::at_barrier;
  warp().away |= lane_bit();
  for (int i = 0; returned_ > 0 && i < count; ++i) check_reachable(current, i);
  if (waiting_ == 0) barrier_site_ = site;
  for (int i = 0; !same_place(barrier_site_, site) && i < count; ++i) {
    const Thread& other = threads_[i];
    if (i == current || other.state != State::at_barrier) continue;
    fail("divergent barrier: thread " + index_text(self.index) + " waits at " + place(site) + ", thread " +
         index_text(other.index) + " at " + place(other.site));
  }
  check_not_awaited();
  ++waiting_;
  if (waiting_ == count) {
    waiting_ = 0;
    ++interval;
    int total = 0;
    for (int i = 0; i < count; ++i) total += threads_[i].predicate != 0 ? 1 : 0;
    const int result = vote == Vote::any   ? (total > 0 ? 1 : 0)
                       : vote == Vote::all ? (total == count ? 1 : 0)
                                           : total;
    for (int i = 0; i < count; ++i) {
      threads_[i].predicate = result;
      threads_[i].state = State::ready;
      next_.push_back(i);
    }
    warps_.assign(warps_.size(), Warp{});
  }
  wait(self.state);
  return self.predicate;
}

void Engine::collective(const Collective& call) {
  Thread& self = me();
  const int first = current / kWarp * kWarp, lanes = std::min(kWarp, count - first);
  Warp& warp = this->warp();
  if ((call.mask & lane_bit()) == 0) {
    fail("calls " + place(call.site) + " with mask " + hexadecimal(call.mask) +
         ", which lacks its own lane " + std::to_string(current - first));
  }
  self.site = call.site;
  self.collective = &call;
  self.state = State::at_collective;
  warp.meeting |= lane_bit();
  // Lanes that a last warp does not have are not waited for.
  const unsigned mask = call.mask & (lanes == kWarp ? ~0u : (1u << lanes) - 1);
  for (unsigned rest = mask & warp.away; rest != 0; rest &= rest - 1) {
    check_reachable(current, first + __builtin_ctz(rest));
  }
  bool complete = (mask & ~warp.meeting) == 0;
  void* payloads[kWarp] = {};
  for (unsigned rest = complete ? mask : 0; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& other = threads_[first + lane];
    complete = complete && other.collective->mask == call.mask && same_place(other.site, call.site);
    payloads[lane] = other.collective->payload;
  }
  if (complete) {
    call.complete(payloads, mask);
    warp.meeting &= ~mask;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      const int i = first + __builtin_ctz(rest);
      threads_[i].state = State::ready;
      next_.push_back(i);
    }
  }
  wait(self.state);
}

void Engine::sync_clocks(unsigned mask) {
  const int first = current / kWarp * kWarp;
  std::uint32_t joined[kWarp] = {}, latest = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const Thread& thread = threads_[first + lane];
    for (int i = 0; i < kWarp; ++i) joined[i] = std::max(joined[i], thread.known[i]);
  }
  // Numbers of the warp's synchronisations must rise, and all lanes' together.
  for (int i = first; i < std::min(first + kWarp, count); ++i) latest = std::max(latest, threads_[i].stamp);
  ++latest;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0) joined[lane] = latest;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Thread& thread = threads_[first + lane];
    std::memcpy(thread.known, joined, sizeof joined);
    thread.stamp = latest;
  }
}

void* Engine::dynamic_shared(Site site) {
  static const char key = 0;
  if (dynamic_site.file == nullptr) dynamic_site = site;
  return static_shared(&key, site.what, dynamic_bytes_, 128);
}

void* Engine::static_shared(const void* site, const char* array, std::size_t bytes, std::size_t alignment) {
  Memory& all = memory();
  Region* const region = all.shared_array(site, array, bytes, alignment);
  const std::size_t statically = all.static_shared_bytes();
  launches.back().static_shared_bytes = std::max(launches.back().static_shared_bytes, statically);
  if (region == nullptr || statically > kMaxStaticShared) {
    fail("static shared memory of " + std::to_string(statically) + " bytes: at most 49152");
  }
  if (statically + dynamic_bytes_ > static_cast<std::size_t>(options.max_shared_bytes)) {
    fail(std::to_string(statically) + " bytes of static and " + std::to_string(dynamic_bytes_) +
         " of dynamic shared memory: the device has " + std::to_string(options.max_shared_bytes) +
         " for a block");
  }
  return region->begin;
}

std::size_t Engine::block_at(std::uint32_t at) const {
  const auto after =
      std::upper_bound(started_.begin(), started_.end(), std::make_pair(at, ~std::uint64_t{0}));
  return static_cast<std::size_t>(after - started_.begin()) - 1;
}

std::string Engine::block_text(std::uint32_t at) {
  return "block " + index_text(coordinates(started_[block_at(at)].second, gridDim));
}

bool Engine::acquired(std::uint32_t at) { return acquired_blocks.count(block_at(at)) != 0; }

// Atomics at one address order the blocks: what a block wrote before its __threadfence is visible to those
// whose atomics come later.
void Engine::begin_atomic(const void* address, std::size_t bytes) {
  (void)bytes;
  std::set<std::size_t>& published = published_[address];
  acquired_blocks.insert(published.begin(), published.end());
  if (fenced) {
    published.insert(acquired_blocks.begin(), acquired_blocks.end());
    published.insert(started_.size() - 1);
  }
}

}  // namespace

void configure(const Options& options) { engine().options = options; }
const Options& options() { return engine().options; }
std::vector<LaunchRecord>& launches() { return engine().launches; }
const std::string& error() { return engine().error; }
void clear_error() { engine().error.clear(); }
void set_operator(const std::string& name) { engine().operation = name; }
const char* position_text() { return engine().position(); }
bool on_guard_page(const void* address) { return engine().overflowed(address); }
void* parameter_space() { return engine().parameters; }

bool run_kernel(const char* name, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                std::size_t parameter_bytes, void (*body)(const void*), const void* closure) {
  return engine().run(name, grid, block, dynamic_shared_bytes, parameter_bytes, body, closure);
}

void fail(const std::string& what) { engine().fail(what); }

void report(const std::string& what) {
  Engine& self = engine();
  if (running.active) self.fail(what);
  if (self.error.empty()) self.error = (self.operation.empty() ? "" : self.operation + ": ") + what;
}

int block_barrier(Site site, Vote vote, int predicate) { return engine().barrier(site, vote, predicate); }
void warp_collective(const Collective& call) { engine().collective(call); }

void warp_barrier(Site site, unsigned mask) {
  const Collective call{site, mask, [](void* const(&)[32], unsigned lanes) { engine().sync_clocks(lanes); },
                        nullptr};
  engine().collective(call);
}

void thread_fence() { engine().fenced = true; }
int lane_number() { return engine().current % kWarp; }
int thread_number() { return engine().current; }

void* shared_array(const void* site, const char* name, std::size_t bytes, std::size_t alignment) {
  return engine().static_shared(site, name, bytes, alignment);
}

void* dynamic_shared(Site site) { return engine().dynamic_shared(site); }

void begin_atomic(const void* address, std::size_t bytes) {
#ifdef VISIONLLM_EMULATION_CHECKED
  check_access(address, bytes, AccessKind::atomic, __builtin_return_address(0));
#endif
  engine().begin_atomic(address, bytes);
}

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site) {
  const auto aligned = [bytes](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; };
  if (!memory().in_shared_range(shared)) fail(place(site) + " copies to an address outside shared memory");
  if (!aligned(shared))
    fail(place(site) + " copies to a shared address that is no multiple of " + std::to_string(bytes));
  if (!aligned(global))
    fail(place(site) + " copies from a global address that is no multiple of " + std::to_string(bytes));
  if (valid && memory().in_shared_range(global)) fail(place(site) + " copies from shared memory");
#ifdef VISIONLLM_EMULATION_CHECKED
  if (valid) check_access(global, bytes, AccessKind::read, __builtin_return_address(0));
  check_access(shared, bytes, AccessKind::copy_begin, __builtin_return_address(0));
#endif
  std::memset(shared, 0xff, bytes);  // whoever reads before the wait finds NaN
  engine().me().open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid});
}

void copy_async_commit() {
  Thread& self = engine().me();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void copy_async_wait(int open_groups) {
  Thread& self = engine().me();
  while (static_cast<int>(self.groups.size()) > open_groups) {
    for (const AsyncCopy& copy : self.groups.front()) {
#ifdef VISIONLLM_EMULATION_CHECKED
      check_access(copy.shared, copy.bytes, AccessKind::copy_end, __builtin_return_address(0));
#endif
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
    self.groups.pop_front();
  }
}

Moment moment_of(int thread) { return engine().moment(thread); }
bool acquired(std::uint32_t at) { return engine().acquired(at); }
bool acquired_any() { return !engine().acquired_blocks.empty(); }
std::string thread_text(int thread) { return "thread " + index_text(engine().thread_index(thread)); }
std::string block_text(std::uint32_t at) { return engine().block_text(at); }

}  // namespace visionllm::emulation
