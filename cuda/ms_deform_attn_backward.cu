// Multi-scale deformable attention, backward. With g the gradient by an item's output, and for one of its
// points v_c, w_c, a the corners' rows of value, their bilinear weights and the attention:
//
//   grad_value[corner c] += a w_c g        grad_attention = sum over c of w_c <g, v_c>
//   grad_location        =  a size * sum over c of d w_c / d pixel <g, v_c>
//
// and, fused, grad_logit = a (grad_attention - sum over points of a grad_attention). The contract is in
// visionllm/ms_deform_attn.h, the division of work in ms_deform_attn_points.cuh.
//
// grad_value is summed in float32 by atomic additions of 16 bytes (sm_90) or 4, in no fixed order; or,
// deterministic, this kernel writes a list of its points and ms_deform_attn_deterministic.cu adds them up.
//
// Counted for the paper's encoder, as in ms_deform_attn.cu:
//   compulsory   103 MB: value, locations, weights and grad_output read, three gradients written.
//   besides      for 16-bit values, float32 sums are zeroed, added to in L2 and read again, 22.8 MB each.
//   gathered     645 MB, of which tiles of 8 x 4 queries leave 158 MB for L2.
//   atomics      80.6 M additions of 16 bytes = 1289 MB to L2, which would be 322 M one by one. Of the points
//                of one item and level 11 to 29 % share a cell with another: merging these in registers does
//                not pay for the 32 registers it takes. Summing a block's tile in shared memory first would
//                leave a quarter, but float32 is added there by compare-and-swap loops, channel by channel.
//   arithmetic   2.2 GFLOP.
#include "ms_deform_attn_points.cuh"

namespace visionllm::cuda {
namespace {

constexpr int kMaxThreads = 256;

// Shared memory for what the fused form keeps: two such blocks fit on every multiprocessor. At least one warp
// of single lanes with L * P = 128 points, which is 16 KiB.
constexpr std::size_t kMaxKeptBytes = 32 * 1024;

// The way from where the lane's channels begin in pixel 0 to the cell's top left pixel of value, as in
// ms_deform_attn.cu; and for grad_value, whose strides differ, the pixel's number and the level's width.
struct alignas(16) Place {
  std::int64_t top_left;
  std::int32_t row, width;
};

// target[c] += factor * values[c], in one 16-byte access for 4 channels where the GPU has one.
template <int kVector>
__device__ __forceinline__ void add_atomically(float* target, float factor, const float (&values)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kVector % 4 == 0) {
#pragma unroll
    for (int c = 0; c < kVector; c += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + c),
                make_float4(factor * values[c], factor * values[c + 1], factor * values[c + 2],
                            factor * values[c + 3]));
    }
    return;
  }
#endif
#pragma unroll
  for (int c = 0; c < kVector; ++c) atomicAdd(target + c, factor * values[c]);
}

// <g, v> of one corner over the lane's channels, and its part of grad_value.
template <typename T, int kVector>
__device__ __forceinline__ float visit_corner(Channels<T, kVector> channels, const float (&grad)[kVector],
                                              bool inside, float weight, float* sums) {
  float values[kVector];
  to_floats<T>(values, channels);
  float dot = 0.0f;
#pragma unroll
  for (int c = 0; c < kVector; ++c) dot = fmaf(grad[c], values[c], dot);
  if (inside && sums != nullptr) add_atomically(sums, weight, grad);
  return dot;
}

template <typename T>
__device__ __forceinline__ void store_attention(const MsDeformAttnParams& params, void* base, std::int64_t i,
                                                float value) {
  if (params.attention_dtype == DType::float32) {
    static_cast<float*>(base)[i] = value;
  } else {
    static_cast<T*>(base)[i] = from_float<T>(value);
  }
}

// Fused with boxes as references: d location / d offset.
__device__ __forceinline__ float half_over_points(const MsDeformAttnParams& params) {
  return 0.5f / static_cast<float>(params.points);
}

