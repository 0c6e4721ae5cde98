// The sums over rows in the backward of fusion_attention; what they are is in fusion_attention_backward.cu. They
// read the tensors that its row kernel leaves in the workspace.
#include "fusion_attention.h"
#include "fusion_attention_tile.cuh"

namespace visionllm::cuda::fusion {
namespace {

// ---- keys -----------------------------------------------------------------------------------------------

constexpr int kKeyThreads = Workspace::kKeyWarps * kWarpSize;

// Rows of queries and their gradients in shared memory at a time.
template <typename T>
constexpr int kKeyRows = Tile<T>::kRows;

// Elements from one row of a head to the next: an odd number of 16-byte units of 16-bit elements, 8 or 24 words
// (of 32 banks) for float32.
__host__ __device__ constexpr int head_stride(int head_channels) { return (head_channels / 8 | 1) * 8; }

// Keys and values, then two stages of queries and grad_attended, then two of logsumexp and mean. Tails of heads
// are read in units of 16, up to 8 elements too far.
template <typename T>
__host__ __device__ constexpr int key_shared_bytes(int head_channels) {
  return (2 * 16 * Workspace::kKeyWarps + 4 * kKeyRows<T>)*head_stride(head_channels) *
             static_cast<int>(sizeof(T)) +
         4 * kKeyRows<T> * 4;
}

template <typename T>
__global__ void __launch_bounds__(kKeyThreads, 3)
    fusion_attention_backward_keys_kernel(const Params params, const Workspace layout) {
  VISIONLLM_DYNAMIC_SHARED(shared);
  using P = Product<T>;
  constexpr int kVector = kVectorSize<T>, kRows = kKeyRows<T>;
  const FusionAttentionParams& forward = params.forward;
  const int head_channels = forward.head_channels, stride = head_stride(head_channels);
  const int vectors = head_channels / kVector;
  const int key_warps = layout.key_warps, row_warps = Workspace::kKeyWarps / key_warps;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int key_group = warp % key_warps * 16, row_group = warp / key_warps;

  std::int64_t index = blockIdx.x;
  const int slice = static_cast<int>(index % layout.key_slices);
  index /= layout.key_slices;
  const int block = static_cast<int>(index % layout.key_blocks);
  index /= layout.key_blocks;
  const int head = static_cast<int>(index % forward.heads);
  const std::int64_t b = index / forward.heads;
  const int first_key = block * 16 * key_warps;
  const std::int64_t begin = slice * layout.key_rows;
  const std::int64_t end =
      begin + layout.key_rows < forward.positions ? begin + layout.key_rows : forward.positions;

  T* const keys = reinterpret_cast<T*>(shared);
  T* const values = keys + 16 * Workspace::kKeyWarps * stride;
  T* const stages = values + 16 * Workspace::kKeyWarps * stride;  // [2][queries, gradients][kRows][stride]
  float* const numbers = reinterpret_cast<float*>(stages + 4 * kRows * stride);  // [2][2][kRows]

  const std::uint8_t* const mask = forward.mask + b * forward.tokens;
  const auto is_text = [&](int key) { return key < forward.tokens && mask[key] != 0; };
  const T* const key =
      static_cast<const T*>(forward.key) + b * forward.key_stride_b + head * forward.key_stride_h;
  const T* const value =
      static_cast<const T*>(forward.value) + b * forward.value_stride_b + head * forward.value_stride_h;
  for (int i = threadIdx.x; i < 16 * key_warps * vectors; i += kKeyThreads) {
    const int row = i / vectors, column = (i - row * vectors) * kVector;
    const bool text = is_text(first_key + row);
    copy_async_16(keys + row * stride + column,
                  text ? key + (first_key + row) * forward.key_stride_t + column : key, text);
    copy_async_16(values + row * stride + column,
                  text ? value + (first_key + row) * forward.value_stride_t + column : value, text);
  }
  float bias[2];  // of the lane's two keys
#pragma unroll
  for (int k = 0; k < 2; ++k) bias[k] = is_text(first_key + key_group + k * 8 + g) ? 0.0f : -INFINITY;

  const std::int64_t entry = b * forward.positions * forward.channels + head * head_channels;
  const T* const query = reinterpret_cast<const T*>(params.workspace + layout.query) + entry;
  const T* const grad_attended = reinterpret_cast<const T*>(params.workspace + layout.grad_attended) + entry;
  const std::int64_t head_rows = (b * forward.heads + head) * forward.positions;
  const float* const logsumexp =
      reinterpret_cast<const float*>(params.workspace + layout.logsumexp) + head_rows;
  const float* const mean = reinterpret_cast<const float*>(params.workspace + layout.mean) + head_rows;
  const auto copy = [&](std::int64_t first, int stage) {
    T* const queries = stages + stage * 2 * kRows * stride;
    for (int i = threadIdx.x; i < kRows * vectors; i += kKeyThreads) {
      const int row = i / vectors, column = (i - row * vectors) * kVector;
      const bool valid = first + row < end;
      const std::int64_t place = valid ? (first + row) * forward.channels + column : 0;
      copy_async_16(queries + row * stride + column, query + place, valid);
      copy_async_16(queries + (kRows + row) * stride + column, grad_attended + place, valid);
    }
    for (int row = threadIdx.x; row < kRows; row += kKeyThreads) {
      const bool valid = first + row < end;
      const std::int64_t place = valid ? first + row : 0;
      copy_async_4(numbers + stage * 2 * kRows + row, logsumexp + place, valid);
      copy_async_4(numbers + stage * 2 * kRows + kRows + row, mean + place, valid);
    }
    copy_async_commit();
  };

  float grad_key[kFusionMaxHeadChannels / 8][4], grad_value[kFusionMaxHeadChannels / 8][4];
  clear(grad_key);
  clear(grad_value);
  copy(begin, 0);
  int stage = 0;
  for (std::int64_t first = begin; first < end; first += kRows, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other any more
    if (first + kRows < end) copy(first + kRows, stage ^ 1);
    // Rows behind the last are zeros and add nothing.
    for (int sub = row_group * 16; sub < kRows; sub += row_warps * 16) {
      const T* const queries = stages + (stage * 2 * kRows + sub) * stride;
      const T* const grads = queries + kRows * stride;
      float scores[2][4] = {}, grad_scores[2][4] = {};  // [16 keys, 16 rows]
      for (int k = 0; k < head_channels; k += P::kDepth) {
        const bool half = k + P::kDepth > head_channels;
        typename P::Left left;
        typename P::Right right[2];
        P::load_left(left, keys + key_group * stride + k, stride, half);
        P::load_right(right, queries + k, stride, half);
        P::multiply(scores[0], left, right[0]);
        P::multiply(scores[1], left, right[1]);
        P::load_left(left, values + key_group * stride + k, stride, half);
        P::load_right(right, grads + k, stride, half);
        P::multiply(grad_scores[0], left, right[0]);
        P::multiply(grad_scores[1], left, right[1]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* const place = numbers + stage * 2 * kRows + sub + j * 8 + t * 2;
        const Vector<float, 2> log_sum = load_vector<float, 2>(place);
        const Vector<float, 2> dot = load_vector<float, 2>(place + kRows);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float weight = exp2f(scores[j][2 * k + i] + bias[k] - log_sum[i]);
            scores[j][2 * k + i] = weight;
            grad_scores[j][2 * k + i] = weight * (grad_scores[j][2 * k + i] - dot[i]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 16 / P::kDepth; ++k) {
        typename P::Left weights, grad_weights;
        P::left_of_accumulators(weights, scores + k * P::kAccumulators);
        P::left_of_accumulators(grad_weights, grad_scores + k * P::kAccumulators);
#pragma unroll
        for (int j = 0; j < kFusionMaxHeadChannels / 16; ++j) {
          if (j * 16 < head_channels) {
            const bool both = j * 16 + 8 < head_channels;
            typename P::Right right[2];
            P::load_right_transposed(right, grads + k * P::kDepth * stride + j * 16, stride, both);
            P::multiply(grad_value[2 * j], weights, right[0]);
            if (both) P::multiply(grad_value[2 * j + 1], weights, right[1]);
            P::load_right_transposed(right, queries + k * P::kDepth * stride + j * 16, stride, both);
            P::multiply(grad_key[2 * j], grad_weights, right[0]);
            if (both) P::multiply(grad_key[2 * j + 1], grad_weights, right[1]);
          }
        }
      }
    }
  }

  const std::int64_t slice_size = forward.batch * forward.tokens * forward.channels;
  float* const key_sums = reinterpret_cast<float*>(params.workspace + layout.key_sums) +
                          (slice * row_warps + row_group) * slice_size;
  float* const value_sums = key_sums + layout.key_partials * slice_size;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int token = first_key + key_group + k * 8 + g;
    if (token < forward.tokens) {
      const std::int64_t place =
          (b * forward.tokens + token) * forward.channels + head * head_channels + t * 2;
#pragma unroll
      for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
        if (j * 8 < head_channels) {
          store_pair(key_sums + place + j * 8, grad_key[j][2 * k] * kLn2, grad_key[j][2 * k + 1] * kLn2);
          store_pair(value_sums + place + j * 8, grad_value[j][2 * k], grad_value[j][2 * k + 1]);
        }
      }
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------

constexpr int kSquare = Workspace::kSquare;
constexpr int kSquareStride = kSquare + kPadding;
constexpr int kWeightStages = 3;

// Rows in shared memory at a time.
template <typename T>
constexpr int kWeightRows = 64 / static_cast<int>(sizeof(T));

// left^T right over a slice of the rows; a block takes 128 x 128 elements, each of its 8 warps 32 x 64.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    fusion_attention_backward_weights_kernel(const Params params, const Workspace layout) {
  VISIONLLM_DYNAMIC_SHARED(shared);
  using P = Product<T>;
  constexpr int kVector = kVectorSize<T>, kRows = kWeightRows<T>;
  const FusionAttentionParams& forward = params.forward;
  const int channels = forward.channels, squares = (channels + kSquare - 1) / kSquare;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int index = blockIdx.x;
  const int column_0 = index % squares * kSquare;
  index /= squares;
  const int row_0 = index % squares * kSquare;
  index /= squares;
  const int which = index % 2;
  const std::int64_t slice = index / 2;
  const T* const left_rows = which == 0 ? reinterpret_cast<const T*>(params.workspace + layout.grad_query)
                                        : static_cast<const T*>(params.grad_output);
  const T* const right_rows =
      reinterpret_cast<const T*>(params.workspace + (which == 0 ? layout.normed : layout.attended));
  const std::int64_t rows = forward.batch * forward.positions, begin = slice * layout.weight_rows;
  const std::int64_t end = begin + layout.weight_rows < rows ? begin + layout.weight_rows : rows;
  const int steps = static_cast<int>((end - begin + kRows - 1) / kRows);

  T* const stages = reinterpret_cast<T*>(shared);  // [kWeightStages][left, right][kRows][kSquareStride]
  const auto copy = [&](int step) {
    if (step < steps) {
      T* const left = stages + step % kWeightStages * 2 * kRows * kSquareStride;
      for (int i = threadIdx.x; i < kRows * (kSquare / kVector); i += kThreads) {
        const int row = i / (kSquare / kVector), column = i % (kSquare / kVector) * kVector;
        const std::int64_t n = begin + static_cast<std::int64_t>(step) * kRows + row;
        const bool left_valid = n < end && row_0 + column < channels;
        const bool right_valid = n < end && column_0 + column < channels;
        copy_async_16(left + row * kSquareStride + column,
                      left_valid ? left_rows + n * channels + row_0 + column : left_rows, left_valid);
        copy_async_16(left + (kRows + row) * kSquareStride + column,
                      right_valid ? right_rows + n * channels + column_0 + column : right_rows, right_valid);
      }
    }
    copy_async_commit();
  };

  const int warp_row = warp % 4 * 32, warp_column = warp / 4 * 64;
  float acc[2][8][4] = {};
#pragma unroll
  for (int s = 0; s < kWeightStages - 1; ++s) copy(s);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kWeightStages - 2>();
    __syncthreads();
    copy(step + kWeightStages - 1);
    const T* const left_tile = stages + step % kWeightStages * 2 * kRows * kSquareStride;
    const T* const right_tile = left_tile + kRows * kSquareStride;
#pragma unroll
    for (int k = 0; k < kRows; k += P::kDepth) {
      typename P::Left left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        P::load_left_transposed(left[i], left_tile + k * kSquareStride + warp_row + i * 16, kSquareStride);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column_0 + warp_column + j * 16 < channels) {
          typename P::Right right[2];
          P::load_right_transposed(right, right_tile + k * kSquareStride + warp_column + j * 16,
                                   kSquareStride, true);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            P::multiply(acc[i][2 * j], left[i], right[0]);
            P::multiply(acc[i][2 * j + 1], left[i], right[1]);
          }
        }
      }
    }
  }

