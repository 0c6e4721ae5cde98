// CPU kernel of the backward pass of multi-scale deformable attention; compiled once per instruction set (simd.h).
//
// With dot_c = <grad_output, v_c> for each corner c:
//   grad_v_c       += weight_c * grad_output
//   grad_attention  = sum_c bilinear_c * dot_c
//   grad_x          = attention * width  * ((1-fy)(dot_01 - dot_00) + fy (dot_11 - dot_10));  grad_y alike
//
// and fused, with the slope of the location by the offset,
//   grad_logit      = attention * (grad_attention - sum over points of attention * grad_attention)
//   grad_offset     = grad * slope
#include "cpu/ms_deform_attn_points.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

VISIONLLM_INLINE void store_attention(void* p, int64_t i, Element element, F v, int n) {
  switch (element) {
    case Element::bfloat16: store_partial(static_cast<bfloat16*>(p) + i, v, n); break;
    case Element::float16: store_partial(static_cast<float16*>(p) + i, v, n); break;
    default: store_partial(static_cast<float*>(p) + i, v, n); break;
  }
}

template <typename T>
VISIONLLM_INLINE const T* grad_output_of(const MsDeformAttnParams& params, int64_t b, int64_t q, int64_t h) {
  return static_cast<const T*>(params.grad_output) + b * params.grad_output_stride_b +
         q * params.grad_output_stride_q + h * params.channels;
}

// Where one head begins in the contiguous grad_value [B, S, H, D].
template <typename T>
VISIONLLM_INLINE T* grad_value_of(const MsDeformAttnParams& params, int64_t b, int64_t h) {
  return static_cast<T*>(params.grad_value) + (b * params.pixels * params.heads + h) * params.channels;
}

// For kWidth points from p on: points.dot += <grad, row> and grad_value row += weight * grad, for each corner
// and the channels of `grad`. `tail` is the number of channels where there are fewer than a vector of them.
template <int kVectors, bool kTail, typename V>
VISIONLLM_INLINE void scatter_points(const Points& points, int64_t p, uint32_t valid, const V* value,
                                     int64_t stride, const F (&grad)[kVectors], float* grad_value,
                                     int64_t grad_stride, int tail, bool first) {
  for (int corner = 0; corner < kCorners; ++corner) {
    F product[kWidth];
    const int32_t* rows = points.row + corner * points.padded + p;
    const float* weights = points.weight + corner * points.padded + p;
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth; ++lane) {
      product[lane] = set(0.0f);
      if (!(valid >> lane & 1u)) continue;
      const V* row = one_address(value + rows[lane] * stride);
      float* grad_row = one_address(grad_value + rows[lane] * grad_stride);
      const F weight = set(weights[lane]);
      if (kTail) {
        product[lane] = grad[0] * load_partial(row, tail);
        store_partial(grad_row, mul_add(weight, grad[0], load_partial(grad_row, tail)), tail);
        continue;
      }
      product[lane] = grad[0] * load(row);
      for (int i = 1; i < kVectors; ++i)
        product[lane] = mul_add(grad[i], load(row + i * kWidth), product[lane]);
      for (int i = 0; i < kVectors; ++i) {
        store(grad_row + i * kWidth, mul_add(weight, grad[i], load(grad_row + i * kWidth)));
      }
    }
    float* dot = points.dot + corner * points.padded + p;
    const F sum = sum_rows(product);
    store(dot, first ? sum : load(dot) + sum);
  }
}

template <int kVectors, bool kTail, bool kCopied, typename V, typename T>
VISIONLLM_INLINE void scatter(const Points& points, const V* value, int64_t stride, const T* grad_output,
                              float* grad_value, int64_t grad_stride, bool first, int tail = 0) {
  constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kWidth) - 1u);
  F grad[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    grad[i] = kTail ? load_partial(grad_output, tail) : load(grad_output + i * kWidth);
  }
  for (int64_t p = 0; p < points.padded; p += kWidth) {
    const uint32_t valid =
        kCopied ? kAllLanes : points.valid[p / kPointChunk] >> (p % kPointChunk) & kAllLanes;
    if (valid == kAllLanes) {  // a constant mask lets the compiler drop the tests
      scatter_points<kVectors, kTail>(points, p, kAllLanes, value, stride, grad, grad_value, grad_stride,
                                      tail, first);
    } else if (valid != 0 || first) {
      scatter_points<kVectors, kTail>(points, p, valid, value, stride, grad, grad_value, grad_stride, tail,
                                      first);
    }
  }
}

