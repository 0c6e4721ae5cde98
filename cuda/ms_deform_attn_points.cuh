// What the kernels of multi-scale deformable attention share: which thread works on which query, where the
// points lie, and softmax over them.
//
// A group of G neighbouring lanes (a power of two up to 32) has one (batch, query, head), and its lanes have
// the channels, kVector of them each. Points are taken G at a time: each lane computes one point's cell and
// corner weights and puts them into its warp's part of shared memory, from where the group's lanes read them
// as broadcasts: two 16-byte loads a point, where shuffles would take eight instructions.
#pragma once

#include <type_traits>

#include "device/numeric.cuh"
#include "device/platform.cuh"
#include "ms_deform_attn.h"

namespace visionllm::cuda {

// ---- Which thread works on what ---------------------------------------------------------------------------

// Work of one launch, cut into pieces of one block each: a tile of queries times a few neighbouring heads.
// Pieces that lie next to each other differ by their tile, so that what runs at one time reads one part of
// value.
struct Partition {
  std::int64_t pieces;       // in all; blocks take them in strides of the grid
  std::int64_t tiles;        // of the queries
  std::int64_t head_groups;  // of the heads
  std::int32_t lanes_log2;   // log2 G
  std::int32_t heads_log2;   // log2 of the heads in a piece
  std::int32_t width_log2;   // log2 of a tile's extent in x and y; y only where queries are pixels
  std::int32_t height_log2;
  std::int32_t first_tile[kMaxLevels + 1];  // where queries are pixels: number of each level's first tile
  std::int32_t tiles_across[kMaxLevels];
};

// One (batch, query, head).
struct Item {
  std::int64_t b, q, h;
  bool valid;  // false past the end of the queries or heads
};

__device__ __forceinline__ Item item_of(const MsDeformAttnParams& params, const Partition& partition,
                                        std::int64_t piece, int number) {
  const std::int64_t tile = piece % partition.tiles;
  const std::int64_t rest = piece / partition.tiles;
  const int inside = number >> partition.heads_log2;  // number of the query in its tile
  Item item;
  item.b = rest / partition.head_groups;
  item.h =
      ((rest % partition.head_groups) << partition.heads_log2) + (number & ((1 << partition.heads_log2) - 1));
  item.valid = item.h < params.heads;
  if (params.queries_are_pixels) {
    const int t = static_cast<int>(tile);
    int level = 0;
    while (level + 1 < params.levels && t >= partition.first_tile[level + 1]) ++level;
    const int local = t - partition.first_tile[level];
    const int across = partition.tiles_across[level];
    const int x = ((local % across) << partition.width_log2) + (inside & ((1 << partition.width_log2) - 1));
    const int y = ((local / across) << partition.height_log2) + (inside >> partition.width_log2);
    const DeformLevel size = params.level[level];
    item.valid = item.valid && x < size.width && y < size.height;
    item.q = size.start + static_cast<std::int64_t>(y) * size.width + x;
  } else {
    item.q = (tile << partition.width_log2) + inside;
    item.valid = item.valid && item.q < params.queries;
  }
  return item;
}

// ---- Levels -----------------------------------------------------------------------------------------------

// Fills `levels` [kMaxLevels] in shared memory; levels that do not lie within S get no pixels. The caller
// synchronises the block.
__device__ __forceinline__ void load_levels(const MsDeformAttnParams& params, DeformLevel* levels) {
  for (int l = threadIdx.x; l < params.levels; l += blockDim.x) {
    DeformLevel level = params.level[l];
    if (params.device_shapes != nullptr) {
      const std::int64_t h = params.device_shapes[2 * l], w = params.device_shapes[2 * l + 1];
      const std::int64_t first = params.device_starts[l], pixels = params.pixels;
      // Each test bounds the next one's operands, so that nothing overflows.
      const bool inside = h >= 1 && w >= 1 && h <= pixels && w <= pixels && w <= kMaxLevelWidth &&
                          first >= 0 && first <= pixels && h * w <= pixels - first;
      level.height = inside ? static_cast<std::int32_t>(h) : 0;
      level.width = inside ? static_cast<std::int32_t>(w) : 0;
      level.start = inside ? static_cast<std::int32_t>(first) : 0;
    }
    levels[l] = level;
  }
}

// n / divisor for 0 <= n < 2^20 / divisor: one multiplication in the place of a division of about 20
// instructions.
struct SmallDivisor {
  unsigned factor;
  __device__ __forceinline__ explicit SmallDivisor(int divisor)
      : factor(divisor > 0
                   ? ((1u << 20) + static_cast<unsigned>(divisor) - 1) / static_cast<unsigned>(divisor)
                   : 0) {}
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((static_cast<unsigned>(n) * factor) >> 20);
  }
};

