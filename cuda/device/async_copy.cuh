// Copies from global to shared memory that run while the thread goes on (PTX cp.async, sm_80).
//
//   copy_async_16(shared, global, valid);   4, 8 or 16 bytes, both addresses aligned to the size; where
//                                           !valid, zeros are written and `global` is not read
//   copy_async_commit();                    closes the thread's group of the copies so far
//   copy_async_wait<N>();                   waits until at most the N latest groups of this thread are open
//
// The wait is for the thread's own copies: other threads may read them after a barrier that follows it.
#pragma once

#include "device/platform.cuh"

#ifdef VISIONLLM_EMULATION
#include "emulation/async_copy.h"
#else

namespace visionllm::cuda {

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

}  // namespace visionllm::cuda

#endif
