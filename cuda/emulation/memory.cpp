#include "emulation/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulation/engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define VISIONLLM_POISON(p, n) __asan_poison_memory_region(p, n)
#define VISIONLLM_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define VISIONLLM_POISON(p, n) ((void)0)
#define VISIONLLM_UNPOISON(p, n) ((void)0)
#endif

// The program's own code and data, between two symbols of the linker.
extern "C" char __executable_start, _end;

namespace visionllm::emulation {
namespace {

constexpr std::size_t kTensorRange = std::size_t{4} << 30;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kDynamicSharedAlignment = 128;
constexpr std::size_t kSharedRange = std::size_t{2} << 20;
// Between two buffers: how far an overrun may reach and still be named after the buffer it left.
constexpr std::size_t kTensorGap = 64 * 1024, kSharedGap = 4096;

char* reserve(std::size_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulation: no address range for device memory");
    std::abort();
  }
  return static_cast<char*>(memory);
}

std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::string number(std::size_t n) { return std::to_string(n); }

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::read:
    case AccessKind::read_padding: return "reads";
    case AccessKind::write: return "writes";
    case AccessKind::atomic: return "atomically updates";
    default: return "asynchronously copies to";
  }
}

std::string pc_text(const void* pc) {
  char text[40];
  std::snprintf(text, sizeof text, " [pc %p]", pc);
  return pc == nullptr ? "" : text;
}

// Did everything recorded happen before the asker's next instruction?
bool ordered(const Access& a, const Moment& me) {
  if (a.interval < me.launch) return true;
  if (a.interval < me.block) return acquired(a.interval);
  if (a.other_blocks && !acquired_any()) return false;
  if (a.interval < me.interval) return true;
  if (a.many_warps || a.warp != me.warp) return false;
  for (std::uint32_t rest = a.lanes & ~me.lane_bit; rest != 0; rest &= rest - 1) {
    if (me.known[__builtin_ctz(rest)] <= a.stamp) return false;
  }
  return true;
}

Access first_access(const Moment& me) {
  Access a;
  a.interval = me.interval, a.lanes = me.lane_bit, a.stamp = me.stamp, a.warp = me.warp;
  return a;
}

// Adds the asker to the threads that share an access which needs no order among them: reads, atomics.
void join(Access& a, const Moment& me) {
  if (a.interval == me.interval) {
    if (a.warp != me.warp) {
      a.many_warps = true;
      return;
    }
    if (a.lanes == me.lane_bit) {
      a.stamp = me.stamp;
      return;
    }
    std::uint32_t lanes = me.lane_bit;
    for (std::uint32_t rest = a.lanes & ~me.lane_bit; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if (me.known[lane] <= a.stamp) lanes |= 1u << lane;  // the others came before
    }
    a.lanes = lanes;
    a.stamp = std::max(a.stamp, me.stamp);
    return;
  }
  const bool others = a.interval >= me.launch && (a.interval < me.block || a.other_blocks);
  const bool atomic = a.atomic;
  a = first_access(me);
  a.other_blocks = others;
  a.atomic = atomic;
}

std::string who(const Access& a, const Moment& me) {
  if (a.interval < me.block) return block_text(a.interval);
  if (a.other_blocks) return "another block";
  std::uint32_t others = a.warp == me.warp ? a.lanes & ~me.lane_bit : a.lanes;
  if (others == 0) others = a.lanes;
  std::string text = thread_text(a.warp * 32 + __builtin_ctz(others));
  if (a.many_warps || (others & (others - 1)) != 0) text += " and others";
  return text;
}

std::string conflict(const Region& region, std::size_t offset, AccessKind kind, const Access& a,
                     const char* past, const Moment& me) {
  std::string text =
      std::string(verb(kind)) + " " + region.place(offset) + ", which " + who(a, me) + " " + past;
  if (a.interval < me.block || a.other_blocks) {
    text +=
        a.atomic || kind == AccessKind::atomic
            ? " in the same launch: an atomic and a plain access without __threadfence and an atomic between"
            : " in the same launch: blocks may share an element only by atomics";
  } else {
    text += a.warp == me.warp && !a.many_warps ? " without __syncwarp or __syncthreads between"
                                               : " without __syncthreads between";
  }
  return text;
}

void refine(Region& region, std::size_t granule) {
  while (region.granule > granule) {
    for (std::vector<Access>* records : {&region.writes, &region.reads}) {
      std::vector<Access> finer(records->size() * 2);
      for (std::size_t i = 0; i < finer.size(); ++i) finer[i] = (*records)[i / 2];
      *records = std::move(finer);
    }
    region.granule /= 2;
  }
}

