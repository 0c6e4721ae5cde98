// CUDA's names for g++: the emulator's side of device/platform.cuh.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/engine.h"
#include "emulation/types.h"
#include "visionllm/status.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ the_emulator_needs_VISIONLLM_SHARED_ARRAY_or_VISIONLLM_DYNAMIC_SHARED

#define VISIONLLM_SHARED_ARRAY(T, name, N)                          \
  static const char name##_declaration = 0;                         \
  T(&name)                                                          \
  [N] = *static_cast<T(*)[N]>(::visionllm::emulation::shared_array( \
      &name##_declaration, #name, sizeof(T) * (N), alignof(T) > 16 ? alignof(T) : 16))

#define VISIONLLM_DYNAMIC_SHARED(name) \
  unsigned char* const name =          \
      static_cast<unsigned char*>(::visionllm::emulation::dynamic_shared({#name, __FILE__, __LINE__}))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- runtime ----------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t stream = nullptr);

namespace visionllm::cuda {

constexpr std::size_t kSharedBytesWithoutRequest = 48 * 1024;

inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::cuda_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::size_t dynamic_shared_bytes, cudaStream_t, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "launch: one argument for each parameter");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "launch: parameters are copied byte by byte");
  struct Closure {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  if constexpr (sizeof(Closure) > 4096) {
    return Status::cuda_error(std::string(name) + ": more than 4096 bytes of parameters");
  } else {
    auto* const closure = new (emulation::parameter_space()) Closure{
        kernel, std::tuple<Parameters...>(static_cast<Parameters>(std::forward<Arguments>(arguments))...)};
    const bool good = emulation::run_kernel(
        name, grid, block, dynamic_shared_bytes, (sizeof(Parameters) + ... + std::size_t{0}),
        [](const void* data) {
          const auto& self = *static_cast<const Closure*>(data);
          std::apply(self.kernel, self.parameters);
        },
        closure);
    // The text does not matter: whoever called the operator asks the emulator first.
    return good ? Status() : Status::cuda_error(std::string(name) + ": stopped by the emulator");
  }
}

inline Status max_shared_bytes(int* bytes) {
  *bytes = emulation::options().max_shared_bytes;
  return {};
}

inline Status multiprocessor_count(int* count) {
  *count = emulation::options().multiprocessors;
  return {};
}

}  // namespace visionllm::cuda

// ---- barriers, shuffles, votes ----------------------------------------------------------------------------------

#define VISIONLLM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(VISIONLLM_SITE) {
  visionllm::emulation::block_barrier({"__syncthreads", file, line}, visionllm::emulation::Vote::none, 0);
}
inline int __syncthreads_or(int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::block_barrier({"__syncthreads_or", file, line},
                                             visionllm::emulation::Vote::any, predicate);
}
inline int __syncthreads_and(int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::block_barrier({"__syncthreads_and", file, line},
                                             visionllm::emulation::Vote::all, predicate);
}
inline int __syncthreads_count(int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::block_barrier({"__syncthreads_count", file, line},
                                             visionllm::emulation::Vote::count, predicate);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, VISIONLLM_SITE) {
  visionllm::emulation::warp_barrier({"__syncwarp", file, line}, mask);
}
inline void __threadfence() { visionllm::emulation::thread_fence(); }
inline void __threadfence_block() {}

namespace visionllm::emulation {

// One lane's part of a shuffle: its value, the lane it wants to read (-1: its own value), what it gets.
struct ShuffleLane {
  unsigned char value[16];
  unsigned char result[16];
  int source;
};

void complete_shuffle(void* const (&lanes)[32], unsigned mask);

template <typename T>
T shuffle(const char* what, const char* file, int line, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles take values of at most 8 bytes");
  ShuffleLane lane;
  std::memcpy(lane.value, &value, sizeof(T));
  lane.source = source;
  warp_collective({{what, file, line}, mask, complete_shuffle, &lane});
  T result;
  std::memcpy(&result, lane.result, sizeof(T));
  return result;
}

unsigned ballot(const char* what, const char* file, int line, unsigned mask, int predicate);

}  // namespace visionllm::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, VISIONLLM_SITE) {
  const int lane = visionllm::emulation::lane_number();
  return visionllm::emulation::shuffle("__shfl_sync", file, line, mask, value,
                                       (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, VISIONLLM_SITE) {
  const int lane = visionllm::emulation::lane_number(), source = lane - static_cast<int>(delta);
  return visionllm::emulation::shuffle("__shfl_up_sync", file, line, mask, value,
                                       source < (lane & ~(width - 1)) ? -1 : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, VISIONLLM_SITE) {
  const int lane = visionllm::emulation::lane_number(), source = lane + static_cast<int>(delta);
  return visionllm::emulation::shuffle("__shfl_down_sync", file, line, mask, value,
                                       source > (lane | (width - 1)) ? -1 : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, VISIONLLM_SITE) {
  const int lane = visionllm::emulation::lane_number(), source = lane ^ lane_mask;
  return visionllm::emulation::shuffle("__shfl_xor_sync", file, line, mask, value,
                                       source > (lane | (width - 1)) ? -1 : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::ballot("__ballot_sync", file, line, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::ballot("__any_sync", file, line, mask, predicate) != 0 ? 1 : 0;
}
inline int __all_sync(unsigned mask, int predicate, VISIONLLM_SITE) {
  return visionllm::emulation::ballot("__all_sync", file, line, mask, predicate == 0 ? 1 : 0) == 0 ? 1 : 0;
}
#undef VISIONLLM_SITE

// ---- atomics: each returns the value before -----------------------------------------------------------------------

float atomicAdd(float* address, float value);
double atomicAdd(double* address, double value);
int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
__half atomicAdd(__half* address, __half value);
__nv_bfloat16 atomicAdd(__nv_bfloat16* address, __nv_bfloat16 value);
__half2 atomicAdd(__half2* address, __half2 value);
__nv_bfloat162 atomicAdd(__nv_bfloat162* address, __nv_bfloat162 value);
int atomicSub(int* address, int value);
unsigned atomicSub(unsigned* address, unsigned value);
int atomicMax(int* address, int value);
unsigned atomicMax(unsigned* address, unsigned value);
unsigned long long atomicMax(unsigned long long* address, unsigned long long value);
int atomicMin(int* address, int value);
unsigned atomicMin(unsigned* address, unsigned value);
unsigned long long atomicMin(unsigned long long* address, unsigned long long value);
unsigned atomicInc(unsigned* address, unsigned limit);
int atomicOr(int* address, int value);
unsigned atomicOr(unsigned* address, unsigned value);
unsigned atomicAnd(unsigned* address, unsigned value);
float atomicExch(float* address, float value);
int atomicExch(int* address, int value);
unsigned atomicExch(unsigned* address, unsigned value);
unsigned long long atomicExch(unsigned long long* address, unsigned long long value);
int atomicCAS(int* address, int compare, int value);
unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value);
unsigned short atomicCAS(unsigned short* address, unsigned short compare, unsigned short value);
unsigned long long atomicCAS(unsigned long long* address, unsigned long long compare,
                             unsigned long long value);

// ---- loads and stores with a cache hint ---------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldlu(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stwt(T* p, T value) {
  *p = value;
}

// ---- mathematics: the exact functions; the GPU's fast ones are less exact ----------------------------------------

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float fdividef(float x, float y) { return x / y; }

namespace visionllm::emulation {
// As the GPU converts: NaN to 0, what is too large to the nearest limit.
template <typename To, typename From>
To saturating(From x) {
  if (x != x) return 0;
  constexpr To lowest = std::numeric_limits<To>::min(), highest = std::numeric_limits<To>::max();
  if (x <= static_cast<From>(lowest)) return lowest;
  if (x >= static_cast<From>(highest)) return highest;
  return static_cast<To>(x);
}
}  // namespace visionllm::emulation

inline int __float2int_rz(float x) { return visionllm::emulation::saturating<int>(x); }
inline int __float2int_rd(float x) { return visionllm::emulation::saturating<int>(floorf(x)); }
inline int __float2int_ru(float x) { return visionllm::emulation::saturating<int>(ceilf(x)); }
inline int __float2int_rn(float x) { return visionllm::emulation::saturating<int>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return visionllm::emulation::saturating<unsigned>(x); }
inline unsigned __float2uint_rn(float x) { return visionllm::emulation::saturating<unsigned>(nearbyintf(x)); }
inline long long __float2ll_rd(float x) { return visionllm::emulation::saturating<long long>(floorf(x)); }
inline long long __float2ll_rn(float x) { return visionllm::emulation::saturating<long long>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return visionllm::emulation::float_bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(visionllm::emulation::float_bits(x)); }
inline float __uint_as_float(unsigned x) { return visionllm::emulation::bits_float(x); }
inline float __int_as_float(int x) { return visionllm::emulation::bits_float(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(x) * y >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15u;
    unsigned byte = static_cast<unsigned>(both >> 8 * (nibble & 7u)) & 0xffu;
    if ((nibble & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<signed char>(static_cast<unsigned>(a) >> 8 * i) *
         static_cast<signed char>(static_cast<unsigned>(b) >> 8 * i);
  }
  return c;
}
inline std::size_t __cvta_generic_to_shared(const void*) = delete;

// CUDA's min and max take numbers of two types.
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
