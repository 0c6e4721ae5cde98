// The functions that the compiler calls at every load and store when it compiles with -fsanitize=thread. The
// thread sanitizer's own runtime is not linked: emulated threads are fibers, which it would not tell apart as
// CUDA does, so that check_access() takes its place.
#include <cstddef>

#include "emulation/memory.h"

using visionllm::emulation::AccessKind;
using visionllm::emulation::check_access;

#define VISIONLLM_HOOK(bytes)                                               \
  void __tsan_read##bytes(void* p) {                                        \
    check_access(p, bytes, AccessKind::read, __builtin_return_address(0));  \
  }                                                                         \
  void __tsan_write##bytes(void* p) {                                       \
    check_access(p, bytes, AccessKind::write, __builtin_return_address(0)); \
  }                                                                         \
  void __tsan_unaligned_read##bytes(void* p) {                              \
    check_access(p, bytes, AccessKind::read, __builtin_return_address(0));  \
  }                                                                         \
  void __tsan_unaligned_write##bytes(void* p) {                             \
    check_access(p, bytes, AccessKind::write, __builtin_return_address(0)); \
  }

extern "C" {
VISIONLLM_HOOK(1)
VISIONLLM_HOOK(2)
VISIONLLM_HOOK(4)
VISIONLLM_HOOK(8)
VISIONLLM_HOOK(16)
void __tsan_read_range(void* p, std::size_t n) {
  if (n > 0) check_access(p, n, AccessKind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t n) {
  if (n > 0) check_access(p, n, AccessKind::write, __builtin_return_address(0));
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}