  float* const sums = reinterpret_cast<float*>(params.workspace + layout.weight_sums) +
                      (which * layout.weight_slices + slice) * channels * channels;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = row_0 + warp_row + i * 16 + k * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = column_0 + warp_column + j * 8 + lane % 4 * 2;
        if (row < channels && column < channels) {
          store_pair(sums + static_cast<std::int64_t>(row) * channels + column, acc[i][j][2 * k],
                     acc[i][j][2 * k + 1]);
        }
      }
    }
  }
}

// ---- finish ---------------------------------------------------------------------------------------------

// The sum of a value that each of the block's threads has; every thread gets it. `shared` holds kWarps floats.
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// The first C blocks finish a row of both weights and an element of each vector, the others a part of keys and
// values.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fusion_attention_backward_finish_kernel(const Params params, const Workspace layout) {
  VISIONLLM_SHARED_ARRAY(float, shared, kWarps);
  const FusionAttentionParams& forward = params.forward;
  const int channels = forward.channels;
  if (blockIdx.x >= static_cast<unsigned>(channels)) {
    const std::int64_t size = forward.batch * forward.tokens * channels;
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x - channels) * kThreads + threadIdx.x;
    if (i >= 2 * size) return;
    const bool is_value = i >= size;
    const float* const sums = reinterpret_cast<const float*>(params.workspace + layout.key_sums) +
                              (is_value ? (layout.key_partials - 1) * size : 0) + i;
    float sum = 0.0f;
    for (std::int64_t s = 0; s < layout.key_partials; ++s) sum += sums[s * size];
    T* const target = static_cast<T*>(is_value ? params.grad_value : params.grad_key);
    target[is_value ? i - size : i] = from_float<T>(sum);
    return;
  }
  const int c = blockIdx.x;
  const float gate = to_float(static_cast<const T*>(forward.gate)[c]);
  float vectors[kSums];
