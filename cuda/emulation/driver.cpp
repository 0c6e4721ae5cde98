// Runs operators for tests: reads calls from standard input, writes results to standard output, until the input
// ends. tests/emulation.py is the other side; numbers are little-endian.
//
//   call:   name; u64 seed; u32 block order, thread order, shared bytes, multiprocessors, number of arguments;
//           arguments: u8 kind
//             0 absent tensor
//             1 tensor: u32 dtype, u32 bytes of an element, u32 rank, i64 shape[rank], i64 strides[rank],
//               u32 offset of the address from a multiple of 256, u64 bytes, the bytes
//             2 integer: i64     3 number: f64
//   result: u32 outcome (0 good, 1 invalid argument, 2 unsupported, 3 bug); message;
//           u32 launches: name, u32 grid[3], block[3], u64 dynamic, static shared bytes;
//           u32 tensors: u32 number, u64 bytes, the bytes
//   texts:  u32 length, bytes
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "emulation/engine.h"
#include "emulation/memory.h"
#include "emulation/operators.h"
#include "visionllm/execution.h"

namespace visionllm::emulation {
namespace {

int g_output = -1;  // the result channel; standard output itself goes to standard error

void read_bytes(void* target, std::size_t bytes) {
  auto* p = static_cast<char*>(target);
  while (bytes > 0) {
    const ssize_t n = read(0, p, bytes);
    if (n <= 0) std::exit(n == 0 ? 0 : 1);
    p += n;
    bytes -= static_cast<std::size_t>(n);
  }
}

template <typename T>
T read_value() {
  T value;
  read_bytes(&value, sizeof value);
  return value;
}

std::string read_text() {
  std::string text(read_value<std::uint32_t>(), '\0');
  read_bytes(text.data(), text.size());
  return text;
}

class Reply {
 public:
  template <typename T>
  void value(T x) {
    bytes(&x, sizeof x);
  }
  void text(const std::string& s) {
    value(static_cast<std::uint32_t>(s.size()));
    bytes(s.data(), s.size());
  }
  void bytes(const void* p, std::size_t n) { data_.append(static_cast<const char*>(p), n); }
  void send() const {
    for (std::size_t done = 0; done < data_.size();) {
      const ssize_t n = write(g_output, data_.data() + done, data_.size() - done);
      if (n <= 0) std::exit(1);
      done += static_cast<std::size_t>(n);
    }
  }