// A point whose offset or box is not finite contributes nothing, and has no gradient.
__device__ __forceinline__ float scaled(float grad, float factor) {
  return grad == 0.0f ? 0.0f : grad * factor;
}

template <typename T, int kVector, bool kFused>
__global__ void __launch_bounds__(kMaxThreads, 2)
    ms_deform_attn_backward_kernel(const __grid_constant__ MsDeformAttnParams params,
                                   const __grid_constant__ Partition partition) {
  VISIONLLM_SHARED_ARRAY(DeformLevel, levels, kMaxLevels);
  VISIONLLM_SHARED_ARRAY(CornerWeights, weights, kMaxThreads);
  VISIONLLM_SHARED_ARRAY(Place, places, kMaxThreads);
  VISIONLLM_DYNAMIC_SHARED(dynamic);  // fused: gradients by the attention, [items of the block, L * P]
  load_levels(params, levels);
  __syncthreads();

  const int lanes = 1 << partition.lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int group = threadIdx.x - lane;
  const int number = threadIdx.x >> partition.lanes_log2;
  const int total = params.levels * params.points;
  const SmallDivisor by_points(params.points);
  const std::int64_t stride = params.value_stride_s * static_cast<int>(sizeof(T));  // bytes
  const std::int64_t sums_stride = params.heads * params.channels;
  float* const kept = reinterpret_cast<float*>(dynamic) + number * total;  // read by the lane that wrote it

  for (std::int64_t piece = blockIdx.x; piece < partition.pieces; piece += gridDim.x) {
    const Item item = item_of(params, partition, piece, number);
    const PointSource source(params, item);
    const std::int64_t first_point = ((item.b * params.queries + item.q) * params.heads + item.h) * total;
    Softmax softmax;
    if constexpr (kFused)
      softmax = softmax_of<T>(params, params.attention, source.attention, total, item.valid, lane, lanes);

    const std::int64_t channel = lane * kVector;  // with vectors the lane's only channels
    const bool active = item.valid && channel < params.channels;
    const char* const value =
        reinterpret_cast<const char*>(static_cast<const T*>(params.value) + item.b * params.value_stride_b +
                                      item.h * params.value_stride_h + channel);
    const T* const grad_output = static_cast<const T*>(params.grad_output) +
                                 item.b * params.grad_output_stride_b + item.q * params.grad_output_stride_q +
                                 item.h * params.channels + channel;
    float* const sums = params.deterministic
                            ? nullptr
                            : params.grad_value_sums +
                                  (item.b * params.pixels * params.heads + item.h) * params.channels +
                                  channel;
    float grad[kVector];
    if constexpr (kVector > 1) to_floats<T>(grad, load_channels<T, kVector>(grad_output, active));

    float expectation = 0.0f;  // fused: sum over the lane's points of a grad_attention
    for (int first = 0; first < total; first += lanes) {
      CornerWeights weight = {};
      Place place = {};
      Point own = {};
      const int p = first + lane;
      const bool has_point = item.valid && p < total;
      if (has_point) {
        SampledPoint sample;
        own = locate<T, kFused>(params, source, levels, by_points, p, softmax, &sample.x, &sample.y);
        weight = weights_of(own);
        place.row = row_of(own);
        place.width = own.level.width;
        place.top_left = place.row * (kVector == 1 ? params.value_stride_s * 16 : stride) + own.inside;
        if (params.deterministic) {
          const int l = by_points.divide(p);
          sample.attention = own.attention;
          float* const list =
              params.samples +
              3 * ((((item.b * params.heads + item.h) * params.levels + l) * params.queries + item.q) *
                       params.points +
                   (p - l * params.points));
          list[0] = sample.x, list[1] = sample.y, list[2] = sample.attention;
        }
      }
      weights[threadIdx.x] = weight;
      places[threadIdx.x] = place;
      __syncwarp();

      float own_dots[4] = {};
      const int count = min(lanes, total - first);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const Place at = places[group + i];
        const CornerWeights w = weights[group + i];
        const unsigned inside = item.valid ? static_cast<unsigned>(at.top_left) & 15u : 0u;
        float dots[4] = {};
        std::int64_t round = 0;
        do {  // vectors: once; else the lanes walk over the channels
          const unsigned visited = active ? inside : 0u;
          const char* const top = value + round * static_cast<int>(sizeof(T)) +
                                  (kVector == 1 ? (at.top_left >> 4) * static_cast<int>(sizeof(T))
                                                : at.top_left & ~std::int64_t{15});
          const char* const bottom = top + at.width * stride;
          const Channels<T, kVector> v00 = load_channels<T, kVector>(top, visited & kTopLeft);
          const Channels<T, kVector> v01 = load_channels<T, kVector>(top + stride, visited & kTopRight);
          const Channels<T, kVector> v10 = load_channels<T, kVector>(bottom, visited & kBottomLeft);
          const Channels<T, kVector> v11 = load_channels<T, kVector>(bottom + stride, visited & kBottomRight);
          if constexpr (kVector == 1)
            to_floats<T>(grad, load_channels<T, kVector>(grad_output + round, active));
          float* const top_sums = sums == nullptr ? nullptr : sums + round + at.row * sums_stride;
          float* const bottom_sums = sums == nullptr ? nullptr : top_sums + at.width * sums_stride;
          float* const top_right = sums == nullptr ? nullptr : top_sums + sums_stride;
          float* const bottom_right = sums == nullptr ? nullptr : bottom_sums + sums_stride;
          dots[0] += visit_corner<T, kVector>(v00, grad, visited & kTopLeft, w.top_left, top_sums);
          dots[1] += visit_corner<T, kVector>(v01, grad, visited & kTopRight, w.top_right, top_right);
          dots[2] += visit_corner<T, kVector>(v10, grad, visited & kBottomLeft, w.bottom_left, bottom_sums);
          dots[3] +=
              visit_corner<T, kVector>(v11, grad, visited & kBottomRight, w.bottom_right, bottom_right);
          round += lanes;
        } while (kVector == 1 && channel + round < params.channels);
        __syncwarp();
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
          for (int c = 0; c < 4; ++c) dots[c] += __shfl_xor_sync(kFullWarp, dots[c], offset);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) own_dots[c] = lane == i ? dots[c] : own_dots[c];
      }

      if (has_point) {
        const float left = 1.0f - own.fx, above = 1.0f - own.fy;
        const float by_attention = above * (left * own_dots[0] + own.fx * own_dots[1]) +
                                   own.fy * (left * own_dots[2] + own.fx * own_dots[3]);
        // By the place in pixels.
        float by_x =
            own.attention * (above * (own_dots[1] - own_dots[0]) + own.fy * (own_dots[3] - own_dots[2]));
        float by_y =
            own.attention * (left * (own_dots[2] - own_dots[0]) + own.fx * (own_dots[3] - own_dots[1]));
        if (!kFused || params.reference_size == 4) {  // else offsets are in pixels
          by_x *= static_cast<float>(own.level.width);
          by_y *= static_cast<float>(own.level.height);
        }
        if constexpr (kFused) {
          kept[p] = by_attention;
          expectation = fmaf(own.attention, by_attention, expectation);
          if (params.reference_size == 4 && params.grad_reference == nullptr) {  // else by the kernel below
            const float* const box =
                params.reference + source.reference + by_points.divide(p) * params.reference_stride_l;
            by_x = scaled(by_x, half_over_points(params) * box[2]);
            by_y = scaled(by_y, half_over_points(params) * box[3]);
          }
        } else {
          store_attention<T>(params, params.grad_attention, first_point + p, by_attention);
        }
        params.grad_locations[2 * (first_point + p)] = by_x;
        params.grad_locations[2 * (first_point + p) + 1] = by_y;
      }
      __syncwarp();
    }
    if constexpr (kFused) {
      expectation = group_sum(expectation, lanes);
      if (item.valid) {
        for (int p = lane; p < total; p += lanes) {
          const float logit = load_attention<T>(params, params.attention, source.attention + p);
          const float attention = expf(logit - softmax.maximum) * softmax.scale;
          store_attention<T>(params, params.grad_attention, first_point + p,
                             attention * (kept[p] - expectation));
        }
      }
    }
  }
}