// ---- Attention --------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float load_attention(const MsDeformAttnParams& params, const void* base,
                                                std::int64_t i) {
  if (params.attention_dtype == DType::float32) return static_cast<const float*>(base)[i];
  return to_float(static_cast<const T*>(base)[i]);
}

__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ __forceinline__ float group_max(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// weight = exp(logit - maximum) * scale
struct Softmax {
  float maximum = 0.0f, scale = 1.0f;
};

// Over the group's `count` logits, all lanes of the warp taking part; in lanes without a valid item nothing
// is read.
template <typename T>
__device__ __forceinline__ Softmax softmax_of(const MsDeformAttnParams& params, const void* logits,
                                              std::int64_t offset, int count, bool valid, int lane,
                                              int lanes) {
  Softmax softmax;
  float maximum = -INFINITY;
  if (valid) {
    for (int i = lane; i < count; i += lanes)
      maximum = fmaxf(maximum, load_attention<T>(params, logits, offset + i));
  }
  softmax.maximum = group_max(maximum, lanes);
  float sum = 0.0f;
  if (valid) {
    for (int i = lane; i < count; i += lanes)
      sum += expf(load_attention<T>(params, logits, offset + i) - softmax.maximum);
  }
  softmax.scale = 1.0f / group_sum(sum, lanes);
  return softmax;
}

// ---- Points -----------------------------------------------------------------------------------------------

// Bits of a cell's corners that are inside the image.
constexpr unsigned kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8;

struct Point {
  DeformLevel level;
  std::int32_t x, y;         // the cell's top left pixel, -1 where it is beside the image
  float fx, fy;              // place in the cell, 0 .. 1
  float attention;           // 0 where no corner is inside
  unsigned inside;           // bits of the corners; 0: contributes nothing
  float offset_x, offset_y;  // as loaded; the fused form's
};

// A point of the deterministic backward's list.
struct SampledPoint {
  float x, y;  // in pixels, where -0.5 is the image's edge; NaN: contributes nothing
  float attention;
};

// Where an item's points, weights and reference begin; offsets in elements.
struct PointSource {
  std::int64_t locations, attention, reference;

  __device__ __forceinline__ PointSource(const MsDeformAttnParams& params, const Item& item)
      : locations(item.b * params.locations_stride_b + item.q * params.locations_stride_q +
                  item.h * params.locations_stride_h),
        attention(item.b * params.attention_stride_b + item.q * params.attention_stride_q +
                  item.h * params.attention_stride_h),
        reference(item.b * params.reference_stride_b + item.q * params.reference_stride_q) {}
};

// Number `p` of the item's L * P points. A point that is a pixel or more outside, infinite or NaN has no
// corner inside. pixel_x, pixel_y: its place in pixels, NaN for such a point.
template <typename T, bool kFused>
__device__ __forceinline__ Point locate(const MsDeformAttnParams& params, const PointSource& source,
                                        const DeformLevel* levels, const SmallDivisor& by_points, int p,
                                        const Softmax& softmax, float* pixel_x, float* pixel_y) {
  Point point;
  const int l = by_points.divide(p);
  point.level = levels[l];
  const float width = static_cast<float>(point.level.width), height = static_cast<float>(point.level.height);
  const float* location = params.locations + source.locations + 2 * p;
  point.offset_x = location[0], point.offset_y = location[1];
  float x, y;
  if constexpr (kFused) {
    const float* reference = params.reference + source.reference + l * params.reference_stride_l;
    if (params.reference_size == 2) {  // location = reference + offset / size
      x = fmaf(reference[0], width, point.offset_x - 0.5f);
      y = fmaf(reference[1], height, point.offset_y - 0.5f);
    } else {  // location = centre + offset / P * size / 2
      const float half = 0.5f / static_cast<float>(params.points);
      x = fmaf(fmaf(point.offset_x * half, reference[2], reference[0]), width, -0.5f);
      y = fmaf(fmaf(point.offset_y * half, reference[3], reference[1]), height, -0.5f);
    }
  } else {
    x = fmaf(point.offset_x, width, -0.5f);
    y = fmaf(point.offset_y, height, -0.5f);
  }
  const bool valid = x > -1.0f && y > -1.0f && x < width && y < height;  // false for NaN and for no pixels
  const float floor_x = valid ? floorf(x) : 0.0f, floor_y = valid ? floorf(y) : 0.0f;
  point.x = static_cast<std::int32_t>(floor_x), point.y = static_cast<std::int32_t>(floor_y);
  point.fx = valid ? x - floor_x : 0.0f, point.fy = valid ? y - floor_y : 0.0f;
  // As unsigned: negative numbers are large. Not taken from x and y alone, which float32 rounds in wide
  // images.
  const unsigned w = static_cast<unsigned>(point.level.width), h = static_cast<unsigned>(point.level.height);
  const bool x0 = static_cast<unsigned>(point.x) < w, x1 = static_cast<unsigned>(point.x + 1) < w;
  const bool y0 = static_cast<unsigned>(point.y) < h, y1 = static_cast<unsigned>(point.y + 1) < h;
  point.inside = valid ? (y0 && x0 ? kTopLeft : 0) | (y0 && x1 ? kTopRight : 0) |
                             (y1 && x0 ? kBottomLeft : 0) | (y1 && x1 ? kBottomRight : 0)
                       : 0;
  point.attention = 0.0f;
  if (point.inside != 0) {
    point.attention = load_attention<T>(params, params.attention, source.attention + p);
    if constexpr (kFused) point.attention = expf(point.attention - softmax.maximum) * softmax.scale;
  }
  *pixel_x = valid ? x : NAN;
  *pixel_y = y;
  return point;
}

// A point as the lanes of its group read it from shared memory.
struct alignas(16) CornerWeights {
  float top_left, top_right, bottom_left, bottom_right;  // attention * bilinear weight, 0 where outside
};

__device__ __forceinline__ CornerWeights weights_of(const Point& point) {
  const float right = point.attention * point.fx, left = point.attention * (1.0f - point.fx);
  return {(point.inside & kTopLeft) ? left * (1.0f - point.fy) : 0.0f,
          (point.inside & kTopRight) ? right * (1.0f - point.fy) : 0.0f,
          (point.inside & kBottomLeft) ? left * point.fy : 0.0f,
          (point.inside & kBottomRight) ? right * point.fy : 0.0f};
}

// The top left pixel's number in S, which is negative where that pixel is outside.
__device__ __forceinline__ std::int32_t row_of(const Point& point) {
  return point.level.start + point.y * point.level.width + point.x;
}

// kVector channels as they lie in memory: one element, or 16 bytes in whole words, which predicated loads
// leave alone where elements of 16 bits would be taken apart and put together again.
template <typename T, int kVector>
using Channels = std::conditional_t<kVector == 1, T, uint4>;

// Zero where the corner is outside, which is then not read.
template <typename T, int kVector>
__device__ __forceinline__ Channels<T, kVector> load_channels(const void* source, bool inside) {
  using Loaded = Channels<T, kVector>;
  static_assert(kVector == 1 || kVector * sizeof(T) == 16, "one element or 16 bytes");
  if (inside) return *static_cast<const Loaded*>(source);
  if constexpr (kVector == 1) return from_float<T>(0.0f);
  return Loaded{};
}

template <typename T>
__device__ __forceinline__ void to_floats(float (&values)[1], T channels) {
  values[0] = to_float(channels);
}

template <typename T>
__device__ __forceinline__ void to_floats(float (&values)[16 / sizeof(T)], uint4 channels) {
  const unsigned words[4] = {channels.x, channels.y, channels.z, channels.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, __half>) {
      values[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
      values[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    } else {
      values[i] = __uint_as_float(words[i]);
    }
  }
}

template <int kVector>
__device__ __forceinline__ void add_scaled(float (&sum)[kVector], float factor,
                                           const float (&values)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) sum[c] = fmaf(factor, values[c], sum[c]);
}

// ---- Launching --------------------------------------------------------------------------------------------

constexpr int kMinThreads = 64;  // of a block, where few queries would leave multiprocessors idle

#ifdef VISIONLLM_EMULATION
constexpr std::int64_t kMaxBlocks = 24;  // so that tests walk in strides of the grid
#else
constexpr std::int64_t kMaxBlocks = 1 << 30;
#endif

inline unsigned grid_for(std::int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

inline std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

inline bool is_aligned(const void* pointer, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

inline std::int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Whether a head's channels can be moved 16 bytes at a time, all of them by one group.
inline bool is_vectorizable(const MsDeformAttnParams& params) {
  const std::int64_t vector = 16 / element_bytes(params.value_dtype);
  return params.channels % vector == 0 && params.channels <= kWarpSize * vector &&
         is_aligned(params.value, 16) && params.value_stride_b % vector == 0 &&
         params.value_stride_s % vector == 0 && params.value_stride_h % vector == 0;
}

// How the pieces are cut for blocks of `threads` threads that move `vector` channels each.
inline Partition partition_of(const MsDeformAttnParams& params, int vector, int threads) {
  Partition partition{};
  while ((std::int64_t{1} << partition.lanes_log2) * vector < params.channels && partition.lanes_log2 < 5)
    ++partition.lanes_log2;
  int items_log2 = 0;
  while ((threads >> (partition.lanes_log2 + items_log2 + 1)) > 0) ++items_log2;
  // Heads that share the 128-byte lines of value stay together.
  const std::int64_t row_bytes = params.channels * element_bytes(params.value_dtype);
  while (partition.heads_log2 < items_log2 && (row_bytes << (partition.heads_log2 + 1)) <= 128 &&
         (std::int64_t{2} << partition.heads_log2) <= params.heads)
    ++partition.heads_log2;
  const int queries_log2 = items_log2 - partition.heads_log2;
  if (params.queries_are_pixels) {
    partition.height_log2 = queries_log2 / 2;
    partition.width_log2 = queries_log2 - partition.height_log2;
    for (int l = 0; l < params.levels; ++l) {
      const std::int64_t across = divide_up(params.level[l].width, std::int64_t{1} << partition.width_log2);
      const std::int64_t down = divide_up(params.level[l].height, std::int64_t{1} << partition.height_log2);
      partition.tiles_across[l] = static_cast<std::int32_t>(across);
      partition.first_tile[l + 1] = static_cast<std::int32_t>(partition.first_tile[l] + across * down);
    }
    partition.tiles = partition.first_tile[params.levels];
  } else {
    partition.width_log2 = queries_log2;
    partition.tiles = divide_up(params.queries, std::int64_t{1} << queries_log2);
  }
  partition.head_groups = divide_up(params.heads, std::int64_t{1} << partition.heads_log2);
  partition.pieces = partition.tiles * partition.head_groups * params.batch;
  return partition;
}

// `most`, but few where there would not be two blocks for each multiprocessor.
inline Status threads_for(const MsDeformAttnParams& params, int vector, int most, int* threads) {
  int multiprocessors = 0;
  const Status status = multiprocessor_count(&multiprocessors);
  *threads = partition_of(params, vector, most).pieces >= 2 * multiprocessors ? most : kMinThreads;
  return status;
}

// Calls function(T{}, std::integral_constant<int, kVector>{}) for value's type and the widest move that fits.
template <typename Function>
Status dispatch(const MsDeformAttnParams& params, bool vectorized, Function&& function) {
  const auto with_vector = [&](auto type) {
    using T = decltype(type);
    return vectorized ? function(type, std::integral_constant<int, kVectorSize<T>>{})
                      : function(type, std::integral_constant<int, 1>{});
  };
  switch (params.value_dtype) {
    case DType::bfloat16: return with_vector(__nv_bfloat16{});
    case DType::float16: return with_vector(__half{});
    default: return with_vector(float{});
  }
}

}  // namespace visionllm::cuda
