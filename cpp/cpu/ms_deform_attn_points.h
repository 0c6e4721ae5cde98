// What the forward and backward kernels of multi-scale deformable attention share: points to corners and weights, and the ways
// to a head's rows. Included by the kernel sources only, once per instruction set (simd.h).
//
//   pixel = location * size - 0.5,  cell = floor(pixel),  f = pixel - cell
//   sampled = (1-fy)(1-fx) v[y0,x0] + (1-fy) fx v[y0,x1] + fy (1-fx) v[y1,x0] + fy fx v[y1,x1]
//
// Fused, with a reference point (x, y) or box (x, y, w, h) of the query and the point's level:
//
//   location = reference.xy + offset / size,   or reference.xy + offset / P * reference.wh / 2
//   attention = softmax over the points of their logits
//
// For one (batch, query, head) the lanes run over points while the cells and weights are computed, then over channels while
// rows of value are gathered. A corner outside the image gets weight zero and the row number of the corner beside it, which
// is inside: no branch, and no memory is read that the formula does not name.
//
// Where a head has many more gathers than pixels, its rows are first copied together, in float, with a row of zeros behind
// them: the copy is dense in the caches, and points that contribute nothing read (and, backward, write) the extra row, so
// that the inner loops have no tests. Otherwise the rows are used where they lie and such points are skipped.
#pragma once

#include "cpu/exp2.h"
#include "cpu/ms_deform_attn.h"
#include "cpu/simd.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// Makes the compiler keep one address for a row: left alone, GCC computes another for each vector of it.
template <typename T>
VISIONLLM_INLINE T* one_address(T* row) {
  asm("" : "+r"(row));
  return row;
}

constexpr int kCorners = 4;  // (y0, x0), (y0, x1), (y1, x0), (y1, x1)

// Slices of the workspace, all [padded_points], arrays of corners [kCorners][padded_points].
struct Points {
  int64_t padded;
  int32_t* row;   // row number in S of each corner
  float* weight;  // attention * bilinear weight of each corner
  // Backward:
  float* dot;  // <grad_output, value row> of each corner
  float* attention;
  float* fx;  // place in the cell, 0 .. 1
  float* fy;
  float* inside_x0;  // 1 where that column or row of the cell is inside the image, else 0; all 0 for an
                     // invalid point
  float* inside_x1;
  float* inside_y0;
  float* inside_y1;
  uint32_t* valid;  // [padded_points / kPointChunk], bit p: the point must be visited

  Points(void* workspace, int64_t n) : padded(n) {
    row = static_cast<int32_t*>(workspace);
    weight = reinterpret_cast<float*>(row + kCorners * n);
    dot = weight + kCorners * n;
    attention = dot + kCorners * n;
    fx = attention + n;
    fy = fx + n;
    inside_x0 = fy + n;
    inside_x1 = inside_x0 + n;
    inside_y0 = inside_x1 + n;
    inside_y1 = inside_y0 + n;
    valid = reinterpret_cast<uint32_t*>(inside_y1 + n);
  }
};

VISIONLLM_INLINE F load_attention(const void* p, int64_t i, Element element, int n) {
  switch (element) {
    case Element::bfloat16: {
      const bfloat16* q = static_cast<const bfloat16*>(p) + i;
      return n == kWidth ? load(q) : load_partial(q, n);
    }
    case Element::float16: {
      const float16* q = static_cast<const float16*>(p) + i;
      return n == kWidth ? load(q) : load_partial(q, n);
    }
    default: {
      const float* q = static_cast<const float*>(p) + i;
      return n == kWidth ? load(q) : load_partial(q, n);
    }
  }
}

constexpr uint32_t kAllValid = (1u << kPointChunk) - 1u;

// Where the inputs of one (batch, query, head) begin.
struct Place {
  const float* locations;  // fused: offsets
  const char* attention;   // fused: logits
  const float* reference;  // fused only

  Place(const MsDeformAttnParams& params, int64_t b, int64_t q, int64_t h) {
    locations = params.locations + b * params.locations_stride_b + q * params.locations_stride_q +
                h * params.locations_stride_h;
    attention =
        static_cast<const char*>(params.attention) +
        (b * params.attention_stride_b + q * params.attention_stride_q + h * params.attention_stride_h) *
            element_bytes(params.attention_element);
    reference = params.reference + b * params.reference_stride_b + q * params.reference_stride_q;
  }
};