// Nothing to check and nothing to record: the thread reads again what it has read, and since then nobody wrote (a
// write would have found that read, or cleared it).
bool reads_again(const Access& read, const Moment& me) {
  return read.interval == me.interval && read.warp == me.warp && (read.lanes & me.lane_bit) != 0 &&
         read.stamp >= me.stamp;
}

// Checks and records an access to one granule of a tracked region. Returns what is wrong, or nothing.
std::string check_granule(Region& region, std::size_t i, AccessKind kind, const Moment& me) {
  Access& w = region.writes[i];
  Access& r = region.reads[i];
  const std::size_t offset = i * region.granule;
  if (region.shared && w.interval < me.block) w = Access{};
  if (region.shared && r.interval < me.block) r = Access{};
  const bool written = w.interval != 0 || w.initial;
  const bool mine = w.interval == me.interval && w.lanes == me.lane_bit && w.warp == me.warp && !w.many_warps;
  const bool after_write = w.interval == 0 || mine || ordered(w, me);
  if (w.copying && kind != AccessKind::copy_end) {
    return std::string(verb(kind)) + " " + region.place(offset) + ", to which an asynchronous copy of " +
           who(w, me) + " is on its way: copy_async_wait must come first";
  }
  switch (kind) {
    case AccessKind::read:
    case AccessKind::read_padding:
      if (kind == AccessKind::read && !written)
        return "reads " + region.place(offset) + ", which nothing has written";
      if (!after_write)
        return conflict(region, offset, kind, w, w.atomic ? "has updated" : "has written", me);
      join(r, me);
      return {};
    case AccessKind::atomic:
      if (!written) return "atomically updates " + region.place(offset) + ", which nothing has written";
      if (!w.atomic && !after_write) return conflict(region, offset, kind, w, "has written", me);
      if (r.interval != 0 && !ordered(r, me)) return conflict(region, offset, kind, r, "has read", me);
      if (w.atomic && w.interval >= me.launch) {
        join(w, me);
      } else {
        w = first_access(me);
        w.atomic = true;
      }
      return {};
    case AccessKind::write:
    case AccessKind::copy_begin:
      if (!after_write)
        return conflict(region, offset, kind, w, w.atomic ? "has updated" : "has written", me);
      if (r.interval != 0 && !ordered(r, me)) return conflict(region, offset, kind, r, "has read", me);
      w = first_access(me);
      w.copying = kind == AccessKind::copy_begin;
      r = Access{};
      return {};
    case AccessKind::copy_end: w = first_access(me); return {};
  }
  return {};
}

}  // namespace

Memory& memory() {
  static Memory instance;
  return instance;
}

void Region::track() {
  granule = item_bytes == 1 || item_bytes == 2 ? item_bytes : 4;
  writes.assign(bytes / granule + 1, Access{});
  reads.assign(bytes / granule + 1, Access{});
}

void Region::mark_initial(std::size_t offset, std::size_t count) {
  if (!tracked() || count == 0) return;
  while (granule > 1 && (offset % granule != 0 || count % granule != 0)) refine(*this, granule / 2);
  for (std::size_t i = offset / granule; i <= (offset + count - 1) / granule; ++i) {
    writes[i] = reads[i] = Access{};
    writes[i].initial = true;
  }
}

std::string Region::place(std::size_t offset) const {
  if (shared) return name + " byte " + number(offset) + " of " + number(bytes);
  std::size_t rest = offset / item_bytes;
  std::string text = name + " element " + number(rest);
  // Coordinates where the strides fall from left to right, as in most tensors.
  std::string coordinates;
  bool falling = !shape.empty();
  for (std::size_t i = 0; i < shape.size() && falling; ++i) {
    if (shape[i] == 1) {
      coordinates += (i == 0 ? "" : ", ") + std::string("0");
      continue;
    }
    if (strides[i] < 1 || rest / strides[i] >= static_cast<std::size_t>(shape[i])) falling = false;
    if (!falling) break;
    coordinates += (i == 0 ? "" : ", ") + number(rest / strides[i]);
    rest %= strides[i];
  }
  return falling && rest == 0 ? text + " [" + coordinates + "]" : text;
}

Memory::Memory()
    : tensor_base_(reserve(kTensorRange)),
      tensor_of_page_(kTensorRange / kPage),
      shared_base_(reserve(kSharedRange)) {
  VISIONLLM_POISON(shared_base_, kSharedRange);
}