// Gradients of locations and attention weights (fused: offsets and logits) from the dot products.
template <bool kFused>
VISIONLLM_INLINE void finish_points(const MsDeformAttnParams& params, const Place& place,
                                    const Points& points, int64_t item) {
  const F zero = set(0.0f), one = set(1.0f);
  F expectation = zero;
  for (int p = 0; p < params.points; p += kWidth) {
    const int n = params.points - p < kWidth ? params.points - p : kWidth;
    const F in_x0 = load(points.inside_x0 + p), in_x1 = load(points.inside_x1 + p);
    const F in_y0 = load(points.inside_y0 + p), in_y1 = load(points.inside_y1 + p);
    const F fx = load(points.fx + p), fy = load(points.fy + p);
    const F attention = load(points.attention + p);
    // A corner outside was given its neighbour's row: its product is dropped, not multiplied by 0, so that
    // NaN stays there.
    const F dot00 = where(greater(in_x0 * in_y0, zero), load(points.dot + p));
    const F dot01 = where(greater(in_x1 * in_y0, zero), load(points.dot + points.padded + p));
    const F dot10 = where(greater(in_x0 * in_y1, zero), load(points.dot + 2 * points.padded + p));
    const F dot11 = where(greater(in_x1 * in_y1, zero), load(points.dot + 3 * points.padded + p));
    const F gx = one - fx, gy = one - fy;
    const M valid = greater(in_x0 + in_x1, zero);  // a valid point has a column inside
    const F grad_attention = where(valid, gy * (gx * dot00 + fx * dot01) + fy * (gx * dot10 + fx * dot11));
    F grad_x = attention * (gy * (dot01 - dot00) + fy * (dot11 - dot10));
    F grad_y = attention * (gx * (dot10 - dot00) + fx * (dot11 - dot01));
    // With points as references, offsets are in pixels.
    if (!kFused || params.reference_size == 4 || params.by_location) {
      grad_x = grad_x * load(params.level_width + p);
      grad_y = grad_y * load(params.level_height + p);
    }
    if (kFused && params.reference_size == 4 && !params.by_location) {
      const F share = set(params.half_over_points);
      grad_x = grad_x * (reference_of(params, place.reference, 2, p) * share);
      grad_y = grad_y * (reference_of(params, place.reference, 3, p) * share);
    }
    grad_x = where(valid, grad_x), grad_y = where(valid, grad_y);
    if (kFused) {
      store(points.dot + p, grad_attention);
      expectation = expectation + where(first(n), attention * grad_attention);
    } else {
      store_attention(params.grad_attention, item * params.points + p, params.attention_element,
                      grad_attention, n);
    }
    float* grad_locations = params.grad_locations + (item * params.points + p) * 2;
    if (n == kWidth) {
      store_pairs(grad_locations, grad_x, grad_y);
    } else {
      float pairs[2 * kWidth];
      store_pairs(pairs, grad_x, grad_y);
      memcpy(grad_locations, pairs, static_cast<size_t>(n) * 2 * sizeof(float));
    }
  }
  if (!kFused) return;
  const F total = set(sum_lanes(expectation));
  for (int p = 0; p < params.points; p += kWidth) {
    const int n = params.points - p < kWidth ? params.points - p : kWidth;
    store_attention(params.grad_attention, item * params.points + p, params.attention_element,
                    load(points.attention + p) * (load(points.dot + p) - total), n);
  }
}

