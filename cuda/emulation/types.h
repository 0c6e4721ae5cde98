// CUDA's vector and 16-bit floating-point types, with CUDA's names, for g++.
#pragma once

#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as on the GPU, so that a misaligned access of a vector fails here too.
#define VISIONLLM_VECTOR_TYPES(T, name)                                              \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

VISIONLLM_VECTOR_TYPES(float, float)
VISIONLLM_VECTOR_TYPES(double, double)
VISIONLLM_VECTOR_TYPES(int, int)
VISIONLLM_VECTOR_TYPES(signed char, char)
VISIONLLM_VECTOR_TYPES(unsigned char, uchar)
VISIONLLM_VECTOR_TYPES(short, short)
VISIONLLM_VECTOR_TYPES(unsigned short, ushort)
VISIONLLM_VECTOR_TYPES(long long, longlong)
VISIONLLM_VECTOR_TYPES(unsigned long long, ulonglong)
#undef VISIONLLM_VECTOR_TYPES

// uint3 is also the type of threadIdx, so this family is written out.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace visionllm::emulation {

inline std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float half_bits_to_float(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormal, exact
  return sign != 0 ? -magnitude : magnitude;
}

inline std::uint16_t float_to_half_bits(float x) {
  const std::uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;              // NaN, as the GPU's
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;     // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                           // below 2^-14: subnormal, in units of 2^-24
    const float scaled = bits_float(magnitude) * 0x1p24f;  // exact
    auto whole = static_cast<std::uint32_t>(scaled);
    const float rest = scaled - static_cast<float>(whole);
    if (rest > 0.5f || (rest == 0.5f && (whole & 1u) != 0)) ++whole;
    return static_cast<std::uint16_t>(sign | whole);
  }
  const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline float bfloat16_bits_to_float(std::uint16_t b) {
  return bits_float(static_cast<std::uint32_t>(b) << 16);
}

inline std::uint16_t float_to_bfloat16_bits(float x) {
  const std::uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace visionllm::emulation

// Arithmetic is that of the GPU: the exact result (float holds the product of two, double a fused sum) rounded
// once.
#define VISIONLLM_FLOAT16_TYPE(name, decode, encode)                                                    \
  struct alignas(2) name {                                                                              \
    std::uint16_t bits;                                                                                 \
    name() = default;                                                                                   \
    name(float x) : bits(::visionllm::emulation::encode(x)) {}                                          \
    name(double x) : bits(::visionllm::emulation::encode(static_cast<float>(x))) {}                     \
    name(int x) : bits(::visionllm::emulation::encode(static_cast<float>(x))) {}                        \
    operator float() const { return ::visionllm::emulation::decode(bits); }                             \
    name& operator+=(name other) { return *this = name(float(*this) + float(other)); }                  \
    name& operator-=(name other) { return *this = name(float(*this) - float(other)); }                  \
    name& operator*=(name other) { return *this = name(float(*this) * float(other)); }                  \
  };                                                                                                    \
  inline name operator+(name a, name b) { return a += b; }                                              \
  inline name operator-(name a, name b) { return a -= b; }                                              \
  inline name operator*(name a, name b) { return a *= b; }                                              \
  inline name operator/(name a, name b) { return name(float(a) / float(b)); }                           \
  inline name operator-(name a) {                                                                       \
    a.bits ^= 0x8000u;                                                                                  \
    return a;                                                                                           \
  }                                                                                                     \
  inline bool operator==(name a, name b) { return float(a) == float(b); }                               \
  inline bool operator!=(name a, name b) { return float(a) != float(b); }                               \
  inline bool operator<(name a, name b) { return float(a) < float(b); }                                 \
  inline bool operator>(name a, name b) { return float(a) > float(b); }                                 \
  inline bool operator<=(name a, name b) { return float(a) <= float(b); }                               \
  inline bool operator>=(name a, name b) { return float(a) >= float(b); }                               \
  inline name __hadd(name a, name b) { return a + b; }                                                  \
  inline name __hsub(name a, name b) { return a - b; }                                                  \
  inline name __hmul(name a, name b) { return a * b; }                                                  \
  inline name __hdiv(name a, name b) { return a / b; }                                                  \
  inline name __hneg(name a) { return -a; }                                                             \
  inline name __habs(name a) {                                                                          \
    a.bits &= 0x7fffu;                                                                                  \
    return a;                                                                                           \
  }                                                                                                     \
  inline name __hfma(name a, name b, name c) { return name(float(double(a) * double(b) + double(c))); } \
  inline name __hmax(name a, name b) { return float(a) != float(a) || float(a) < float(b) ? b : a; }    \
  inline name __hmin(name a, name b) { return float(a) != float(a) || float(b) < float(a) ? b : a; }    \
  inline bool __hisnan(name a) { return float(a) != float(a); }                                         \
  inline bool __heq(name a, name b) { return a == b; }                                                  \
  inline bool __hgt(name a, name b) { return a > b; }                                                   \
  inline bool __hlt(name a, name b) { return a < b; }                                                   \
  struct alignas(4) name##2 {                                                                           \
    name x, y;                                                                                          \
    name##2() = default;                                                                                \
    name##2(name x, name y) : x(x), y(y) {}                                                             \
  };                                                                                                    \
  inline name##2 __hadd2(name##2 a, name##2 b) { return {a.x + b.x, a.y + b.y}; }                       \
  inline name##2 __hsub2(name##2 a, name##2 b) { return {a.x - b.x, a.y - b.y}; }                       \
  inline name##2 __hmul2(name##2 a, name##2 b) { return {a.x * b.x, a.y * b.y}; }                       \
  inline name##2 __hfma2(name##2 a, name##2 b, name##2 c) {                                             \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                              \
  }                                                                                                     \
  inline name##2 __hmax2(name##2 a, name##2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }         \
  inline name##2 __hmin2(name##2 a, name##2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }         \
  inline float __low2float(name##2 a) { return a.x; }                                                   \
  inline float __high2float(name##2 a) { return a.y; }

VISIONLLM_FLOAT16_TYPE(__half, half_bits_to_float, float_to_half_bits)
VISIONLLM_FLOAT16_TYPE(__nv_bfloat16, bfloat16_bits_to_float, float_to_bfloat16_bits)
#undef VISIONLLM_FLOAT16_TYPE

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return {x}; }
inline __half __float2half_rn(float x) { return {x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
