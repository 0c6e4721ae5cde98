// Short vectors of float and int32 with one interface for every instruction set, so that a kernel is written
// once.
//
// A kernel source is compiled once per instruction set with VISIONLLM_ISA defined as scalar, avx2, avx512,
// avx512_bf16 or neon and puts all it defines in namespace visionllm::cpu::VISIONLLM_ISA. Kernel sources
// include this header and C headers only: an inline function of the standard library compiled with -mavx512f
// could be merged by the linker into code that runs everywhere.
//
//   F, I, M        vectors of kWidth floats, int32s, booleans
//   load, store    unaligned; from and to float, bfloat16 and float16 memory (round to nearest even);
//                  from int8
//   *_partial      the first n < kWidth elements only; other lanes are read as zero and not written
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define VISIONLLM_INLINE inline __attribute__((always_inline))

namespace visionllm::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace visionllm::cpu

// The numbers let the preprocessor compare names.
#define VISIONLLM_ISA_NUMBER_scalar 1
#define VISIONLLM_ISA_NUMBER_avx2 2
#define VISIONLLM_ISA_NUMBER_avx512 3
#define VISIONLLM_ISA_NUMBER_avx512_bf16 4
#define VISIONLLM_ISA_NUMBER_neon 5
#define VISIONLLM_ISA_NUMBER_(name) VISIONLLM_ISA_NUMBER_##name
#define VISIONLLM_ISA_NUMBER(name) VISIONLLM_ISA_NUMBER_(name)

#if VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 1
#include "simd_scalar.h"
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 2
#include "simd_avx2.h"
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 3 || VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 4
#include "simd_avx512.h"
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 5
#include "simd_neon.h"
#else
#error "VISIONLLM_ISA must be scalar, avx2, avx512, avx512_bf16 or neon"
#endif

namespace visionllm::cpu::VISIONLLM_ISA {

VISIONLLM_INLINE F operator+(F a, F b) { return add(a, b); }
VISIONLLM_INLINE F operator-(F a, F b) { return sub(a, b); }
VISIONLLM_INLINE F operator*(F a, F b) { return mul(a, b); }

// The n < kWidth first elements through a buffer, for types and instruction sets without masked access.
template <typename T>
VISIONLLM_INLINE F load_partial(const T* p, int n) {
  T buffer[kWidth];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}

template <typename T>
VISIONLLM_INLINE void store_partial(T* p, F v, int n) {
  T buffer[kWidth];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// The first n elements, or a whole vector where there are more.
template <typename T>
VISIONLLM_INLINE F load_first(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_partial(p, static_cast<int>(n));
}

template <typename T>
VISIONLLM_INLINE void store_first(T* p, F v, int64_t n) {
  n >= kWidth ? store(p, v) : store_partial(p, v, static_cast<int>(n));
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
