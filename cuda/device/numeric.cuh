// Element types: conversion to and from float, vectors of elements in one load or store, sums over a warp.
#pragma once

#include "device/platform.cuh"

namespace visionllm::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

namespace numeric_detail {

template <typename T>
struct FromFloat;
template <>
struct FromFloat<float> {
  static __device__ __forceinline__ float convert(float x) { return x; }
};
template <>
struct FromFloat<__half> {
  static __device__ __forceinline__ __half convert(float x) { return __float2half_rn(x); }
};
template <>
struct FromFloat<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 convert(float x) { return __float2bfloat16_rn(x); }
};

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace numeric_detail

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return numeric_detail::FromFloat<T>::convert(x);
}

// Elements of T in a 16-byte vector.
template <typename T>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

// N elements that lie one after the other, moved in one instruction; aligned to their size, at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
  __device__ __forceinline__ T& operator[](int i) { return element[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return element[i]; }
};

// One load of N elements; `source` is aligned to N * sizeof(T) bytes (1, 2, 4, 8 or 16).
template <typename T, int N = kVectorSize<T>>
__device__ __forceinline__ Vector<T, N> load_vector(const T* source) {
  using Word = typename numeric_detail::Word<sizeof(T) * N>::type;
  union Both {
    Word word;
    Vector<T, N> vector;
    __device__ Both() {}
  } both;
  both.word = *reinterpret_cast<const Word*>(source);
  return both.vector;
}

// One store of N elements; `target` is aligned to N * sizeof(T) bytes (1, 2, 4, 8 or 16).
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* target, const Vector<T, N>& vector) {
  using Word = typename numeric_detail::Word<sizeof(T) * N>::type;
  union Both {
    Word word;
    Vector<T, N> vector;
    __device__ Both() {}
  } both;
  both.vector = vector;
  *reinterpret_cast<Word*>(target) = both.word;
}

// The same with conversion: N elements as floats.
template <typename T, int N>
__device__ __forceinline__ void load_floats(float (&values)[N], const T* source) {
  if constexpr (sizeof(T) * N <= 16) {
    const Vector<T, N> vector = load_vector<T, N>(source);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(vector[i]);
  } else {
    constexpr int M = kVectorSize<T>;
    static_assert(N % M == 0, "load_floats: more than 16 bytes must be whole 16-byte vectors");
#pragma unroll
    for (int j = 0; j < N; j += M) {
      const Vector<T, M> vector = load_vector<T, M>(source + j);
#pragma unroll
      for (int i = 0; i < M; ++i) values[j + i] = to_float(vector[i]);
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* target, const float (&values)[N]) {
  constexpr int M = sizeof(T) * N <= 16 ? N : kVectorSize<T>;
  static_assert(N % M == 0, "store_floats: more than 16 bytes must be whole 16-byte vectors");
#pragma unroll
  for (int j = 0; j < N; j += M) {
    Vector<T, M> vector;
#pragma unroll
    for (int i = 0; i < M; ++i) vector[i] = from_float<T>(values[j + i]);
    store_vector<T, M>(target + j, vector);
  }
}

// Sum and maximum over groups of Width neighbouring lanes (a power of two); every lane gets the result, in
// an order of additions that is the same in each run. All lanes of the warp take part.
template <int Width = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <int Width = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

}  // namespace visionllm::cuda
