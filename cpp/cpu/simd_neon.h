// Four lanes: Advanced SIMD of AArch64. Included by simd.h; see simd_scalar.h for the meaning of each
// function.
#pragma once

#include <arm_neon.h>

namespace visionllm::cpu::neon {

constexpr int kWidth = 4;

struct F {
  float32x4_t v;
};
struct I {
  int32x4_t v;
};
struct M {
  uint32x4_t v;  // all bits of a lane alike
};

VISIONLLM_INLINE F set(float a) { return {vdupq_n_f32(a)}; }
VISIONLLM_INLINE I set(int32_t a) { return {vdupq_n_s32(a)}; }
VISIONLLM_INLINE F add(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
VISIONLLM_INLINE F sub(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
VISIONLLM_INLINE F mul(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
VISIONLLM_INLINE F mul_add(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
VISIONLLM_INLINE F floor(F a) { return {vrndmq_f32(a.v)}; }
VISIONLLM_INLINE I to_int(F a) { return {vcvtq_s32_f32(a.v)}; }
VISIONLLM_INLINE I add(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
VISIONLLM_INLINE I mul(I a, I b) { return {vmulq_s32(a.v, b.v)}; }
VISIONLLM_INLINE I min(I a, I b) { return {vminq_s32(a.v, b.v)}; }
VISIONLLM_INLINE I max(I a, I b) { return {vmaxq_s32(a.v, b.v)}; }
VISIONLLM_INLINE M greater(F a, F b) { return {vcgtq_f32(a.v, b.v)}; }
VISIONLLM_INLINE M both(M a, M b) { return {vandq_u32(a.v, b.v)}; }
VISIONLLM_INLINE F where(M m, F a) {
  return {vreinterpretq_f32_u32(vandq_u32(m.v, vreinterpretq_u32_f32(a.v)))};
}
VISIONLLM_INLINE I where(M m, I a, I b) { return {vbslq_s32(m.v, a.v, b.v)}; }
VISIONLLM_INLINE F where(M m, F a, F b) { return {vbslq_f32(m.v, a.v, b.v)}; }
VISIONLLM_INLINE uint32_t bits(M m) {
  const uint32x4_t weight = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m.v, weight));
}
VISIONLLM_INLINE M first(int n) {
  const int32x4_t lane = {0, 1, 2, 3};
  return {vcgtq_s32(vdupq_n_s32(n), lane)};
}

VISIONLLM_INLINE F load(const float* p) { return {vld1q_f32(p)}; }
VISIONLLM_INLINE I load(const int32_t* p) { return {vld1q_s32(p)}; }
VISIONLLM_INLINE void store(float* p, F a) { vst1q_f32(p, a.v); }
VISIONLLM_INLINE void store(int32_t* p, I a) { vst1q_s32(p, a.v); }

VISIONLLM_INLINE F load(const bfloat16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
}

VISIONLLM_INLINE void store(bfloat16* p, F a) {
  const uint32x4_t word = vreinterpretq_u32_f32(a.v);
  const uint32x4_t top = vshrq_n_u32(word, 16);
  const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd), 16);
  const uint32x4_t quiet = vorrq_u32(top, vdupq_n_u32(0x40));
  vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet)));
}

VISIONLLM_INLINE F load(const float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
VISIONLLM_INLINE void store(float16* p, F a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }

VISIONLLM_INLINE F load(const int8_t* p) {
  int32_t bytes;
  memcpy(&bytes, p, 4);
  const int16x8_t words = vmovl_s8(vcreate_s8(static_cast<uint32_t>(bytes)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))};
}

VISIONLLM_INLINE void load_pairs(const float* p, F* x, F* y) {
  const float32x4x2_t pairs = vld2q_f32(p);
  x->v = pairs.val[0];
  y->v = pairs.val[1];
}
VISIONLLM_INLINE void store_pairs(float* p, F x, F y) {
  const float32x4x2_t pairs = {{x.v, y.v}};
  vst2q_f32(p, pairs);
}

VISIONLLM_INLINE F sum_rows(const F* rows) {
  return {vpaddq_f32(vpaddq_f32(rows[0].v, rows[1].v), vpaddq_f32(rows[2].v, rows[3].v))};
}

VISIONLLM_INLINE void transpose(F* rows) {
  const float32x4x2_t low = vtrnq_f32(rows[0].v, rows[1].v), high = vtrnq_f32(rows[2].v, rows[3].v);
  rows[0].v = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
  rows[1].v = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
  rows[2].v = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
  rows[3].v = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
}

VISIONLLM_INLINE float sum_lanes(F a) { return vaddvq_f32(a.v); }
VISIONLLM_INLINE float max_lanes(F a) { return vmaxvq_f32(a.v); }

}  // namespace visionllm::cpu::neon