// Fused: sums the references' gradients over heads and points in a fixed order. Where the references are
// boxes, grad_locations holds gradients by the locations and becomes the offsets'.
constexpr int kReferenceThreads = 128;

__global__ void __launch_bounds__(kReferenceThreads)
    reference_gradient_kernel(const __grid_constant__ MsDeformAttnParams params) {
  VISIONLLM_SHARED_ARRAY(DeformLevel, levels, kMaxLevels);
  load_levels(params, levels);
  __syncthreads();
  const std::int64_t items = params.batch * params.queries * params.levels;
  for (std::int64_t i = blockIdx.x * std::int64_t{kReferenceThreads} + threadIdx.x; i < items;
       i += gridDim.x * std::int64_t{kReferenceThreads}) {
    const int l = static_cast<int>(i % params.levels);
    const std::int64_t q = i / params.levels % params.queries, b = i / params.levels / params.queries;
    const bool boxes = params.reference_size == 4;
    const float* const reference = params.reference + b * params.reference_stride_b +
                                   q * params.reference_stride_q + l * params.reference_stride_l;
    const float half = half_over_points(params);
    float centre_x = 0.0f, centre_y = 0.0f, size_x = 0.0f, size_y = 0.0f;
    for (std::int64_t h = 0; h < params.heads; ++h) {
      float* grad = params.grad_locations +
                    2 * (((b * params.queries + q) * params.heads + h) * params.levels + l) * params.points;
      const float* offset = params.locations + b * params.locations_stride_b + q * params.locations_stride_q +
                            h * params.locations_stride_h + 2 * l * params.points;
      for (int p = 0; p < params.points; ++p, grad += 2, offset += 2) {
        const float x = grad[0], y = grad[1];
        centre_x += x;
        centre_y += y;
        if (boxes) {
          size_x += scaled(x, half * offset[0]);
          size_y += scaled(y, half * offset[1]);
          grad[0] = scaled(x, half * reference[2]);
          grad[1] = scaled(y, half * reference[3]);
        }
      }
    }
    float* const target = params.grad_reference + i * params.reference_size;
    if (boxes) {
      target[0] = centre_x, target[1] = centre_y, target[2] = size_x, target[3] = size_y;
    } else {
      target[0] = centre_x * static_cast<float>(levels[l].width);
      target[1] = centre_y * static_cast<float>(levels[l].height);
    }
  }
}

