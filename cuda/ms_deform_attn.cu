// Multi-scale deformable attention, forward: the sum over an item's L * P points of attention *
// bilinear(value). The contract is in visionllm/ms_deform_attn.h, the division of work in
// ms_deform_attn_points.cuh.
//
// Counted for the paper's encoder (B = 1, Q = S = 22223, 8 heads of 32 bfloat16 channels, L = P = 4, offsets
// up to 4 pixels as in sample_inputs):
//   compulsory   57 MB: value 11.4, locations 22.8, float32 weights 11.4, output 11.4. Device memory sees no
//                more, as value stays in L2. Fused, offsets and logits take the place of locations and
//                weights.
//   gathered     10.1 M rows of 64 bytes = 645 MB (11 % of the corners are outside and not read). A block's 8
//                x 8 queries read a row 5.9 times, so that 108 MB come from L2; 32 queries in a row would
//                read it 2.6 times.
//   arithmetic   0.73 GFLOP; 105 instructions for one point of each of a warp's 8 items, 32 of them FFMA.
#include "ms_deform_attn_points.cuh"

namespace visionllm::cuda {
namespace {

// 128 items of 32 channels in bfloat16: 8 x 8 queries of two heads. The 8 x 4 queries of 256 threads would
// read a row 4.1 times in the place of 5.9.
constexpr int kMaxThreads = 512;

// The way from where the lane's channels begin in pixel 0 to the cell's top left pixel, in bytes for vectors
// and in 16ths of an element otherwise: in both the low four bits are free, and hold the corners' bits. And
// the way from there to the pixel below it, in bytes.
struct alignas(16) Place {
  std::int64_t top_left, below;
};

template <typename T, int kVector, bool kFused>
__global__ void __launch_bounds__(kMaxThreads, 2)
    ms_deform_attn_kernel(const __grid_constant__ MsDeformAttnParams params,
                          const __grid_constant__ Partition partition) {
  VISIONLLM_SHARED_ARRAY(DeformLevel, levels, kMaxLevels);
  VISIONLLM_SHARED_ARRAY(CornerWeights, weights, kMaxThreads);
  VISIONLLM_SHARED_ARRAY(Place, places, kMaxThreads);
  load_levels(params, levels);
  __syncthreads();

  const int lanes = 1 << partition.lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int group = threadIdx.x - lane;  // the group's first place in shared memory
  const int total = params.levels * params.points;
  const SmallDivisor by_points(params.points);
  const std::int64_t stride = params.value_stride_s * static_cast<int>(sizeof(T));  // bytes

  for (std::int64_t piece = blockIdx.x; piece < partition.pieces; piece += gridDim.x) {
    const Item item = item_of(params, partition, piece, threadIdx.x >> partition.lanes_log2);
    const PointSource source(params, item);
    Softmax softmax;
    if constexpr (kFused)
      softmax = softmax_of<T>(params, params.attention, source.attention, total, item.valid, lane, lanes);

    std::int64_t round = 0;
    do {  // vectors: once; else the lanes walk over the channels
      const std::int64_t channel = round + lane * kVector;
      const bool active = item.valid && channel < params.channels;
      const char* value =
          reinterpret_cast<const char*>(static_cast<const T*>(params.value) + item.b * params.value_stride_b +
                                        item.h * params.value_stride_h + channel);
      float sum[kVector] = {};
      for (int first = 0; first < total; first += lanes) {
        CornerWeights weight = {};
        Place place = {};
        if (item.valid && first + lane < total) {
          float x, y;
          const Point point =
              locate<T, kFused>(params, source, levels, by_points, first + lane, softmax, &x, &y);
          weight = weights_of(point);
          place.top_left =
              row_of(point) * (kVector == 1 ? params.value_stride_s * 16 : stride) + point.inside;
          place.below = point.level.width * stride;
        }
        weights[threadIdx.x] = weight;
        places[threadIdx.x] = place;
        __syncwarp();
        const int count = min(lanes, total - first);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const Place at = places[group + i];
          const CornerWeights w = weights[group + i];
          const unsigned inside = active ? static_cast<unsigned>(at.top_left) & 15u : 0u;
          const char* top = value + (kVector == 1 ? (at.top_left >> 4) * static_cast<int>(sizeof(T))
                                                  : at.top_left & ~std::int64_t{15});
          const char* bottom = top + at.below;
          // All four loads first: their latency is paid once.
          const Channels<T, kVector> v00 = load_channels<T, kVector>(top, inside & kTopLeft);
          const Channels<T, kVector> v01 = load_channels<T, kVector>(top + stride, inside & kTopRight);
          const Channels<T, kVector> v10 = load_channels<T, kVector>(bottom, inside & kBottomLeft);
          const Channels<T, kVector> v11 = load_channels<T, kVector>(bottom + stride, inside & kBottomRight);
          float values[kVector];
          to_floats<T>(values, v00);
          add_scaled(sum, w.top_left, values);
          to_floats<T>(values, v01);
          add_scaled(sum, w.top_right, values);
          to_floats<T>(values, v10);
          add_scaled(sum, w.bottom_left, values);
          to_floats<T>(values, v11);
          add_scaled(sum, w.bottom_right, values);
        }
        __syncwarp();
      }
      if (active) {
        T* output = static_cast<T*>(params.output) +
                    ((item.b * params.queries + item.q) * params.heads + item.h) * params.channels + channel;
        store_floats(output, sum);
      }
      round += lanes;
    } while (kVector == 1 && round < params.channels);
  }
}

}  // namespace

Status ms_deform_attn(const MsDeformAttnParams& params, void* stream) {
  const bool vectorized = is_vectorizable(params) && is_aligned(params.output, 16);
  return dispatch(params, vectorized, [&](auto type, auto vector) {
    using T = decltype(type);
    constexpr int kVector = decltype(vector)::value;
    int threads = 0;
    if (Status status = threads_for(params, kVector, kMaxThreads, &threads); !status.ok()) return status;
    const Partition partition = partition_of(params, kVector, threads);
    const auto kernel = params.reference != nullptr ? ms_deform_attn_kernel<T, kVector, true>
                                                    : ms_deform_attn_kernel<T, kVector, false>;
    return launch("ms_deform_attn", kernel, grid_for(partition.pieces), threads, 0,
                  static_cast<cudaStream_t>(stream), params, partition);
  });
}

}  // namespace visionllm::cuda
