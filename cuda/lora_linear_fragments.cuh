// What the kernels of lora_linear share: rows of adapters, predicated loads, int8 weights and low-rank states
// as 16-bit factors of the tensor cores.
#pragma once

#include <climits>

#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "device/platform.cuh"
#include "lora_linear_plan.h"

namespace visionllm::cuda {

// The adapter of row t, -1 without one.
__device__ __forceinline__ int adapter_of_row(const std::int64_t* index, std::int64_t t, std::int64_t T,
                                              int adapters) {
  if (t >= T) return -1;
  if (index == nullptr) return 0;
  const std::int64_t a = index[t];
  return a >= 0 && a < adapters ? static_cast<int>(a) : -1;
}

// The smallest value of all lanes that is greater than `current`, or INT_MAX: one after the other, the
// adapters that a warp's rows take. All lanes of the warp take part.
__device__ __forceinline__ int next_adapter(int mine, int current) {
  int next = mine > current ? mine : INT_MAX;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(kFullWarp, next, offset);
    next = other < next ? other : next;
  }
  return next;
}

// N elements of 2 or 1 bytes as 32-bit words, zero beyond the first `count` of them (count <= 0: nothing is
// read). kVector: the address is aligned to 16 bytes, and count is at least N or at most 0.
template <bool kVector, int N, typename T>
__device__ __forceinline__ void load_words(std::uint32_t (&words)[N * sizeof(T) / 4], const T* source,
                                           std::int64_t count) {
  constexpr int kWords = N * sizeof(T) / 4;
  if constexpr (kVector) {
    static_assert(kWords % 4 == 0, "load_words: whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = count > 0 ? *(reinterpret_cast<const uint4*>(source) + i / 4) : make_uint4(0, 0, 0, 0);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      std::uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        if (i * kPerWord + j < count) {
          union Bits {
            T element;
            std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t> bits;
            __device__ Bits() {}
          } one;
          one.element = source[i * kPerWord + j];
          word |= static_cast<std::uint32_t>(one.bits) << (8 * static_cast<int>(sizeof(T)) * j);
        }
      }
      words[i] = word;
    }
  }
}

__device__ __forceinline__ float bits_as_float(std::uint32_t bits) {
  union Both {
    std::uint32_t bits;
    float value;
  } both;
  both.bits = bits;
  return both.value;
}

// Byte i (constant) of four int8, exactly: 2^23 + (v + 128) is a float whose low mantissa byte is v + 128.
// `flipped` has the top bit of each byte inverted.
__device__ __forceinline__ float int8_as_float(std::uint32_t flipped, int i) {
  return bits_as_float(0x4b000000u | (flipped >> (8 * i) & 0xffu)) - 8388736.0f;
}

constexpr std::uint32_t kFlipInt8 = 0x80808080u;

// Four int8 as two words of 16-bit elements; every int8 is a bfloat16 and a float16.
template <typename T>
__device__ __forceinline__ void widen_int8(std::uint32_t (&words)[2], std::uint32_t bytes) {
  bytes ^= kFlipInt8;
  words[0] = pack2(from_float<T>(int8_as_float(bytes, 0)), from_float<T>(int8_as_float(bytes, 1)));
  words[1] = pack2(from_float<T>(int8_as_float(bytes, 2)), from_float<T>(int8_as_float(bytes, 3)));
}

// value = high + low to twice T's mantissa.
template <typename T>
__device__ __forceinline__ void split_float(T* high, T* low, float value) {
  *high = from_float<T>(value);
  *low = from_float<T>(value - to_float(*high));
}

}  // namespace visionllm::cuda
