// CPU kernels of multi-scale deformable attention, forward and backward; compiled once per instruction set
// (simd.h).
//
//   pixel = location * size - 0.5,  cell = floor(pixel),  f = pixel - cell
//   sampled = (1-fy)(1-fx) v[y0,x0] + (1-fy) fx v[y0,x1] + fy (1-fx) v[y1,x0] + fy fx v[y1,x1]
//   output += attention * sampled
//
// Where a head has many more gathers than pixels, its rows are first copied together, in float, with a row of
// zeros behind them: the copy is dense in the caches, and points that contribute nothing read (and, backward,
// write) the extra row, so that the inner loops have no tests. Otherwise the rows are used where they lie and
// such points are skipped.
//
// For one (batch, query, head) the lanes run over points while the cells and weights are computed, then over
// channels while rows of value are gathered. A corner outside the image gets weight zero and the row number
// of the corner beside it, which is inside: no branch, and no memory is read that the formula does not name.
//
// Backward, with dot_c = <grad_output, v_c> for each corner c:
//   grad_v_c       += weight_c * grad_output
//   grad_attention  = sum_c bilinear_c * dot_c
//   grad_x          = attention * width  * ((1-fy)(dot_01 - dot_00) + fy (dot_11 - dot_10));  grad_y alike
#include "cpu/ms_deform_attn.h"

#include "cpu/simd.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

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

VISIONLLM_INLINE void store_attention(void* p, int64_t i, Element element, F v, int n) {
  switch (element) {
    case Element::bfloat16: store_partial(static_cast<bfloat16*>(p) + i, v, n); break;
    case Element::float16: store_partial(static_cast<float16*>(p) + i, v, n); break;
    default: store_partial(static_cast<float*>(p) + i, v, n); break;
  }
}

constexpr uint32_t kAllValid = (1u << kPointChunk) - 1u;