 private:
  std::string data_;
};

// Marks the elements that belong to a tensor whose strides leave gaps.
void mark_members(Region& region, const TensorView& view) {
  const std::size_t elements = region.bytes / region.item_bytes;
  if (static_cast<std::size_t>(view.size()) >= elements) return;  // dense, or overlapping itself
  region.member.assign(elements, false);
  std::int64_t index[kMaxRank] = {};
  for (std::int64_t n = 0; n < view.size(); ++n) {
    std::int64_t offset = 0;
    for (int d = 0; d < view.rank; ++d) offset += index[d] * view.strides[d];
    region.member[offset] = true;
    for (int d = view.rank - 1; d >= 0 && ++index[d] == view.shape[d]; --d) index[d] = 0;
  }
}

TensorView read_tensor(const std::string& name, Role role) {
  TensorView view;
  view.dtype = static_cast<DType>(read_value<std::uint32_t>());
  view.device = role == Role::host ? Device::cpu : Device::cuda;
  const auto item_bytes = read_value<std::uint32_t>();
  view.rank = static_cast<int>(read_value<std::uint32_t>());
  if (view.rank > kMaxRank) {
    std::fprintf(stderr, "emulation: a tensor of rank %d\n", view.rank);
    std::exit(1);
  }
  for (int i = 0; i < view.rank; ++i) view.shape[i] = read_value<std::int64_t>();
  for (int i = 0; i < view.rank; ++i) view.strides[i] = read_value<std::int64_t>();
  const auto offset = read_value<std::uint32_t>();
  const auto bytes = read_value<std::uint64_t>();
  Region& region = memory().add_tensor(bytes, offset);
  region.name = "'" + name + "'";
  region.role = role;
  region.item_bytes = item_bytes;
  region.shape.assign(view.shape, view.shape + view.rank);
  region.strides.assign(view.strides, view.strides + view.rank);
  std::string data(bytes, '\0');
  read_bytes(data.data(), bytes);
  if (bytes > 0) mark_members(region, view);
  if (role == Role::input || role == Role::updated || role == Role::host) {
    for (std::size_t i = 0; i < bytes; ++i) {  // gaps keep their NaN
      if (region.member.empty() || region.member[i / item_bytes]) region.begin[i] = data[i];
    }
  }
#ifdef VISIONLLM_EMULATION_CHECKED
  if (role != Role::input && role != Role::host) region.track();
  if (role == Role::updated) region.mark_initial(0, bytes);
#endif
  // As torch: a tensor without elements has no address.
  view.data = bytes == 0 ? nullptr : region.begin;
  return view;
}

// Elements of outputs that no kernel has written, and gaps that one has.
std::string unwritten(const Region& region) {
  const std::size_t elements = region.bytes / region.item_bytes;
  std::size_t count = 0, first = 0;
  for (std::size_t i = 0; i < elements; ++i) {
    const bool belongs = region.member.empty() || region.member[i];
    bool untouched = true;
    for (std::size_t b = i * region.item_bytes; b < (i + 1) * region.item_bytes; ++b) {
      untouched = untouched && static_cast<unsigned char>(region.begin[b]) == 0xff;
    }
    if (!belongs) {
      if (!untouched)
        return "writes to a gap that the strides of " + region.name + " leave, at element " +
               std::to_string(i);
      continue;
    }
    if (region.tracked()) {
      const Access& access = region.writes[i * region.item_bytes / region.granule];
      untouched = access.interval == 0 && !access.initial;
    }
    if (untouched && count++ == 0) first = i;
  }
  if (count == 0) return {};
  return std::to_string(count) + " of " + std::to_string(elements) + " elements of output " + region.name +
         " are as before the call, not written or copied from memory that nothing has written, the first "
         "at " +
         region.place(first * region.item_bytes);
}

void serve() {
  const std::string name = read_text();
  Options options;
  options.seed = read_value<std::uint64_t>();
  options.block_order = static_cast<Order>(read_value<std::uint32_t>());
  options.thread_order = static_cast<Order>(read_value<std::uint32_t>());
  options.max_shared_bytes = static_cast<int>(read_value<std::uint32_t>());
  options.multiprocessors = static_cast<int>(read_value<std::uint32_t>());
  configure(options);
  clear_error();
  launches().clear();
  set_operator(name);
  memory().clear_tensors();

  const Operator* found = nullptr;
  for (const Operator& candidate : operators()) {
    if (name == candidate.name) found = &candidate;
  }
  std::vector<std::string> words;
  if (found != nullptr) {
    std::istringstream stream(found->tensors);
    for (std::string word; stream >> word;) words.push_back(word);
  }
  Execution execution;
  Arguments arguments;
  arguments.execution = &execution;
  std::vector<Region*> regions;  // of each tensor; null when absent
  const auto count = read_value<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto kind = read_value<std::uint8_t>();
    if (kind == 2) {
      const auto n = read_value<std::int64_t>();
      arguments.integers.push_back(n);
      arguments.numbers.push_back(static_cast<double>(n));
    } else if (kind == 3) {
      const auto x = read_value<double>();
      arguments.integers.push_back(static_cast<std::int64_t>(x));
      arguments.numbers.push_back(x);
    } else if (kind == 0) {
      arguments.tensors.emplace_back();
      regions.push_back(nullptr);
    } else {
      const std::size_t number = arguments.tensors.size();
      const std::string word = number < words.size() ? words[number] : "tensor " + std::to_string(number);
      const char mark = word[0];
      const Role role = mark == '>'   ? Role::output
                        : mark == '~' ? Role::workspace
                        : mark == '&' ? Role::updated
                        : mark == '@' ? Role::host
                                      : Role::input;
      arguments.tensors.push_back(read_tensor(role == Role::input ? word : word.substr(1), role));
      regions.push_back(memory().tensors().back());
    }
  }