constexpr int kCopyThreads = 256;

// Four elements a thread; what is left over, or all of it where `target` is not aligned, one by one.
__global__ void __launch_bounds__(kCopyThreads)
    fill_zero_kernel(float* target, std::int64_t size, bool aligned) {
  const std::int64_t thread = blockIdx.x * std::int64_t{kCopyThreads} + threadIdx.x;
  const std::int64_t threads = gridDim.x * std::int64_t{kCopyThreads};
  const std::int64_t vectors = aligned ? size / 4 : 0;
  for (std::int64_t i = thread; i < vectors; i += threads)
    reinterpret_cast<float4*>(target)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (std::int64_t i = 4 * vectors + thread; i < size; i += threads) target[i] = 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kCopyThreads)
    convert_kernel(T* target, const float* source, std::int64_t size, bool aligned) {
  const std::int64_t thread = blockIdx.x * std::int64_t{kCopyThreads} + threadIdx.x;
  const std::int64_t threads = gridDim.x * std::int64_t{kCopyThreads};
  const std::int64_t vectors = aligned ? size / 8 : 0;
  for (std::int64_t i = thread; i < vectors; i += threads) {
    float values[8];
    load_floats(values, source + 8 * i);
    store_floats(target + 8 * i, values);
  }
  for (std::int64_t i = 8 * vectors + thread; i < size; i += threads) target[i] = from_float<T>(source[i]);
}