// Fills `points` for one (batch, query, head) from its locations [points, 2] and attention weights [points].
// With kCopied points that contribute nothing get the row of zeros, number S.
template <bool kForBackward, bool kCopied>
VISIONLLM_INLINE void locate(const MsDeformAttnParams& params, const float* locations, const void* attention,
                             const Points& points) {
  const F half = set(0.5f), one = set(1.0f), minus_one = set(-1.0f), zero = set(0.0f);
  const I int_zero = set(int32_t{0}), int_one = set(int32_t{1}), int_minus_one = set(int32_t{-1});
  uint32_t valid_bits = 0;
  for (int p = 0; p < params.padded_points; p += kWidth) {
    const int n = params.points - p < kWidth ? (params.points - p < 0 ? 0 : params.points - p) : kWidth;
    F x, y, weight = zero;
    if (n == kWidth) {
      load_pairs(locations + 2 * p, &x, &y);
      weight = load_attention(attention, p, params.attention_element, kWidth);
    } else {
      float pairs[2 * kWidth];
      memset(pairs, 0, sizeof pairs);
      if (n > 0) {
        memcpy(pairs, locations + 2 * p, static_cast<size_t>(n) * 2 * sizeof(float));
        weight = load_attention(attention, p, params.attention_element, n);
      }
      load_pairs(pairs, &x, &y);
    }
    const F width = load(params.level_width + p), height = load(params.level_height + p);
    const I width_int = load(params.level_width_int + p), height_int = load(params.level_height_int + p);

    x = x * width - half;
    y = y * height - half;
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
      store(points.attention + p, weight);
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

// Adds one point's four corners to `sum`. Corners go to `kChains` separate sums so that the additions
// overlap.
template <int kVectors, int kChains, typename T>
VISIONLLM_INLINE void gather_point(const Points& points, int64_t p, const T* value, int64_t stride,
                                   F (&sum)[kChains][kVectors]) {
  for (int corner = 0; corner < kCorners; ++corner) {
    const T* row = value + points.row[corner * points.padded + p] * stride;
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

// Copies `pixels` rows of `channels` elements, converting as the types say.
template <typename From, typename To>
void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t pixels,
               int64_t channels) {
  for (int64_t s = 0; s < pixels; ++s, from += from_stride, to += to_stride) {
    int64_t d = 0;
    for (; d + kWidth <= channels; d += kWidth) store(to + d, load(from + d));
    if (d < channels) {
      const int n = static_cast<int>(channels - d);
      store_partial(to + d, load_partial(from + d, n), n);
    }
  }
}

// Where the inputs of one (batch, query, head) begin.
struct Place {
  const float* locations;
  const char* attention;

  Place(const MsDeformAttnParams& params, int64_t b, int64_t q, int64_t h) {
    locations = params.locations + b * params.locations_stride_b + q * params.locations_stride_q +
                h * params.locations_stride_h;
    const int size = params.attention_element == Element::float32 ? 4 : 2;
    attention =
        static_cast<const char*>(params.attention) +
        (b * params.attention_stride_b + q * params.attention_stride_q + h * params.attention_stride_h) *
            size;
  }
};

// Asks for the inputs of a query to come: they lie H heads apart, which the hardware does not foresee.
VISIONLLM_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

VISIONLLM_INLINE void prefetch(const MsDeformAttnParams& params, const Place& place) {
  prefetch(place.locations, static_cast<int64_t>(params.points) * 2 * static_cast<int64_t>(sizeof(float)));
  prefetch(place.attention, static_cast<int64_t>(params.points) * static_cast<int64_t>(sizeof(float)));
}

constexpr int64_t kPrefetchQueries = 4;

template <typename T>
VISIONLLM_INLINE const T* value_of(const MsDeformAttnParams& params, int64_t b, int64_t h) {
  return static_cast<const T*>(params.value) + b * params.value_stride_b + h * params.value_stride_h;
}

template <typename T>
VISIONLLM_INLINE T* output_of(const MsDeformAttnParams& params, int64_t b, int64_t q, int64_t h) {
  return static_cast<T*>(params.output) + b * params.output_stride_b + q * params.output_stride_q +
         h * params.channels;
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

// Copies one head's rows and puts the row of zeros behind them.
template <typename T>
void copy_head(const MsDeformAttnParams& params, const T* value, float* rows) {
  copy_rows(value, params.value_stride_s, rows, params.channels, params.pixels, params.channels);
  memset(rows + params.pixels * params.channels, 0, static_cast<size_t>(params.channels) * sizeof(float));
}

// Items (b * H + h) * Q + q: a head's rows are copied once.
template <typename T>
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
    const Place place(params, b, q, h);
    locate<false, true>(params, place.locations, place.attention, points);
    gather_channels<true>(points, static_cast<const float*>(value_rows), params.channels,
                          output_of<T>(params, b, q, h), params.channels);
  }
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

// Items (b * Q + q) * H + h: a query's heads look at the same pixels, which lie side by side.
template <typename T>
void forward_in_place(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace) {
  const PointsTwice points(params, workspace);
  const auto start = [&](int64_t item) {
    const int64_t h = item % params.heads;
    const int64_t q = item / params.heads % params.queries;
    const int64_t b = item / params.heads / params.queries;
    const Place place(params, b, q, h);
    locate<false, false>(params, place.locations, place.attention, points[item]);
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
      const V* row = value + rows[lane] * stride;
      float* grad_row = grad_value + rows[lane] * grad_stride;
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

// Gradients of locations and attention weights from the dot products.
VISIONLLM_INLINE void finish_points(const MsDeformAttnParams& params, const Points& points, int64_t item) {
  const F zero = set(0.0f), one = set(1.0f);
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
    const F grad_attention = gy * (gx * dot00 + fx * dot01) + fy * (gx * dot10 + fx * dot11);
    const F grad_x = attention * load(params.level_width + p) * (gy * (dot01 - dot00) + fy * (dot11 - dot10));
    const F grad_y =
        attention * load(params.level_height + p) * (gx * (dot10 - dot00) + fx * (dot11 - dot01));
    store_attention(params.grad_attention, item * params.points + p, params.attention_element,
                    where(valid, grad_attention), n);
    float* grad_locations = params.grad_locations + (item * params.points + p) * 2;
    if (n == kWidth) {
      store_pairs(grad_locations, where(valid, grad_x), where(valid, grad_y));
    } else {
      float pairs[2 * kWidth];
      store_pairs(pairs, where(valid, grad_x), where(valid, grad_y));
      memcpy(grad_locations, pairs, static_cast<size_t>(n) * 2 * sizeof(float));
    }
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
template <typename T>
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
      locate<true, true>(params, place.locations, place.attention, points);
      scatter_channels<true>(points, static_cast<const float*>(value_rows), channels,
                             grad_output_of<T>(params, b, q, h), grad_rows, channels, channels);
      finish_points(params, points, (b * params.queries + q) * params.heads + h);
    }
    copy_rows(grad_rows, channels, grad_value_of<T>(params, b, h), params.heads * channels, pixels, channels);
  }
}

// All heads of [begin, end) that a picture has, query by query: they look at the same pixels, which lie side
// by side. Each head still sums in the order of the queries, so that the result does not depend on who does
// which heads.
void backward_in_place(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace) {
  const PointsTwice points(params, workspace);
  const int64_t grad_stride = params.heads * params.channels;
  for (int64_t b = begin / params.heads; b * params.heads < end; ++b) {
    const int64_t first = begin > b * params.heads ? begin - b * params.heads : 0;
    const int64_t last = end < (b + 1) * params.heads ? end - b * params.heads : params.heads;
    const int64_t heads = last - first, items = heads * params.queries;
    const auto start = [&](int64_t item) {
      const int64_t q = item / heads, h = first + item % heads;
      const Place place(params, b, q, h);
      locate<true, false>(params, place.locations, place.attention, points[item]);
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
      finish_points(params, points[item], (b * params.queries + q) * params.heads + h);
    }
  }
}

template <typename T>
void forward(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
             float* value_rows) {
  if (value_rows != nullptr) {
    forward_copied<T>(params, begin, end, workspace, value_rows);
  } else {
    forward_in_place<T>(params, begin, end, workspace);
  }
}

}  // namespace

void ms_deform_attn_kernel(const MsDeformAttnParams& params, int64_t begin, int64_t end, void* workspace,
                           float* value_rows) {
  switch (params.element) {
    case Element::float32: return forward<float>(params, begin, end, workspace, value_rows);
    case Element::bfloat16: return forward<bfloat16>(params, begin, end, workspace, value_rows);
    case Element::float16: return forward<float16>(params, begin, end, workspace, value_rows);
  }
}

void ms_deform_attn_backward_kernel(const MsDeformAttnParams& params, int64_t begin, int64_t end,
                                    void* workspace, float* value_rows, float* grad_rows) {
  if (value_rows == nullptr) return backward_in_place(params, begin, end, workspace);
  switch (params.element) {
    case Element::float32:
      return backward_copied<float>(params, begin, end, workspace, value_rows, grad_rows);
    case Element::bfloat16:
      return backward_copied<bfloat16>(params, begin, end, workspace, value_rows, grad_rows);
    case Element::float16:
      return backward_copied<float16>(params, begin, end, workspace, value_rows, grad_rows);
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
