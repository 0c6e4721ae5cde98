// CPU kernel of multi-scale deformable attention; compiled once per instruction set (simd.h).
//
//   output += attention * sampled,  for each of a head's L * P points
#include "cpu/ms_deform_attn_points.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// Adds one point's four corners to `sum`. Corners go to `kChains` separate sums so that the additions
// overlap.
template <int kVectors, int kChains, typename T>
VISIONLLM_INLINE void gather_point(const Points& points, int64_t p, const T* value, int64_t stride,
                                   F (&sum)[kChains][kVectors]) {
  for (int corner = 0; corner < kCorners; ++corner) {
    const T* row = one_address(value + points.row[corner * points.padded + p] * stride);
    const F weight = set(points.weight[corner * points.padded + p]);
    for (int i = 0; i < kVectors; ++i) {
      sum[corner % kChains][i] = mul_add(weight, load(row + i * kWidth), sum[corner % kChains][i]);
    }
  }
}

// output[0 .. kVectors * kWidth) for the located points; `value` points at the same channels of row 0.
template <int kVectors, bool kCopied, typename V, typename T>
VISIONLLM_INLINE void gather(const Points& points, const V* value, int64_t stride, T* output) {
  constexpr int kChains = kVectors >= 4 ? 2 : 4;
  F sum[kChains][kVectors];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < kVectors; ++i) sum[chain][i] = set(0.0f);
  }
  for (int64_t chunk = 0; chunk < points.padded / kPointChunk; ++chunk) {
    uint32_t valid = kCopied ? kAllValid : points.valid[chunk];
    const int64_t base = chunk * kPointChunk;
    if (valid == kAllValid) {
      for (int p = 0; p < kPointChunk; ++p) gather_point(points, base + p, value, stride, sum);
    } else {
      for (; valid != 0; valid &= valid - 1)
        gather_point(points, base + __builtin_ctz(valid), value, stride, sum);
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    F total = sum[0][i];
    for (int chain = 1; chain < kChains; ++chain) total = total + sum[chain][i];
    store(output + i * kWidth, total);
  }
}

// The last n < kWidth channels.
template <bool kCopied, typename V, typename T>
VISIONLLM_INLINE void gather_tail(const Points& points, const V* value, int64_t stride, T* output, int n) {
  F sum = set(0.0f);
  for (int64_t chunk = 0; chunk < points.padded / kPointChunk; ++chunk) {
    for (uint32_t valid = kCopied ? kAllValid : points.valid[chunk]; valid != 0; valid &= valid - 1) {
      const int64_t p = chunk * kPointChunk + __builtin_ctz(valid);
      for (int corner = 0; corner < kCorners; ++corner) {
        const V* row = value + points.row[corner * points.padded + p] * stride;
        sum = mul_add(set(points.weight[corner * points.padded + p]), load_partial(row, n), sum);
      }
    }
  }
  store_partial(output, sum, n);
}

// All channels of one (batch, query, head).
template <bool kCopied, typename V, typename T>
VISIONLLM_INLINE void gather_channels(const Points& points, const V* value, int64_t stride, T* output,
                                      int64_t channels) {
  int64_t d = 0;
  for (; d + 4 * kWidth <= channels; d += 4 * kWidth)
    gather<4, kCopied>(points, value + d, stride, output + d);
  if (d + 2 * kWidth <= channels) {
    gather<2, kCopied>(points, value + d, stride, output + d);
    d += 2 * kWidth;
  }
  if (d + kWidth <= channels) {
    gather<1, kCopied>(points, value + d, stride, output + d);
    d += kWidth;
  }
  if (d < channels)
    gather_tail<kCopied>(points, value + d, stride, output + d, static_cast<int>(channels - d));
}

template <typename T>
VISIONLLM_INLINE T* output_of(const MsDeformAttnParams& params, int64_t b, int64_t q, int64_t h) {
  return static_cast<T*>(params.output) + b * params.output_stride_b + q * params.output_stride_q +
         h * params.channels;
}

// Items (b * H + h) * Q + q: a head's rows are copied once.
template <bool kFused, typename T>
void forward_copied(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                    float* value_rows) {
  const Points points(workspace, params.padded_points);
  int64_t copied_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t q = item % params.queries;
    const int64_t head = item / params.queries;  // of B * H
    const int64_t h = head % params.heads;
    const int64_t b = head / params.heads;
    if (q + kPrefetchQueries < params.queries) prefetch(params, Place(params, b, q + kPrefetchQueries, h));
    if (head != copied_head) {
      copy_head(params, value_of<T>(params, b, h), value_rows);
      copied_head = head;
    }
    locate<false, true, kFused>(params, Place(params, b, q, h), points);
    gather_channels<true>(points, static_cast<const float*>(value_rows), params.channels,
                          output_of<T>(params, b, q, h), params.channels);
  }
}

// Items (b * Q + q) * H + h: a query's heads look at the same pixels, which lie side by side.
template <bool kFused, typename T>
void forward_in_place(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace) {
  const PointsTwice points(params, workspace);
  const auto start = [&](int64_t item) {
    const int64_t h = item % params.heads;
    const int64_t q = item / params.heads % params.queries;
    const int64_t b = item / params.heads / params.queries;
    locate<false, false, kFused>(params, Place(params, b, q, h), points[item]);
    prefetch_rows(points[item], value_of<T>(params, b, h), params.value_stride_s, params.channels);
  };
  if (begin < end) start(begin);
  for (int64_t item = begin; item < end; ++item) {
    if (item + 1 < end) start(item + 1);
    const int64_t h = item % params.heads;
    const int64_t q = item / params.heads % params.queries;
    const int64_t b = item / params.heads / params.queries;
    gather_channels<false>(points[item], value_of<T>(params, b, h), params.value_stride_s,
                           output_of<T>(params, b, q, h), params.channels);
  }
}

template <typename T>
void forward(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
             float* value_rows) {
  const bool fused = params.reference != nullptr;
  if (value_rows != nullptr) {
    fused ? forward_copied<true, T>(params, begin, end, workspace, value_rows)
          : forward_copied<false, T>(params, begin, end, workspace, value_rows);
  } else {
    fused ? forward_in_place<true, T>(params, begin, end, workspace)
          : forward_in_place<false, T>(params, begin, end, workspace);
  }
}

}  // namespace

void ms_deform_attn_kernel(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                           float* value_rows) {
  switch (params.element) {
    case Element::float32: return forward<float>(params, begin, end, workspace, value_rows);
    case Element::bfloat16: return forward<bfloat16>(params, begin, end, workspace, value_rows);
    default: return forward<float16>(params, begin, end, workspace, value_rows);
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