void Memory::clear_tensors() {
  for (Region* const region : tensors_) {
#ifdef __SANITIZE_ADDRESS__
    std::free(region->begin - reinterpret_cast<std::uintptr_t>(region->begin) % 256);
#endif
    delete region;
  }
  tensors_.clear();
  std::fill_n(tensor_of_page_.begin(), tensor_used_ / kPage, std::uint16_t{0});
  tensor_used_ = 0;
}

Region& Memory::add_tensor(std::size_t bytes, std::size_t offset) {
  auto* const region = new Region;
  offset %= 256;
#ifdef __SANITIZE_ADDRESS__
  // From malloc, so that AddressSanitizer knows the exact end.
  void* block = nullptr;
  if (posix_memalign(&block, 256, offset + bytes) != 0) std::abort();
  region->begin = static_cast<char*>(block) + offset;
  VISIONLLM_POISON(block, offset / 8 * 8);
#else
  const std::size_t begin = tensor_used_ + kTensorGap;
  const std::size_t end = round_up(begin + offset + bytes, kPage);
  if (end + kTensorGap > kTensorRange || tensors_.size() > 65000) {
    std::fprintf(stderr, "emulation: tensors of more than %zu bytes in all\n", kTensorRange);
    std::abort();
  }
  region->begin = tensor_base_ + begin + offset;
  tensor_used_ = end;
  for (std::size_t page = begin / kPage; page < end / kPage; ++page) {
    tensor_of_page_[page] = static_cast<std::uint16_t>(tensors_.size() + 1);
  }
#endif
  region->bytes = bytes;
  std::memset(region->begin, 0xff, bytes);
  tensors_.push_back(region);
  return *region;
}

void Memory::begin_launch() {
  for (Region* const region : shared_) {
    VISIONLLM_POISON(region->begin, round_up(region->bytes, 8));
    delete region;
  }
  shared_.clear();
  shared_top_ = 0;
}

void Memory::begin_block() { shared_used_ = 0; }

Region* Memory::shared_array(const void* site, const char* name, std::size_t bytes, std::size_t alignment) {
  for (Region* const region : shared_) {
    if (region->site != site) continue;
    if (region->used_in_block != running.moment.block) {
      region->used_in_block = running.moment.block;
      if (alignment != kDynamicSharedAlignment) shared_used_ += round_up(bytes, 16);
      std::memset(region->begin, 0xff, bytes);
    }
    return region;
  }
  // No better aligned than the GPU promises.
  const std::size_t begin =
      round_up(shared_top_ + kSharedGap, 2 * std::max<std::size_t>(alignment, 16)) + alignment;
  if (begin + bytes + kSharedGap > kSharedRange) return nullptr;
  auto* const region = new Region;
  region->name = std::string("shared array '") + name + "'";
  region->begin = shared_base_ + begin;
  region->bytes = bytes;
  region->shared = true;
  region->site = site;
  region->used_in_block = running.moment.block;
  region->track();
  shared_top_ = begin + bytes;
  if (alignment != kDynamicSharedAlignment) shared_used_ += round_up(bytes, 16);
  VISIONLLM_UNPOISON(region->begin, bytes);
  std::memset(region->begin, 0xff, bytes);
  shared_.push_back(region);
  return region;
}

bool Memory::in_shared_range(const void* address) const {
  return static_cast<std::size_t>(static_cast<const char*>(address) - shared_base_) < kSharedRange;
}

bool Memory::in_tensor_range(const void* address) const {
#ifdef __SANITIZE_ADDRESS__
  for (const Region* const region : tensors_) {
    if (region->holds(static_cast<const char*>(address))) return true;
  }
  return false;
#else
  return static_cast<std::size_t>(static_cast<const char*>(address) - tensor_base_) < kTensorRange;
#endif
}

