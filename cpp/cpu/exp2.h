// 2^x for softmax: scores are multiplied by log2(e) together with their other factors, so that the
// exponential needs no factor of its own. Included by kernel sources only, once per instruction set (simd.h).
#pragma once

#include "cpu/simd.h"

namespace visionllm::cpu::VISIONLLM_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// max(a, b): b where either is NaN. scale_by_power_of_two(a, n): a * 2^n for whole n in -126 .. 127; 0
// for n = -127, on AVX-512 for n = -151.
#if VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == VISIONLLM_ISA_NUMBER_scalar
VISIONLLM_INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
VISIONLLM_INLINE F scale_by_power_of_two(F a, F n) {
  const int32_t word =
      static_cast<int32_t>(static_cast<uint32_t>((n.v == n.v ? static_cast<int32_t>(n.v) : 0) + 127) << 23);
  float power;
  memcpy(&power, &word, 4);
  return {a.v * power};
}
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == VISIONLLM_ISA_NUMBER_avx2
VISIONLLM_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
VISIONLLM_INLINE F scale_by_power_of_two(F a, F n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == VISIONLLM_ISA_NUMBER_neon
VISIONLLM_INLINE F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
VISIONLLM_INLINE F scale_by_power_of_two(F a, F n) {
  const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)))};
}
#else  // AVX-512
VISIONLLM_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
VISIONLLM_INLINE F scale_by_power_of_two(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
#endif

// 2^x for x <= 127; 0 from x = -127 (AVX-512: -150, after numbers below 2^-126) downwards; NaN stays NaN. Relative error about 1e-7: the polynomial is the
// minimax one of degree 6 on -1/2 .. 1/2 (2e-9), the rest is rounding.
VISIONLLM_INLINE F exp2(F x) {
  x = max(set(kWidth == 16 ? -151.0f : -127.0f), x);
  const F whole = floor(x + set(0.5f));
  const F part = x - whole;
  F power = set(1.53473201e-4f);
  power = mul_add(power, part, set(1.34001545e-3f));
  power = mul_add(power, part, set(9.61848424e-3f));
  power = mul_add(power, part, set(5.55032808e-2f));
  power = mul_add(power, part, set(2.40226469e-1f));
  power = mul_add(power, part, set(6.93147206e-1f));
  power = mul_add(power, part, set(1.0f));
  return scale_by_power_of_two(power, whole);
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
