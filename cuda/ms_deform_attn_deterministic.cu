// grad_value of multi-scale deformable attention without atomics, and with the same bits in every run: each
// warp owns a small tile of one level's pixels (of one batch, head and 32 channels), walks over the points
// that fall on it in the order of the queries and adds them up in its own part of shared memory.
//
// The points come from the list that ms_deform_attn_backward.cu wrote. So that a warp need not read all of
// it, a first kernel writes the bounds of every 32 queries' cells; in an encoder, where neighbouring queries
// look at neighbouring pixels, few of these meet a tile. Coarse levels get smaller tiles: as many points fall
// on them as on fine ones.
//
// Levels are summed one launch after the other, since nothing forbids that two share pixels.
//
// Counted for the paper's encoder, as in ms_deform_attn.cu: the list is 34 MB. Of it the warps read 2.0 GB
// from L2, half of that for the coarsest level, where 273 tiles of one pixel meet 43 % of the bounds; without
// the bounds it would be 9.3 GB. 2.6 M points with a corner inside fall on 5.5 M tiles, each time with a read
// of 128 bytes of grad_output (64 in 16 bits) for the 32 channels.
#include <climits>

#include "ms_deform_attn_points.cuh"

namespace visionllm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileEdge = 8;  // of the finest level: 8 x 8 pixels x 32 channels = 8 KiB a warp
constexpr int kTilePixels = kTileEdge * kTileEdge;
constexpr int kQueriesPerBounds = 32;

// Of the cells' top left pixels; empty where no point contributes.
struct alignas(16) Bounds {
  std::int32_t min_x, max_x, min_y, max_y;
};

__device__ __forceinline__ Bounds merge(const Bounds& a, const Bounds& b) {
  return {min(a.min_x, b.min_x), max(a.max_x, b.max_x), min(a.min_y, b.min_y), max(a.max_y, b.max_y)};
}

__device__ __forceinline__ SampledPoint load_sample(const float* list, std::int64_t i) {
  return {list[3 * i], list[3 * i + 1], list[3 * i + 2]};
}

// One warp for each 32 queries of a (batch, head, level).
__global__ void __launch_bounds__(kThreads) bounds_kernel(const __grid_constant__ MsDeformAttnParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const std::int64_t chunks = (params.queries + kQueriesPerBounds - 1) / kQueriesPerBounds;
  const std::int64_t tasks = params.batch * params.heads * params.levels * chunks;
  for (std::int64_t task = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / kWarpSize; task < tasks;
       task += gridDim.x * std::int64_t{kWarps}) {
    const std::int64_t first = task % chunks * kQueriesPerBounds;
    const std::int64_t last = min(first + kQueriesPerBounds, params.queries);
    const float* const list = params.samples + 3 * (task / chunks) * params.queries * params.points;
    Bounds bounds = {INT_MAX, INT_MIN, INT_MAX, INT_MIN};
    for (std::int64_t i = first * params.points + lane; i < last * params.points; i += kWarpSize) {
      const SampledPoint sample = load_sample(list, i);
      if (!isnan(sample.x)) {
        const int x = static_cast<int>(floorf(sample.x)), y = static_cast<int>(floorf(sample.y));
        bounds = merge(bounds, {x, x, y, y});
      }
    }
    __syncwarp();
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      bounds = merge(bounds, {__shfl_xor_sync(kFullWarp, bounds.min_x, offset),
                              __shfl_xor_sync(kFullWarp, bounds.max_x, offset),
                              __shfl_xor_sync(kFullWarp, bounds.min_y, offset),
                              __shfl_xor_sync(kFullWarp, bounds.max_y, offset)});
    }
    if (lane == 0) reinterpret_cast<Bounds*>(params.bounds)[task] = bounds;
  }
}

// A point that falls on the tile, waiting to be added.
struct alignas(16) Hit {
  float x, y, attention;
  std::int32_t query;  // from the first of its 32
};

