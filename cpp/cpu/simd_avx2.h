// Eight lanes: AVX2 with FMA and F16C. Included by simd.h; see simd_scalar.h for the meaning of each
// function.
#pragma once

#include <immintrin.h>

namespace visionllm::cpu::avx2 {

constexpr int kWidth = 8;

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};
struct M {
  __m256 v;  // all bits of a lane alike
};

VISIONLLM_INLINE F set(float a) { return {_mm256_set1_ps(a)}; }
VISIONLLM_INLINE I set(int32_t a) { return {_mm256_set1_epi32(a)}; }
VISIONLLM_INLINE F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
VISIONLLM_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
VISIONLLM_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
VISIONLLM_INLINE F mul_add(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
VISIONLLM_INLINE F floor(F a) { return {_mm256_floor_ps(a.v)}; }
VISIONLLM_INLINE I to_int(F a) { return {_mm256_cvttps_epi32(a.v)}; }
VISIONLLM_INLINE I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I mul(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I min(I a, I b) { return {_mm256_min_epi32(a.v, b.v)}; }
VISIONLLM_INLINE I max(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
VISIONLLM_INLINE M greater(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
VISIONLLM_INLINE M both(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
VISIONLLM_INLINE F where(M m, F a) { return {_mm256_and_ps(m.v, a.v)}; }
VISIONLLM_INLINE I where(M m, I a, I b) { return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))}; }
VISIONLLM_INLINE F where(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
VISIONLLM_INLINE uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
VISIONLLM_INLINE M first(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}

VISIONLLM_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
VISIONLLM_INLINE I load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
VISIONLLM_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
VISIONLLM_INLINE void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }

VISIONLLM_INLINE F load(const bfloat16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
}

VISIONLLM_INLINE void store(bfloat16* p, F a) {
  const __m256i word = _mm256_castps_si256(a.v);
  const __m256i top = _mm256_srli_epi32(word, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i half = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

VISIONLLM_INLINE F load(const float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

VISIONLLM_INLINE void store(float16* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

VISIONLLM_INLINE F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

VISIONLLM_INLINE __m256 even_order(__m256 v) {  // 64-bit blocks 0 2 1 3
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

VISIONLLM_INLINE void load_pairs(const float* p, F* x, F* y) {
  const __m256 low = _mm256_loadu_ps(p);
  const __m256 high = _mm256_loadu_ps(p + 8);
  x->v = even_order(_mm256_shuffle_ps(low, high, 0x88));
  y->v = even_order(_mm256_shuffle_ps(low, high, 0xdd));
}

VISIONLLM_INLINE void store_pairs(float* p, F x, F y) {
  const __m256 low = _mm256_unpacklo_ps(x.v, y.v);
  const __m256 high = _mm256_unpackhi_ps(x.v, y.v);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

// The sums over each 128-bit lane of four rows, in row order within the lane.
VISIONLLM_INLINE __m256 sum_four_rows(const F* rows) {
  return _mm256_hadd_ps(_mm256_hadd_ps(rows[0].v, rows[1].v), _mm256_hadd_ps(rows[2].v, rows[3].v));
}

VISIONLLM_INLINE F sum_rows(const F* rows) {
  const __m256 low = sum_four_rows(rows), high = sum_four_rows(rows + 4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}

VISIONLLM_INLINE void transpose(F* rows) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 4) {  // 4 x 4 blocks: a[i + j] has column 4 * block + j of rows i .. i + 3
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i].v, rows[i + 1].v));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i].v, rows[i + 1].v));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v));
    a[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    a[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    a[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    a[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(a[j], a[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(a[j], a[4 + j], 0x31);
  }
}

VISIONLLM_INLINE float sum_lanes(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

VISIONLLM_INLINE float max_lanes(F a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace visionllm::cpu::avx2