// attention[0 .. padded_points) = softmax of the logits, zero behind them.
VISIONLLM_INLINE void softmax(const MsDeformAttnParams& params, const void* logits, float* attention) {
  const F low = set(-3e38f), log2_e = set(kLog2E);
  F largest = low;
  for (int p = 0; p < params.padded_points; p += kWidth) {
    const int n = params.points - p < kWidth ? (params.points - p < 0 ? 0 : params.points - p) : kWidth;
    F logit = low;
    if (n == kWidth) {
      logit = load_attention(logits, p, params.attention_element, kWidth);
    } else if (n > 0) {
      logit = where(first(n), load_attention(logits, p, params.attention_element, n), low);
    }
    largest = max(largest, logit);
    store(attention + p, logit);
  }
  const F maximum = set(max_lanes(largest));
  F sum = set(0.0f);
  for (int p = 0; p < params.padded_points; p += kWidth) {
    // Subtracted first: a large logit times log2(e) would lose the digits that tell it from the others.
    const F power = where(first(params.points - p), exp2((load(attention + p) - maximum) * log2_e));
    sum = sum + power;
    store(attention + p, power);
  }
  const F scale = set(1.0f / sum_lanes(sum));
  for (int p = 0; p < params.padded_points; p += kWidth) store(attention + p, load(attention + p) * scale);
}

// Component i of the reference of the points p .. p + kWidth.
VISIONLLM_INLINE F reference_of(const MsDeformAttnParams& params, const float* reference, int i, int p) {
  F result = set(reference[i]);
  if (params.reference_stride_l == 0) return result;
  const F level = load(params.level_number + p);
  for (int l = 1; l < params.levels; ++l) {
    result = where(greater(level, set(static_cast<float>(l) - 0.5f)),
                   set(reference[l * params.reference_stride_l + i]), result);
  }
  return result;
}

// Fills `points` for one (batch, query, head). With kCopied points that contribute nothing get the row of
// zeros, number S.
template <bool kForBackward, bool kCopied, bool kFused>
VISIONLLM_INLINE void locate(const MsDeformAttnParams& params, const Place& place, const Points& points) {
  const F half = set(0.5f), one = set(1.0f), minus_one = set(-1.0f), zero = set(0.0f);
  const I int_zero = set(int32_t{0}), int_one = set(int32_t{1}), int_minus_one = set(int32_t{-1});
  if (kFused) softmax(params, place.attention, points.attention);
  uint32_t valid_bits = 0;
  for (int p = 0; p < params.padded_points; p += kWidth) {
    const int n = params.points - p < kWidth ? (params.points - p < 0 ? 0 : params.points - p) : kWidth;
    F x, y, weight = kFused ? load(points.attention + p) : zero;
    if (n == kWidth) {
      load_pairs(place.locations + 2 * p, &x, &y);
      if (!kFused) weight = load_attention(place.attention, p, params.attention_element, kWidth);
    } else {
      float pairs[2 * kWidth];
      memset(pairs, 0, sizeof pairs);
      if (n > 0) {
        memcpy(pairs, place.locations + 2 * p, static_cast<size_t>(n) * 2 * sizeof(float));
        if (!kFused) weight = load_attention(place.attention, p, params.attention_element, n);
      }
      load_pairs(pairs, &x, &y);
    }
    const F width = load(params.level_width + p), height = load(params.level_height + p);
    const I width_int = load(params.level_width_int + p), height_int = load(params.level_height_int + p);

    if (kFused) {
      const F reference_x = reference_of(params, place.reference, 0, p);
      const F reference_y = reference_of(params, place.reference, 1, p);
      if (params.reference_size == 4) {
        const F share = set(params.half_over_points);
        x = mul_add(x * share, reference_of(params, place.reference, 2, p), reference_x);
        y = mul_add(y * share, reference_of(params, place.reference, 3, p), reference_y);
        x = x * width - half;
        y = y * height - half;
      } else {
        x = mul_add(reference_x, width, x - half);
        y = mul_add(reference_y, height, y - half);
      }
    } else {
      x = x * width - half;
      y = y * height - half;
    }
    const M valid = both(
        both(both(greater(x, minus_one), greater(y, minus_one)), both(greater(width, x), greater(height, y))),
        first(n));
    x = where(valid, x);
    y = where(valid, y);
    weight = where(valid, weight);
    const F x_floor = floor(x), y_floor = floor(y);
    const F fx = x - x_floor, fy = y - y_floor;
    const I x0 = to_int(x_floor), y0 = to_int(y_floor);
    const I x1 = add(x0, int_one), y1 = add(y0, int_one);
    const F width_last = width - one, height_last = height - one;
    const M inside_x0 = both(valid, greater(x_floor, minus_one)),
            inside_x1 = both(valid, greater(width_last, x_floor));
    const M inside_y0 = both(valid, greater(y_floor, minus_one)),
            inside_y1 = both(valid, greater(height_last, y_floor));

    const I column0 = max(x0, int_zero), column1 = min(x1, add(width_int, int_minus_one));
    const I start = load(params.level_start + p);
    const I line0 = add(start, mul(max(y0, int_zero), width_int));
    const I line1 = add(start, mul(min(y1, add(height_int, int_minus_one)), width_int));
    I row00 = add(line0, column0), row01 = add(line0, column1);
    I row10 = add(line1, column0), row11 = add(line1, column1);
    if (kCopied) {
      const I zeros = set(static_cast<int32_t>(params.pixels));
      row00 = where(valid, row00, zeros), row01 = where(valid, row01, zeros);
      row10 = where(valid, row10, zeros), row11 = where(valid, row11, zeros);
    }
    store(points.row + p, row00);
    store(points.row + points.padded + p, row01);
    store(points.row + 2 * points.padded + p, row10);
    store(points.row + 3 * points.padded + p, row11);

    const F weight_x0 = where(inside_x0, one - fx), weight_x1 = where(inside_x1, fx);
    const F weight_y0 = where(inside_y0, (one - fy) * weight), weight_y1 = where(inside_y1, fy * weight);
    store(points.weight + p, weight_y0 * weight_x0);
    store(points.weight + points.padded + p, weight_y0 * weight_x1);
    store(points.weight + 2 * points.padded + p, weight_y1 * weight_x0);
    store(points.weight + 3 * points.padded + p, weight_y1 * weight_x1);
    if (kForBackward) {
      if (!kFused) store(points.attention + p, weight);  // fused: the softmax, of all points
      store(points.fx + p, fx);
      store(points.fy + p, fy);
      store(points.inside_x0 + p, where(inside_x0, one));
      store(points.inside_x1 + p, where(inside_x1, one));
      store(points.inside_y0 + p, where(inside_y0, one));
      store(points.inside_y1 + p, where(inside_y1, one));
    }
    if (kCopied) continue;
    const int lane = p % kPointChunk;
    valid_bits |= bits(valid) << lane;
    if (lane + kWidth == kPointChunk) {
      points.valid[p / kPointChunk] = valid_bits;
      valid_bits = 0;
    }
  }
}