Region* Memory::find(const void* address, bool* inside) {
  const char* const p = static_cast<const char*>(address);
  *inside = false;
  Region* nearest = nullptr;
  if (in_shared_range(p)) {
    for (Region* const region : shared_) {
      if (region->used_in_block != running.moment.block) continue;
      if (region->holds(p)) {
        *inside = true;
        return region;
      }
      // The end of the one below, else the beginning of the one above.
      if (nearest == nullptr ||
          (region->begin <= p && (nearest->begin > p || region->begin > nearest->begin)) ||
          (nearest->begin > p && region->begin > p && region->begin < nearest->begin)) {
        nearest = region;
      }
    }
    return nearest;
  }
#ifndef __SANITIZE_ADDRESS__
  if (in_tensor_range(p)) {
    const std::size_t number = tensor_of_page_[static_cast<std::size_t>(p - tensor_base_) / kPage];
    if (number != 0 && tensors_[number - 1]->holds(p)) {
      *inside = true;
      return tensors_[number - 1];
    }
  }
#endif
  for (Region* const region : tensors_) {
    if (region->holds(p)) {
      *inside = true;
      return region;
    }
    const auto distance = [p](const Region* r) {
      return p < r->begin ? static_cast<std::size_t>(r->begin - p)
                          : static_cast<std::size_t>(p - r->begin - r->bytes);
    };
    if (distance(region) <= kTensorGap && (nearest == nullptr || distance(region) < distance(nearest))) {
      nearest = region;
    }
  }
  return nearest;
}

namespace {

std::string outside(const Region* region, const char* p, std::size_t bytes, AccessKind kind) {
  const std::string text = std::string(verb(kind)) + " " + number(bytes) + " bytes ";
  if (region == nullptr) {
    char where[32];
    std::snprintf(where, sizeof where, "at address %p", static_cast<const void*>(p));
    return text + where + ", outside every tensor and shared array: out of bounds";
  }
  const bool before = p < region->begin;
  const std::size_t distance = before ? region->begin - p : p - region->begin;
  return text +
         (before ? number(distance) + " bytes before the beginning of "
                 : "from byte " + number(distance) + " of ") +
         region->name + ", which has " + number(region->bytes) + ": out of bounds";
}

// A tensor's element that is not one, or that the kernel may not have.
std::string forbidden(const Region& region, std::size_t offset, std::size_t bytes, AccessKind kind) {
  if (region.role == Role::host)
    return std::string(verb(kind)) + " " + region.place(offset) + ", which is in host memory";
  if (region.role == Role::input && kind != AccessKind::read && kind != AccessKind::read_padding) {
    return std::string(verb(kind)) + " " + region.place(offset) + ", an input";
  }
  for (std::size_t i = offset / region.item_bytes;
       !region.member.empty() && i * region.item_bytes < offset + bytes; ++i) {
    if (!region.member[i]) {
      return std::string(verb(kind)) + " " + number(bytes) + " bytes from byte " + number(offset) + " of " +
             region.name + ", which are not the tensor's: they lie in a gap that its strides leave";
    }
  }
  return {};
}

void check_host_access(const char* p, AccessKind kind, const void* pc) {
  Memory& all = memory();
  if (!all.in_shared_range(p) && !all.in_tensor_range(p)) return;
  bool inside;
  const Region* const region = all.find(p, &inside);
  if (region == nullptr || region->role != Role::host) {
    report("host code " + std::string(verb(kind)) + " device memory" + pc_text(pc));
  }
}

}  // namespace

void check_access(const Moment& me, const void* address, std::size_t bytes, AccessKind kind, const void* pc) {
  Memory& all = memory();
  const char* const p = static_cast<const char*>(address);
  bool inside;
  Region* const region = all.find(p, &inside);
  if (!inside || p + bytes > region->begin + region->bytes)
    fail(outside(region, p, bytes, kind) + pc_text(pc));
  const std::size_t offset = p - region->begin;
  if (!region->shared && (!region->tracked() || !region->member.empty())) {
    const std::string wrong = forbidden(*region, offset, bytes, kind);
    if (!wrong.empty()) fail(wrong + pc_text(pc));
  }
  if (!region->tracked()) return;
  std::size_t granule = region->granule;
  while (granule > 1 && (offset % granule != 0 || bytes % granule != 0)) granule /= 2;
  if (granule < region->granule) refine(*region, granule);
  const std::size_t last = (offset + bytes - 1) / region->granule;
  for (std::size_t i = offset / region->granule; i <= last; ++i) {
    if (kind == AccessKind::read && reads_again(region->reads[i], me)) continue;
    const std::string wrong = check_granule(*region, i, kind, me);
    if (!wrong.empty()) fail(wrong + pc_text(pc));
  }
}

void check_access(const void* address, std::size_t bytes, AccessKind kind, const void* pc) {
  const char* const p = static_cast<const char*>(address);
  if (!running.active) {
    check_host_access(p, kind, pc);
    return;
  }
  // A thread's own variables; constants and the kernel's parameters.
  if (static_cast<std::size_t>(p - running.stack) < running.stack_bytes ||
      (p >= &__executable_start && p < &_end))
    return;
  check_access(running.moment, address, bytes, kind, pc);
}

}  // namespace visionllm::emulation
