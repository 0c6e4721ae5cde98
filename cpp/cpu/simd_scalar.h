// One lane in plain C; the definition that the other instruction sets follow. Included by simd.h.
#pragma once

namespace visionllm::cpu::scalar {

constexpr int kWidth = 1;

struct F {
  float v;
};
struct I {
  int32_t v;
};
struct M {
  bool v;
};

VISIONLLM_INLINE F set(float a) { return {a}; }
VISIONLLM_INLINE I set(int32_t a) { return {a}; }
VISIONLLM_INLINE F add(F a, F b) { return {a.v + b.v}; }
VISIONLLM_INLINE F sub(F a, F b) { return {a.v - b.v}; }
VISIONLLM_INLINE F mul(F a, F b) { return {a.v * b.v}; }
VISIONLLM_INLINE F mul_add(F a, F b, F c) { return {a.v * b.v + c.v}; }  // a * b + c
VISIONLLM_INLINE F floor(F a) { return {floorf(a.v)}; }
VISIONLLM_INLINE I to_int(F a) { return {static_cast<int32_t>(a.v)}; }  // a is whole and in range
VISIONLLM_INLINE I add(I a, I b) { return {a.v + b.v}; }
VISIONLLM_INLINE I mul(I a, I b) { return {a.v * b.v}; }  // the low 32 bits
VISIONLLM_INLINE I min(I a, I b) { return {a.v < b.v ? a.v : b.v}; }
VISIONLLM_INLINE I max(I a, I b) { return {a.v > b.v ? a.v : b.v}; }
VISIONLLM_INLINE M greater(F a, F b) { return {a.v > b.v}; }  // false where either is NaN
VISIONLLM_INLINE M both(M a, M b) { return {a.v && b.v}; }
VISIONLLM_INLINE F where(M m, F a) { return {m.v ? a.v : 0.0f}; }  // a where m, else +0
VISIONLLM_INLINE I where(M m, I a, I b) { return m.v ? a : b; }    // a where m, else b
VISIONLLM_INLINE F where(M m, F a, F b) { return m.v ? a : b; }
VISIONLLM_INLINE uint32_t bits(M m) { return m.v ? 1u : 0u; }  // lane i in bit i
VISIONLLM_INLINE M first(int n) { return {n > 0}; }            // lanes below n

VISIONLLM_INLINE F load(const float* p) { return {*p}; }
VISIONLLM_INLINE I load(const int32_t* p) { return {*p}; }
VISIONLLM_INLINE void store(float* p, F a) { *p = a.v; }
VISIONLLM_INLINE void store(int32_t* p, I a) { *p = a.v; }

VISIONLLM_INLINE F load(const bfloat16* p) {
  const uint32_t word = static_cast<uint32_t>(p->bits) << 16;
  F a;
  memcpy(&a.v, &word, 4);
  return a;
}

VISIONLLM_INLINE void store(bfloat16* p, F a) {
  uint32_t word;
  memcpy(&word, &a.v, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) {
    p->bits = static_cast<uint16_t>((word >> 16) | 0x40u);  // NaN stays NaN
  } else {
    p->bits = static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
}

VISIONLLM_INLINE F load(const float16* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t magnitude = p->bits & 0x7fffu;
  uint32_t word;
  if (magnitude >= 0x7c00u) {
    word = 0x7f800000u | ((magnitude & 0x3ffu) << 13);  // infinity, NaN
  } else if (magnitude >= 0x400u) {
    word = (magnitude << 13) + 0x38000000u;  // exponent bias 15 to 127
  } else {
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&word, &subnormal, 4);
  }
  word |= sign;
  F a;
  memcpy(&a.v, &word, 4);
  return a;
}

VISIONLLM_INLINE void store(float16* p, F a) {
  uint32_t word;
  memcpy(&word, &a.v, 4);
  const uint32_t sign = (word >> 16) & 0x8000u;
  word &= 0x7fffffffu;
  uint32_t half;
  if (word > 0x7f800000u) {
    half = 0x7e00u | ((word >> 13) & 0x3ffu);
  } else if (word >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (word >= 0x38800000u) {  // 2^-14, the smallest normal
    half = (word - 0x38000000u + 0xfffu + ((word >> 13) & 1u)) >> 13;
  } else {
    float magnitude;
    memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;  // ulp(0.5) = 2^-24 is the subnormal step: the addition rounds to it, to even
    uint32_t shifted;
    memcpy(&shifted, &magnitude, 4);
    half = shifted - 0x3f000000u;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

VISIONLLM_INLINE F load(const int8_t* p) { return {static_cast<float>(*p)}; }

// x and y of kWidth points stored as x0 y0 x1 y1 ...
VISIONLLM_INLINE void load_pairs(const float* p, F* x, F* y) {
  x->v = p[0];
  y->v = p[1];
}
VISIONLLM_INLINE void store_pairs(float* p, F x, F y) {
  p[0] = x.v;
  p[1] = y.v;
}

// Lane i of the result is the sum of the lanes of rows[i].
VISIONLLM_INLINE F sum_rows(const F* rows) { return rows[0]; }

// Over all lanes.
VISIONLLM_INLINE float sum_lanes(F a) { return a.v; }
VISIONLLM_INLINE float max_lanes(F a) { return a.v; }

// rows[i] lane j becomes rows[j] lane i, for kWidth rows.
VISIONLLM_INLINE void transpose(F*) {}

}  // namespace visionllm::cpu::scalar