// A power of two: the edge of a level's tiles. Pixels in proportion to the level's, so that tiles of all
// levels have about equally many points.
__device__ __forceinline__ int tile_edge(const DeformLevel* levels, int count, int level) {
  std::int64_t largest = 1;
  for (int l = 0; l < count; ++l) {
    const std::int64_t pixels = static_cast<std::int64_t>(levels[l].height) * levels[l].width;
    largest = max(largest, pixels);
  }
  const std::int64_t pixels = static_cast<std::int64_t>(levels[level].height) * levels[level].width;
  int edge = kTileEdge;
  // The limit is half-way between two edges' numbers of pixels, which differ by a factor of four.
  while (edge > 1 && edge * edge * largest > 2 * kTilePixels * pixels) edge /= 2;
  return edge;
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ MsDeformAttnParams params, const int level_number) {
  VISIONLLM_SHARED_ARRAY(DeformLevel, levels, kMaxLevels);
  VISIONLLM_SHARED_ARRAY(float, all_sums, kWarps * kTilePixels * kWarpSize);
  VISIONLLM_SHARED_ARRAY(Hit, all_hits, kWarps * kWarpSize);
  load_levels(params, levels);
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* const sums = all_sums + warp * kTilePixels * kWarpSize + lane;  // [pixel of the tile][channel]
  Hit* const hits = all_hits + warp * kWarpSize;

  const DeformLevel level = levels[level_number];
  const int edge = tile_edge(levels, params.levels, level_number);
  const std::int64_t across = (level.width + edge - 1) / edge, down = (level.height + edge - 1) / edge;
  const std::int64_t channel_rounds = (params.channels + kWarpSize - 1) / kWarpSize;
  const std::int64_t chunks = (params.queries + kQueriesPerBounds - 1) / kQueriesPerBounds;
  const SmallDivisor by_points(params.points);
  const std::int64_t tasks = params.batch * params.heads * channel_rounds * across * down;

  for (std::int64_t task = blockIdx.x * std::int64_t{kWarps} + warp; task < tasks;
       task += gridDim.x * std::int64_t{kWarps}) {
    const int tile_x = static_cast<int>(task % across) * edge;
    const int tile_y = static_cast<int>(task / across % down) * edge;
    std::int64_t rest = task / across / down;
    const std::int64_t channel = rest % channel_rounds * kWarpSize + lane;
    rest /= channel_rounds;
    const std::int64_t h = rest % params.heads, b = rest / params.heads;
    const std::int64_t list_number = rest * params.levels + level_number;
    const float* const list = params.samples + 3 * list_number * params.queries * params.points;
    const Bounds* const bounds = reinterpret_cast<const Bounds*>(params.bounds) + list_number * chunks;
    const bool active = channel < params.channels;

    for (int i = 0; i < edge * edge; ++i) sums[i * kWarpSize] = 0.0f;
    const auto meets = [&](const Bounds& cells) {  // a cell reaches one pixel to the right and below
      return cells.max_x >= tile_x - 1 && cells.min_x < tile_x + edge && cells.max_y >= tile_y - 1 &&
             cells.min_y < tile_y + edge;
    };
    for (std::int64_t chunk = 0; chunk < chunks; chunk += kWarpSize) {
      const bool near = chunk + lane < chunks && meets(bounds[chunk + lane]);
      unsigned near_chunks = __ballot_sync(kFullWarp, near);
      while (near_chunks != 0) {
        const std::int64_t query = (chunk + __ffs(static_cast<int>(near_chunks)) - 1) * kQueriesPerBounds;
        near_chunks &= near_chunks - 1;
        const int points =
            static_cast<int>(min(std::int64_t{kQueriesPerBounds}, params.queries - query)) * params.points;
        for (int first = 0; first < points; first += kWarpSize) {
          SampledPoint sample = {NAN, 0.0f, 0.0f};
          if (first + lane < points) sample = load_sample(list, query * params.points + first + lane);
          const float floor_x = floorf(sample.x), floor_y = floorf(sample.y);
          const int x = isnan(sample.x) ? INT_MIN : static_cast<int>(floor_x);
          const int y = isnan(sample.x) ? INT_MIN : static_cast<int>(floor_y);
          const bool hit = meets({x, x, y, y});
          const unsigned hit_lanes = __ballot_sync(kFullWarp, hit);
          if (hit) {
            hits[__popc(hit_lanes & ((1u << lane) - 1))] = {sample.x, sample.y, sample.attention,
                                                            by_points.divide(first + lane)};
          }
          __syncwarp();
          const int count = __popc(hit_lanes);
#pragma unroll 4
          for (int i = 0; i < count; ++i) {
            const Hit at = hits[i];
            float grad = 0.0f;
            if (active) {
              const std::int64_t offset = b * params.grad_output_stride_b +
                                          (query + at.query) * params.grad_output_stride_q +
                                          h * params.channels + channel;
              switch (params.value_dtype) {
                case DType::bfloat16:
                  grad = to_float(static_cast<const __nv_bfloat16*>(params.grad_output)[offset]);
                  break;
                case DType::float16:
                  grad = to_float(static_cast<const __half*>(params.grad_output)[offset]);
                  break;
                default: grad = static_cast<const float*>(params.grad_output)[offset];
              }
            }
            const float cell_x = floorf(at.x), cell_y = floorf(at.y);
            const float fx = at.x - cell_x, fy = at.y - cell_y;
            const int left = static_cast<int>(cell_x) - tile_x, top = static_cast<int>(cell_y) - tile_y;
            const float right_weight = at.attention * fx, left_weight = at.attention * (1.0f - fx);
            // The same for all lanes. Pixels of the tile outside the image are added to, and not stored.
            const auto add = [&](int pixel_x, int pixel_y, float weight) {
              if (static_cast<unsigned>(pixel_x) < static_cast<unsigned>(edge) &&
                  static_cast<unsigned>(pixel_y) < static_cast<unsigned>(edge)) {
                float* const sum = sums + (pixel_y * edge + pixel_x) * kWarpSize;
                *sum = fmaf(weight, grad, *sum);
              }
            };
            add(left, top, left_weight * (1.0f - fy));
            add(left + 1, top, right_weight * (1.0f - fy));
            add(left, top + 1, left_weight * fy);
            add(left + 1, top + 1, right_weight * fy);
          }
          __syncwarp();
        }
      }
    }
    if (active) {
      for (int i = 0; i < edge * edge; ++i) {
        const int x = tile_x + i % edge, y = tile_y + i / edge;
        if (x < level.width && y < level.height) {
          const std::int64_t row =
              b * params.pixels + level.start + static_cast<std::int64_t>(y) * level.width + x;
          params.grad_value_sums[(row * params.heads + h) * params.channels + channel] += sums[i * kWarpSize];
        }
      }
    }
  }
}

}  // namespace

Status ms_deform_attn_gather_grad_value(const MsDeformAttnParams& params, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const std::int64_t chunks = divide_up(params.queries, kQueriesPerBounds);
  const std::int64_t bounds_tasks = params.batch * params.heads * params.levels * chunks;
  const Status status = launch("ms_deform_attn_backward: bounds", bounds_kernel,
                               grid_for(divide_up(bounds_tasks, kWarps)), kThreads, 0, stream, params);
  if (!status.ok()) return status;
  // At least the number of tiles, which is not known here when the levels are in device memory.
  const std::int64_t tasks =
      params.batch * params.heads * divide_up(params.channels, kWarpSize) * params.pixels;
  for (int level = 0; level < params.levels; ++level) {
    const Status status = launch("ms_deform_attn_backward: gather", gather_kernel,
                                 grid_for(divide_up(tasks, kWarps)), kThreads, 0, stream, params, level);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace visionllm::cuda
