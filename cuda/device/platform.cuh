// What differs between a GPU and the emulator (cuda/emulation): every .cu file includes this and no CUDA header.
//
// Both sides give CUDA's own names. Three things have a spelling of their own, because plain C++ has none:
//   VISIONLLM_SHARED_ARRAY(T, name, N)   instead of  __shared__ T name[N]
//   VISIONLLM_DYNAMIC_SHARED(name)       instead of  extern __shared__ unsigned char name[]
//   launch(...)                          instead of  kernel<<<...>>>(...)
// Inline PTX is behind functions: mma.cuh, async_copy.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "visionllm/status.h"

#ifdef VISIONLLM_EMULATION
#include "emulation/platform.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Static shared memory, aligned for 16-byte accesses. Not initialised.
#define VISIONLLM_SHARED_ARRAY(T, name, N) __shared__ __align__(16) T name[N]

// The launch's dynamic shared memory as bytes, aligned to 128 of them. Not initialised.
#define VISIONLLM_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace visionllm::cuda {

// `what` names the kernel or the call.
inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::cuda_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                            cudaGetErrorString(error));
}

// Without this much an explicit request is needed, and static shared memory cannot have more at all.
constexpr std::size_t kSharedBytesWithoutRequest = 48 * 1024;

// Launches and asks for the launch's error; neither waits for the kernel nor allocates, so it can be captured
// in a graph. Arguments are converted to the kernel's parameter types.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "launch: one argument for each parameter");
  if (dynamic_shared_bytes > kSharedBytesWithoutRequest) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // reported here, so not again by the next launch
      return status_of(error, name);
    }
  }
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(
      static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  return status_of(cudaGetLastError(), name);
}

inline Status device_attribute(int* value, cudaDeviceAttr attribute) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  return status_of(error, "cudaDeviceGetAttribute");
}

// Shared memory that one block of the current device can have, static and dynamic together.
inline Status max_shared_bytes(int* bytes) {
  return device_attribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Multiprocessors of the current device.
inline Status multiprocessor_count(int* count) {
  return device_attribute(count, cudaDevAttrMultiProcessorCount);
}

}  // namespace visionllm::cuda

#endif