// All channels of one (batch, query, head).
template <bool kCopied, typename V, typename T>
VISIONLLM_INLINE void scatter_channels(const Points& points, const V* value, int64_t stride,
                                       const T* grad_output, float* grad_value, int64_t grad_stride,
                                       int64_t channels) {
  int64_t d = 0;
  for (; d + 4 * kWidth <= channels; d += 4 * kWidth) {
    scatter<4, false, kCopied>(points, value + d, stride, grad_output + d, grad_value + d, grad_stride,
                               d == 0);
  }
  if (d + 2 * kWidth <= channels) {
    scatter<2, false, kCopied>(points, value + d, stride, grad_output + d, grad_value + d, grad_stride,
                               d == 0);
    d += 2 * kWidth;
  }
  if (d + kWidth <= channels) {
    scatter<1, false, kCopied>(points, value + d, stride, grad_output + d, grad_value + d, grad_stride,
                               d == 0);
    d += kWidth;
  }
  if (d < channels) {
    scatter<1, true, kCopied>(points, value + d, stride, grad_output + d, grad_value + d, grad_stride, d == 0,
                              static_cast<int>(channels - d));
  }
}

// One head after the other, in copies.
template <bool kFused, typename T>
void backward_copied(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                     float* value_rows, float* grad_rows) {
  const Points points(workspace, params.padded_points);
  const int64_t pixels = params.pixels, channels = params.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / params.heads, h = item % params.heads;
    copy_head(params, value_of<T>(params, b, h), value_rows);
    memset(grad_rows, 0, static_cast<size_t>((pixels + 1) * channels) * sizeof(float));
    for (int64_t q = 0; q < params.queries; ++q) {
      if (q + kPrefetchQueries < params.queries) {
        prefetch(params, Place(params, b, q + kPrefetchQueries, h));
        prefetch(grad_output_of<T>(params, b, q + kPrefetchQueries, h),
                 channels * static_cast<int64_t>(sizeof(T)));
      }
      const Place place(params, b, q, h);
      locate<true, true, kFused>(params, place, points);
      scatter_channels<true>(points, static_cast<const float*>(value_rows), channels,
                             grad_output_of<T>(params, b, q, h), grad_rows, channels, channels);
      finish_points<kFused>(params, place, points, (b * params.queries + q) * params.heads + h);
    }
    copy_rows(grad_rows, channels, grad_value_of<T>(params, b, h), params.heads * channels, pixels, channels);
  }
}

// One head after the other, in copies of the rows that are looked at, each made when it is first met. slots has
// the number of every pixel's copy, or -1, and behind that the pixel of every copy; copy 0 is the row of zeros.
template <bool kFused, typename T>
void backward_met_rows(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                       float* value_rows, float* grad_rows, int32_t* slots) {
  const PointsTwice points(params, workspace);
  const int64_t pixels = params.pixels, channels = params.channels, grad_stride = params.heads * channels;
  const size_t row_bytes = static_cast<size_t>(channels) * sizeof(float);
  int32_t* const met = slots + pixels + 1;
  memset(slots, -1, static_cast<size_t>(pixels) * sizeof(int32_t));
  slots[pixels] = 0;
  memset(value_rows, 0, row_bytes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / params.heads, h = item % params.heads;
    const T* const value = value_of<T>(params, b, h);
    memset(grad_rows, 0, row_bytes);
    int32_t count = 1;
    const auto start = [&](int64_t q) {
      locate<true, true, kFused>(params, Place(params, b, q, h), points[q]);
      prefetch_rows(points[q], value, params.value_stride_s, channels);
      prefetch(grad_output_of<T>(params, b, q, h), channels * static_cast<int64_t>(sizeof(T)));
    };
    start(0);
    for (int64_t q = 0; q < params.queries; ++q) {
      if (q + kPrefetchQueries < params.queries) prefetch(params, Place(params, b, q + kPrefetchQueries, h));
      if (q + 1 < params.queries) start(q + 1);
      const Points& here = points[q];
      for (int64_t i = 0; i < kCorners * here.padded; ++i) {
        const int32_t row = here.row[i];
        if (slots[row] < 0) {
          copy_rows(value + row * params.value_stride_s, 0, value_rows + count * channels, 0, 1, channels);
          memset(grad_rows + count * channels, 0, row_bytes);
          met[count] = row;
          slots[row] = count++;
        }
        here.row[i] = slots[row];
      }
      scatter_channels<true>(here, static_cast<const float*>(value_rows), channels,
                             grad_output_of<T>(params, b, q, h), grad_rows, channels, channels);
      finish_points<kFused>(params, Place(params, b, q, h), here,
                            (b * params.queries + q) * params.heads + h);
    }
    T* const grad_value = grad_value_of<T>(params, b, h);
    for (int32_t i = 1; i < count; ++i) {
      copy_rows(static_cast<const float*>(grad_rows) + i * channels, 0, grad_value + met[i] * grad_stride, 0,
                1, channels);
      slots[met[i]] = -1;
    }
  }
}

