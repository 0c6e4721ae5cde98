// What device/async_copy.cuh has as inline PTX, on the CPU: the bytes arrive at the wait and no earlier.
#pragma once

#include "emulation/platform.h"

namespace visionllm::cuda {

#define VISIONLLM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void copy_async_16(void* shared, const void* global, bool valid, VISIONLLM_SITE) {
  emulation::copy_async(shared, global, 16, valid, {"copy_async_16", file, line});
}
inline void copy_async_8(void* shared, const void* global, bool valid, VISIONLLM_SITE) {
  emulation::copy_async(shared, global, 8, valid, {"copy_async_8", file, line});
}
inline void copy_async_4(void* shared, const void* global, bool valid, VISIONLLM_SITE) {
  emulation::copy_async(shared, global, 4, valid, {"copy_async_4", file, line});
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int N>
void copy_async_wait() {
  emulation::copy_async_wait(N);
}

#undef VISIONLLM_SITE

}  // namespace visionllm::cuda