Status fill_zero(float* target, std::int64_t size, cudaStream_t stream) {
  return launch("ms_deform_attn_backward: zeros", fill_zero_kernel,
                grid_for(divide_up(size, 4 * kCopyThreads)), kCopyThreads, 0, stream, target, size,
                is_aligned(target, 16));
}

template <typename T, int kVector>
Status launch_points(const MsDeformAttnParams& params, cudaStream_t stream) {
  int threads = 0;
  if (Status status = threads_for(params, kVector, kMaxThreads, &threads); !status.ok()) return status;
  Partition partition = partition_of(params, kVector, threads);
  const bool fused = params.reference != nullptr;
  const auto kept_bytes = [&]() -> std::size_t {
    return fused ? sizeof(float) * (threads >> partition.lanes_log2) * params.levels * params.points : 0;
  };
  while (kept_bytes() > kMaxKeptBytes) partition = partition_of(params, kVector, threads /= 2);
  const auto kernel = fused ? ms_deform_attn_backward_kernel<T, kVector, true>
                            : ms_deform_attn_backward_kernel<T, kVector, false>;
  return launch("ms_deform_attn_backward", kernel, grid_for(partition.pieces), threads, kept_bytes(), stream,
                params, partition);
}

template <typename T>
Status convert(const MsDeformAttnParams& params, std::int64_t size, cudaStream_t stream) {
  const bool aligned = is_aligned(params.grad_value, 16) && is_aligned(params.grad_value_sums, 16);
  return launch("ms_deform_attn_backward: grad_value", convert_kernel<T>,
                grid_for(divide_up(size, 8 * kCopyThreads)), kCopyThreads, 0, stream,
                static_cast<T*>(params.grad_value), params.grad_value_sums, size, aligned);
}

}  // namespace

Status ms_deform_attn_backward(const MsDeformAttnParams& params, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const std::int64_t size = params.batch * params.pixels * params.heads * params.channels;
  const bool has_points = params.batch * params.queries * params.heads * params.levels * params.points > 0;
  const bool converts = params.value_dtype != DType::float32;  // else grad_value is summed in place
  if (size > 0) {
    if (Status status = fill_zero(params.grad_value_sums, size, stream); !status.ok()) return status;
  }
  if (has_points) {
    const std::int64_t vector = 16 / element_bytes(params.value_dtype);
    const bool vectorized = is_vectorizable(params) && is_aligned(params.grad_output, 16) &&
                            params.grad_output_stride_b % vector == 0 &&
                            params.grad_output_stride_q % vector == 0 &&
                            is_aligned(params.grad_value_sums, 16);
    const Status status = dispatch(params, vectorized, [&](auto type, auto vector_size) {
      return launch_points<decltype(type), decltype(vector_size)::value>(params, stream);
    });
    if (!status.ok()) return status;
  }
  const std::int64_t references = params.batch * params.queries * params.levels;
  if (params.grad_reference != nullptr && references > 0) {
    const Status status =
        launch("ms_deform_attn_backward: grad_reference", reference_gradient_kernel,
               grid_for(divide_up(references, kReferenceThreads)), kReferenceThreads, 0, stream, params);
    if (!status.ok()) return status;
  }
  if (params.deterministic && has_points && size > 0) {
    if (Status status = ms_deform_attn_gather_grad_value(params, stream_pointer); !status.ok()) return status;
  }
  if (!converts || size == 0) return {};
  return params.value_dtype == DType::bfloat16 ? convert<__nv_bfloat16>(params, size, stream)
                                               : convert<__half>(params, size, stream);
}

}  // namespace visionllm::cuda