#pragma unroll
  for (int q = 0; q < kSums; ++q) {
    const float* const sums = reinterpret_cast<const float*>(params.workspace + layout.column_sums) +
                              (static_cast<std::int64_t>(q) * channels + c) * layout.tiles;
    float sum = 0.0f;
    for (std::int64_t i = threadIdx.x; i < layout.tiles; i += kThreads) sum += sums[i];
    vectors[q] = block_sum(sum, shared);
  }
  const int k = threadIdx.x;
  float dot = 0.0f;
  if (k < channels) {
    const std::int64_t place = static_cast<std::int64_t>(c) * channels + k, size = channels * channels;
    const float* const sums = reinterpret_cast<const float*>(params.workspace + layout.weight_sums) + place;
    float query = 0.0f, output = 0.0f;
    for (std::int64_t s = 0; s < layout.weight_slices; ++s) {
      query += sums[s * size];
      output += sums[(layout.weight_slices + s) * size];
    }
    static_cast<T*>(params.grad_query_weight)[place] = from_float<T>(query);
    static_cast<T*>(params.grad_output_weight)[place] = from_float<T>(gate * output);
    dot = output * to_float(static_cast<const T*>(forward.output_weight)[place]);
  }
  dot = block_sum(dot, shared);
  if (threadIdx.x == 0) {
    static_cast<T*>(params.grad_norm_weight)[c] = from_float<T>(vectors[0]);
    static_cast<T*>(params.grad_norm_bias)[c] = from_float<T>(vectors[1]);
    static_cast<T*>(params.grad_query_bias)[c] = from_float<T>(vectors[2]);
    static_cast<T*>(params.grad_output_bias)[c] = from_float<T>(gate * vectors[3]);
    const float output_bias = to_float(static_cast<const T*>(forward.output_bias)[c]);
    static_cast<T*>(params.grad_gate)[c] = from_float<T>(dot + output_bias * vectors[3]);
  }
}

}  // namespace