  Status status;
  std::string bug;
  if (found == nullptr) {
    bug = "the driver has no operator '" + name + "': add it to cuda/emulation/operators.cpp";
  } else if (static_cast<int>(words.size()) != found->tensor_count) {
    bug = name + ": operators.cpp names " + std::to_string(words.size()) + " tensors, the function takes " +
          std::to_string(found->tensor_count);
  } else if (static_cast<int>(arguments.tensors.size()) != found->tensor_count ||
             static_cast<int>(arguments.integers.size()) != found->scalar_count) {
    bug = name + " takes " + std::to_string(found->tensor_count) + " tensors and " +
          std::to_string(found->scalar_count) + " scalars, got " + std::to_string(arguments.tensors.size()) +
          " and " + std::to_string(arguments.integers.size());
  } else {
    status = found->call(arguments);
    bug = error();
    for (std::size_t i = 0; i < regions.size() && bug.empty() && status.ok(); ++i) {
      if (regions[i] != nullptr && regions[i]->role == Role::output) {
        const std::string wrong = unwritten(*regions[i]);
        if (!wrong.empty()) bug = name + ": " + wrong;
      }
    }
  }

  Reply reply;
  reply.value(std::uint32_t{!bug.empty()                                    ? 3u
                            : status.ok()                                   ? 0u
                            : status.code() == StatusCode::invalid_argument ? 1u
                                                                            : 2u});
  reply.text(bug.empty() ? status.message() : bug);
  reply.value(static_cast<std::uint32_t>(launches().size()));
  for (const LaunchRecord& launch : launches()) {
    reply.text(launch.name);
    for (const dim3 size : {launch.grid, launch.block}) {
      for (const unsigned n : {size.x, size.y, size.z}) reply.value(std::uint32_t{n});
    }
    reply.value(static_cast<std::uint64_t>(launch.dynamic_shared_bytes));
    reply.value(static_cast<std::uint64_t>(launch.static_shared_bytes));
  }
  std::uint32_t returned = 0;
  for (const Region* const region : regions) returned += region != nullptr && region->comes_back() ? 1 : 0;
  const bool good = bug.empty() && status.ok();
  reply.value(good ? returned : 0u);
  for (std::size_t i = 0; good && i < regions.size(); ++i) {
    if (regions[i] == nullptr || !regions[i]->comes_back()) continue;
    reply.value(static_cast<std::uint32_t>(i));
    reply.value(static_cast<std::uint64_t>(regions[i]->bytes));
    reply.bytes(regions[i]->begin, regions[i]->bytes);
  }
  reply.send();
}

void print_position() {
  const char* const position = position_text();
  (void)!write(2, "\nemulation: in ", 15);
  (void)!write(2, position, std::strlen(position));
  (void)!write(2, "\n", 1);
}

[[maybe_unused]] void on_signal(int number, siginfo_t* info, void*) {
  char text[160];
  const int length = std::snprintf(
      text, sizeof text, "\nemulation: signal %d (%s) at address %p%s\n", number, strsignal(number),
      info->si_addr, on_guard_page(info->si_addr) ? " (the stack of a CUDA thread overflowed)" : "");
  (void)!write(2, text, static_cast<std::size_t>(length));
  print_position();
  _exit(99);
}

}  // namespace

std::vector<Operator>& operators() {
  static std::vector<Operator> all;
  return all;
}

}  // namespace visionllm::emulation

#ifdef __SANITIZE_ADDRESS__
// Both are called before the sanitizer ends the process.
extern "C" void __asan_on_error() { visionllm::emulation::print_position(); }
extern "C" void __ubsan_on_report() { visionllm::emulation::print_position(); }
#endif

int main() {
  using namespace visionllm::emulation;
  g_output = dup(1);
  dup2(2, 1);
#ifndef __SANITIZE_ADDRESS__
  static char stack[64 * 1024];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(number, &action, nullptr);
#endif
  for (;;) serve();
}