VISIONLLM_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Rows of one head lie H heads apart, which the hardware does not foresee: they are asked for so many ahead.
constexpr int64_t kPrefetchRows = 16;

// Copies `pixels` rows of `channels` elements, converting as the types say.
template <typename From, typename To>
void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t pixels,
               int64_t channels) {
  for (int64_t s = 0; s < pixels; ++s, from += from_stride, to += to_stride) {
    if (s + kPrefetchRows < pixels) {
      prefetch(from + kPrefetchRows * from_stride, channels * static_cast<int64_t>(sizeof(From)));
    }
    int64_t d = 0;
    for (; d + kWidth <= channels; d += kWidth) store(to + d, load(from + d));
    if (d < channels) {
      const int n = static_cast<int>(channels - d);
      store_partial(to + d, load_partial(from + d, n), n);
    }
  }
}

// Asks for the inputs of a query to come: they lie H heads apart, which the hardware does not foresee.
VISIONLLM_INLINE void prefetch(const MsDeformAttnParams& params, const Place& place) {
  prefetch(place.locations, static_cast<int64_t>(params.points) * 2 * static_cast<int64_t>(sizeof(float)));
  prefetch(place.attention, static_cast<int64_t>(params.points) * static_cast<int64_t>(sizeof(float)));
}

constexpr int64_t kPrefetchQueries = 4;

template <typename T>
VISIONLLM_INLINE const T* value_of(const MsDeformAttnParams& params, int64_t b, int64_t h) {
  return static_cast<const T*>(params.value) + b * params.value_stride_b + h * params.value_stride_h;
}

// Copies one head's rows and puts the row of zeros behind them.
template <typename T>
void copy_head(const MsDeformAttnParams& params, const T* value, float* rows) {
  copy_rows(value, params.value_stride_s, rows, params.channels, params.pixels, params.channels);
  memset(rows + params.pixels * params.channels, 0, static_cast<size_t>(params.channels) * sizeof(float));
}

// Asks for the rows of the located points.
template <typename T>
VISIONLLM_INLINE void prefetch_rows(const Points& points, const T* value, int64_t stride, int64_t channels) {
  for (int64_t i = 0; i < kCorners * points.padded; ++i) {
    const char* row = reinterpret_cast<const char*>(value + points.row[i] * stride);
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Two workspaces: while one item is computed, the rows of the next are on their way. That is for values that
// come from memory rather than from a cache.
struct PointsTwice {
  Points parity[2];

  PointsTwice(const MsDeformAttnParams& params, void* workspace)
      : parity{Points(workspace, params.padded_points),
               Points(static_cast<char*>(workspace) + ms_deform_attn_workspace_bytes(params) / 2,
                      params.padded_points)} {}
  const Points& operator[](int64_t item) const { return parity[item % 2]; }
};

}  // namespace
}  // namespace visionllm::cpu::VISIONLLM_ISA
