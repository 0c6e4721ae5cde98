// Sixteen lanes: AVX-512 F, BW, DQ, VL with FMA and F16C, and for avx512_bf16 its dot products and conversion
// of bfloat16. Included by simd.h; see simd_scalar.h for the meaning of each function.
#pragma once

#include <immintrin.h>

namespace visionllm::cpu::VISIONLLM_ISA {

constexpr int kWidth = 16;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct M {
  __mmask16 v;
};

VISIONLLM_INLINE F set(float a) { return {_mm512_set1_ps(a)}; }
VISIONLLM_INLINE I set(int32_t a) { return {_mm512_set1_epi32(a)}; }
VISIONLLM_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
VISIONLLM_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
VISIONLLM_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
VISIONLLM_INLINE F mul_add(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VISIONLLM_INLINE F floor(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
VISIONLLM_INLINE I to_int(F a) { return {_mm512_cvttps_epi32(a.v)}; }
VISIONLLM_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I mul(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I min(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
VISIONLLM_INLINE M greater(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
VISIONLLM_INLINE M both(M a, M b) { return {static_cast<__mmask16>(a.v & b.v)}; }
VISIONLLM_INLINE F where(M m, F a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }
VISIONLLM_INLINE I where(M m, I a, I b) { return {_mm512_mask_mov_epi32(b.v, m.v, a.v)}; }
VISIONLLM_INLINE F where(M m, F a, F b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
VISIONLLM_INLINE uint32_t bits(M m) { return m.v; }
VISIONLLM_INLINE M first(int n) { return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u)}; }

VISIONLLM_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
VISIONLLM_INLINE I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
VISIONLLM_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
VISIONLLM_INLINE void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }

VISIONLLM_INLINE F load(const bfloat16* p) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}

#ifdef __AVX512BF16__
// acc + low(a) * low(b) + high(a) * high(b), where a and b have two bfloat16 in each lane.
VISIONLLM_INLINE F dot_bfloat16(F acc, I a, I b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// Lane i has the bfloat16 low[i] and, in the upper half, high[i]; both are exact as bfloat16.
VISIONLLM_INLINE I pair_bfloat16(F low, F high) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(high.v), _mm512_set1_epi32(-65536));
  return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16), upper)};
}

// Rounds to nearest even as the code below; numbers under 2^-126 become 0.
VISIONLLM_INLINE void store(bfloat16* p, F a) {
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  memcpy(p, &rounded, sizeof rounded);
}
#else
VISIONLLM_INLINE void store(bfloat16* p, F a) {
  const __m512i word = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(word, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
#endif

VISIONLLM_INLINE F load(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

VISIONLLM_INLINE void store(float16* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

VISIONLLM_INLINE F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

VISIONLLM_INLINE void load_pairs(const float* p, F* x, F* y) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 low = _mm512_loadu_ps(p);
  const __m512 high = _mm512_loadu_ps(p + 16);
  x->v = _mm512_permutex2var_ps(low, even, high);
  y->v = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

VISIONLLM_INLINE void store_pairs(float* p, F x, F y) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(x.v, low, y.v));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(x.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), y.v));
}

// The sums over each 128-bit lane of four rows, in row order within the lane.
VISIONLLM_INLINE __m512 sum_four_rows(const F* rows) {
  const __m512 low =
      _mm512_add_ps(_mm512_unpacklo_ps(rows[0].v, rows[1].v), _mm512_unpackhi_ps(rows[0].v, rows[1].v));
  const __m512 high =
      _mm512_add_ps(_mm512_unpacklo_ps(rows[2].v, rows[3].v), _mm512_unpackhi_ps(rows[2].v, rows[3].v));
  const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

VISIONLLM_INLINE F sum_rows(const F* rows) {
  const __m512 u0 = sum_four_rows(rows), u1 = sum_four_rows(rows + 4);
  const __m512 u2 = sum_four_rows(rows + 8), u3 = sum_four_rows(rows + 12);
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u0, u1, 0x44), _mm512_shuffle_f32x4(u0, u1, 0xee));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u2, u3, 0x44), _mm512_shuffle_f32x4(u2, u3, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
}

VISIONLLM_INLINE F load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n).v, p)}; }
VISIONLLM_INLINE void store_partial(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n).v, a.v); }

VISIONLLM_INLINE F load_partial(const bfloat16* p, int n) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n).v, p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}

VISIONLLM_INLINE F load_partial(const float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n).v, p))};
}

VISIONLLM_INLINE void transpose(F* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks: b[i + j] has column 4 * block + j of rows i .. i + 3
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    a[i + 2] = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    a[i + 3] = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {  // and the 4 x 4 blocks among themselves
    const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[4 + j].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}

VISIONLLM_INLINE float sum_lanes(F a) { return _mm512_reduce_add_ps(a.v); }
VISIONLLM_INLINE float max_lanes(F a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace visionllm::cpu::VISIONLLM_ISA