// All heads of [begin, end) that a picture has, query by query: they look at the same pixels, which lie side
// by side. Each head still sums in the order of the queries, so that the result does not depend on who does
// which heads.
template <bool kFused>
void backward_in_place(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace) {
  const PointsTwice points(params, workspace);
  const int64_t grad_stride = params.heads * params.channels;
  for (int64_t b = begin / params.heads; b * params.heads < end; ++b) {
    const int64_t first = begin > b * params.heads ? begin - b * params.heads : 0;
    const int64_t last = end < (b + 1) * params.heads ? end - b * params.heads : params.heads;
    const int64_t heads = last - first, items = heads * params.queries;
    const auto start = [&](int64_t item) {
      const int64_t q = item / heads, h = first + item % heads;
      locate<true, false, kFused>(params, Place(params, b, q, h), points[item]);
      prefetch_rows(points[item], value_of<float>(params, b, h), params.value_stride_s, params.channels);
      prefetch_rows(points[item], grad_value_of<float>(params, b, h), grad_stride, params.channels);
    };
    start(0);
    for (int64_t item = 0; item < items; ++item) {
      if (item + 1 < items) start(item + 1);
      const int64_t q = item / heads, h = first + item % heads;
      scatter_channels<false>(points[item], value_of<float>(params, b, h), params.value_stride_s,
                              grad_output_of<float>(params, b, q, h), grad_value_of<float>(params, b, h),
                              grad_stride, params.channels);
      finish_points<kFused>(params, Place(params, b, q, h), points[item],
                            (b * params.queries + q) * params.heads + h);
    }
  }
}

template <bool kFused, typename T>
void backward_in_copies(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                        float* value_rows, float* grad_rows, int32_t* slots) {
  if (slots == nullptr) {
    return backward_copied<kFused, T>(params, begin, end, workspace, value_rows, grad_rows);
  }
  backward_met_rows<kFused, T>(params, begin, end, workspace, value_rows, grad_rows, slots);
}

template <bool kFused>
void backward(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
              float* value_rows, float* grad_rows, int32_t* slots) {
  if (value_rows == nullptr) return backward_in_place<kFused>(params, begin, end, workspace);
  switch (params.element) {
    case Element::float32:
      return backward_copied<kFused, float>(params, begin, end, workspace, value_rows, grad_rows);
    case Element::bfloat16:
      return backward_in_copies<kFused, bfloat16>(params, begin, end, workspace, value_rows, grad_rows,
                                                  slots);
    default:
      return backward_in_copies<kFused, float16>(params, begin, end, workspace, value_rows, grad_rows, slots);
  }
}

}  // namespace

void ms_deform_attn_backward_kernel(const MsDeformAttnParams& params, int64_t begin, int64_t end,
                                    void* workspace, float* value_rows, float* grad_rows, int32_t* slots) {
  params.reference != nullptr ? backward<true>(params, begin, end, workspace, value_rows, grad_rows, slots)
                              : backward<false>(params, begin, end, workspace, value_rows, grad_rows, slots);
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