template <typename T>
Status launch_sums(const Params& params, const Workspace& layout, cudaStream_t stream) {
  const FusionAttentionParams& forward = params.forward;
  const auto blocks = [](std::int64_t count) { return dim3(static_cast<unsigned>(count)); };
  if (layout.weight_slices > 0) {
    const int bytes = kWeightStages * 2 * kWeightRows<T> * kSquareStride * static_cast<int>(sizeof(T));
    if (Status status =
            launch("fusion_attention_backward_weights_kernel", fusion_attention_backward_weights_kernel<T>,
                   blocks(2 * layout.weight_squares * layout.weight_slices), dim3(kThreads), bytes, stream,
                   params, layout);
        !status.ok()) {
      return status;
    }
  }
  if (layout.key_slices > 0) {
    if (Status status =
            launch("fusion_attention_backward_keys_kernel", fusion_attention_backward_keys_kernel<T>,
                   blocks(forward.batch * forward.heads * layout.key_blocks * layout.key_slices),
                   dim3(kKeyThreads), key_shared_bytes<T>(forward.head_channels), stream, params, layout);
        !status.ok()) {
      return status;
    }
  }
  const std::int64_t tokens = 2 * forward.batch * forward.tokens * forward.channels;
  return launch("fusion_attention_backward_finish_kernel", fusion_attention_backward_finish_kernel<T>,
                blocks(forward.channels + (tokens + kThreads - 1) / kThreads), dim3(kThreads), 0, stream,
                params, layout);
}

template Status launch_sums<float>(const Params&, const Workspace&, cudaStream_t);
template Status launch_sums<__half>(const Params&, const Workspace&, cudaStream_t);
template Status launch_sums<__nv_bfloat16>(const Params&, const Workspace&, cudaStream_t);

}  // namespace visionllm::cuda::fusion
