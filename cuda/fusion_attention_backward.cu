// Backward of fusion_attention; the contract is in visionllm/fusion_attention.h. With G the sum over rows of
// grad_output^T attended [C, C] and s that of grad_output [C]:
//
//   grad_attended     = (grad_output * gate) Wo
//   weights           = exp2(query . K - logsumexp), query times log2(e) / sqrt(D)
//   grad_scores       = weights * (grad_attended . V - grad_attended . attended)
//   grad_query        = grad_scores K / sqrt(D)
//   grad_key          = sum over rows of grad_scores^T query ln(2)      grad_value = weights^T grad_attended
//   grad_query_weight = sum over rows of grad_query^T normed
//   grad_output_weight = gate * G     grad_output_bias = gate * s     grad_gate = rows of (Wo * G) + bo * s
//   grad_x            = grad_output + layer norm's backward of grad_query Wq
//
// Four launches; no sum is by atomics, each is in one order, whatever the device:
//   rows     as the forward, a tile of rows a block: computes normed, query, attended and the score matrix anew,
//            then everything that belongs to a row, down to grad_x. Leaves five [B, N, C] tensors for the sums.
//   keys     a block takes some tokens of one head and a slice of the rows; the transposed scores are
//            accumulators whose values are operands of the next product as they are.
//   weights  a block takes 128 x 128 elements of one weight gradient and a slice of the rows.
//   finish   adds up the slices' partial sums.
//
// At B = 1, N = 22223, C = 256, H = 8, T = 64 in bfloat16:
//   device memory  x and grad_output in, grad_x out: 34 MB is the minimum. Between the launches, written and read:
//                  five tensors of 11.4 MB, 16.8 MB of partial sums of weights, 7.6 MB of keys and values, 2.8 MB
//                  of columns, logsumexp and mean, 84 MB in all, of which the largest L2 caches keep a part.
//   products       five projections' worth (query again, grad_attended, grad_query Wq, two weight gradients)
//                  14.6 GFLOP; 0.73 GFLOP each for the scores three times, weights V, grad_attended V^T twice,
//                  grad_query, grad_key and grad_value: 6.6. In all 21. To keep weights and grad_scores between
//                  the launches would save 2.2 of them and cost 2 * 22.8 MB, written and read.
#include "fusion_attention.h"
#include "fusion_attention_tile.cuh"

namespace visionllm::cuda {
namespace fusion {
namespace {

constexpr int kSlabs = 3;

template <typename T>
constexpr int kKeys = 64 / static_cast<int>(sizeof(T));

// The parts of the row kernel's dynamic shared memory, in order: two tiles, the stage, the mask.
template <typename T>
struct RowLayout {
  int tile;     // elements of T: [kRows, C + padding]
  int stage;    // elements of T: the slabs, or keys and values
  int bias;     // floats: [T], rounded up to whole chunks
  int columns;  // of keys and of values, with padding

  __host__ __device__ RowLayout(int channels, int tokens, int head_channels) {
    columns = heads_at_once<T>(head_channels) * head_channels + kPadding;
    tile = Tile<T>::kRows * (channels + kPadding);
    const int slabs = kSlabs * slab_elements<T>(channels), keys = 2 * kKeys<T> * columns;
    stage = slabs > keys ? slabs : keys;
    bias = (tokens + kKeys<T> - 1) / kKeys<T> * kKeys<T>;
  }
  __host__ __device__ int bytes() const {
    const int main = (2 * tile + stage) * static_cast<int>(sizeof(T)) + (bias + 4) * 4;
    return main;
  }
};

// For the heads and rows of the block: writes attended, logsumexp and mean to the workspace, and grad_query in
// place of the query. Two passes over the tokens, the second backwards: it begins with what the first ended
// with, which is still in shared memory.
template <typename T>
__device__ __forceinline__ void attend_backward(T* query, const T* grad_attended, T* stage, const float* bias,
                                                int count, const FusionAttentionParams& params,
                                                const Workspace& layout, unsigned char* workspace, int b,
                                                int first, int columns) {
  using W = Tile<T>;
  const int thread = anew(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int channels = params.channels, head_channels = params.head_channels, stride = channels + kPadding;
  const int at_once = heads_at_once<T>(head_channels);
  const int chunks = (count + kKeys<T> - 1) / kKeys<T>;
  const int slot = warp / W::kRowGroups;  // of the heads in work
  const int group = warp % W::kRowGroups * 16;
  T* const keys = stage;
  T* const values = stage + kKeys<T> * columns;

  for (int head_0 = 0; head_0 < params.heads; head_0 += at_once) {
    const int head = head_0 + slot;
    const bool busy = slot < at_once && head < params.heads;
    T* const rows = query + group * stride + head * head_channels;
    const T* const grad_rows = grad_attended + group * stride + head * head_channels;
    const auto copy = [&](int chunk) {
      __syncthreads();  // nobody reads the tokens before any more
      const std::int64_t entry = anew(b);
      const T* const key = static_cast<const T*>(params.key) + entry * params.key_stride_b;
      const T* const value = static_cast<const T*>(params.value) + entry * params.value_stride_b;
      const int head_vectors = head_channels / W::kVector, vectors = at_once * head_vectors;
#pragma unroll 1
      for (int i = threadIdx.x; i < kKeys<T> * vectors; i += kThreads) {
        const int token = i / vectors, rest = i - token * vectors, slot = rest / head_vectors;
        const int column = (rest - slot * head_vectors) * W::kVector, h = head_0 + slot;
        const int t = chunk * kKeys<T> + token;
        // Zeros where there is no text.
        const bool valid = h < params.heads && bias[t] == 0.0f;
        const std::int64_t from_key = valid ? t * params.key_stride_t + h * params.key_stride_h + column : 0;
        const std::int64_t from_value =
            valid ? t * params.value_stride_t + h * params.value_stride_h + column : 0;
        copy_async_16(keys + token * columns + rest * W::kVector, key + from_key, valid);
        copy_async_16(values + token * columns + rest * W::kVector, value + from_value, valid);
      }
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
    };
    Softmax softmax;
    softmax.reset();
    float gathered[kFusionMaxHeadChannels / 8][4];
    clear(gathered);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy(chunk);
      if (busy) {
        float scores[kKeys<T> / 8][4];
        const int left = count - chunk * kKeys<T>;
        multiply_tokens<T, kKeys<T>>(scores, rows, stride, keys + slot * head_channels, columns,
                                     head_channels, left);
        softmax.step<kKeys<T>>(scores, bias + chunk * kKeys<T>, gathered);
        gather_tokens<T, kKeys<T>>(gathered, scores, values + slot * head_channels, columns, head_channels,
                                   left);
      }
    }
    float log_sum[2], dot[2];  // of the lane's two rows
    if (busy) {
      const std::int64_t entry = anew(b);
      T* const attended = reinterpret_cast<T*>(workspace + layout.attended) +
                          entry * params.positions * channels + head * head_channels + t * 2;
      const std::int64_t head_rows = (entry * params.heads + head) * params.positions;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float sum = warp_sum<4>(softmax.sum[k]);
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        log_sum[k] = sum > 0.0f ? softmax.maximum[k] + log2f(sum) : 0.0f;
        const int row = group + k * 8 + g;
        const int n = first + row;
        float partial = 0.0f;
#pragma unroll
        for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
          if (j * 8 < head_channels) {
            const float a0 = gathered[j][2 * k] * factor, a1 = gathered[j][2 * k + 1] * factor;
            const Vector<T, 2> grad = load_vector<T, 2>(grad_rows + (k * 8 + g) * stride + j * 8 + t * 2);
            partial += a0 * to_float(grad[0]) + a1 * to_float(grad[1]);
            if (n < params.positions) {
              store_pair(attended + static_cast<std::int64_t>(n) * channels + j * 8, a0, a1);
            }
          }
        }
        dot[k] = warp_sum<4>(partial);
        if (t == 0 && n < params.positions) {
          reinterpret_cast<float*>(workspace + layout.logsumexp)[head_rows + n] = log_sum[k];
          reinterpret_cast<float*>(workspace + layout.mean)[head_rows + n] = dot[k];
        }
      }
    }
    float sum[kFusionMaxHeadChannels / 8][4];
    clear(sum);
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      if (chunk != chunks - 1) copy(chunk);
      if (busy) {
        float scores[kKeys<T> / 8][4], grads[kKeys<T> / 8][4];
        const int left = count - chunk * kKeys<T>;
        multiply_tokens<T, kKeys<T>>(scores, rows, stride, keys + slot * head_channels, columns,
                                     head_channels, left);
        multiply_tokens<T, kKeys<T>>(grads, grad_rows, stride, values + slot * head_channels, columns,
                                     head_channels, left);
#pragma unroll
        for (int j = 0; j < kKeys<T> / 8; ++j) {
          const Vector<float, 2> add = load_vector<float, 2>(bias + chunk * kKeys<T> + j * 8 + t * 2);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              scores[j][2 * k + i] =
                  exp2f(scores[j][2 * k + i] + add[i] - log_sum[k]) * (grads[j][2 * k + i] - dot[k]);
            }
          }
        }
        gather_tokens<T, kKeys<T>>(sum, scores, keys + slot * head_channels, columns, head_channels, left);
      }
    }
    __syncwarp();  // the warp's lanes have read the query
    if (busy) {
      const float scale = 1.0f / sqrtf(static_cast<float>(head_channels));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
          if (j * 8 < head_channels) {
            store_pair(rows + (k * 8 + g) * stride + j * 8 + t * 2, sum[j][2 * k] * scale,
                       sum[j][2 * k + 1] * scale);
          }
        }
      }
    }
  }
}

// grad_x of the tile's rows, from the gradients of normed and of the query in the two tiles, and the sums of
// columns over the tile. Destroys the tiles. Begins after a barrier.
template <typename T>
__device__ __forceinline__ void finish_rows(unsigned char* shared, const T* grad_query, const T* grad_normed,
                                            const Params& params, const Workspace& layout, int b, int first) {
  const FusionAttentionParams& forward = params.forward;
  const int thread = anew(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int channels = forward.channels, stride = channels + kPadding;
  const std::int64_t entry = static_cast<std::int64_t>(b) * forward.positions * channels;
  const T* const x = static_cast<const T*>(forward.x) + entry;
  const T* const grad_output = static_cast<const T*>(params.grad_output) + entry;
  T* const grad_x = static_cast<T*>(params.grad_x) + entry;
  float sums[kSums][8] = {};
  float weight[8];
  load_row(weight, static_cast<const T*>(forward.norm_weight), channels, true);
#pragma unroll 1
  for (int row = warp; row < Tile<T>::kRows; row += kWarps) {
    const int n = first + row;
    if (n >= forward.positions) break;
    const std::int64_t place = static_cast<std::int64_t>(n) * channels;
    float unit[8], normed[8], grad[8], query[8];
    load_row(unit, x + place, channels, true);
    load_row(grad, grad_output + place, channels, true);
    load_row(normed, grad_normed + row * stride, channels, true);
    load_row(query, grad_query + row * stride, channels, true);
    const float factor = normalise_row(unit, channels, forward.epsilon);
    float mean = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[0][i] += normed[i] * unit[i];
      sums[1][i] += normed[i];
      sums[2][i] += query[i];
      sums[3][i] += grad[i];
      normed[i] *= weight[i];
      mean += normed[i];
      dot += normed[i] * unit[i];
    }
    mean = warp_sum(mean) / static_cast<float>(channels);
    dot = warp_sum(dot) / static_cast<float>(channels);
#pragma unroll
    for (int i = 0; i < 8; ++i) grad[i] += factor * (normed[i] - mean - unit[i] * dot);
    if (has_channels(channels)) store_floats<T, 8>(grad_x + place + lane * 8, grad);
  }
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared);  // [kWarps, kSums, C]
  if (has_channels(channels)) {
#pragma unroll
    for (int q = 0; q < kSums; ++q) {
      store_floats<float, 8>(partial + (warp * kSums + q) * channels + lane * 8, sums[q]);
    }
  }
  __syncthreads();
  float* const column_sums = reinterpret_cast<float*>(params.workspace + layout.column_sums);
  for (int i = threadIdx.x; i < kSums * channels; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w * kSums * channels + i];
    column_sums[i * layout.tiles + blockIdx.x] = sum;
  }
}

// Blocks that the shared memory of a multiprocessor has room for at C = 256: registers are divided among as many.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kRowBlocks = 1;
#else
constexpr int kRowBlocks = 2;
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, kRowBlocks)
    fusion_attention_backward_rows_kernel(const Params params, const Workspace layout) {
  VISIONLLM_DYNAMIC_SHARED(shared);
  using W = Tile<T>;
  const FusionAttentionParams& forward = params.forward;
  const int channels = forward.channels, stride = channels + kPadding;
  const RowLayout<T> parts(channels, forward.tokens, forward.head_channels);
  T* const query = reinterpret_cast<T*>(shared);
  T* const grad = query + parts.tile;
  T* const stage = grad + parts.tile;
  float* const bias = reinterpret_cast<float*>(stage + parts.stage);
  int* const text = reinterpret_cast<int*>(bias + parts.bias);
  const int tiles = (forward.positions + W::kRows - 1) / W::kRows;
  const int b = static_cast<int>(blockIdx.x) / tiles,
            first = (static_cast<int>(blockIdx.x) - b * tiles) * W::kRows;
  const std::int64_t entry = static_cast<std::int64_t>(b) * forward.positions * channels;
  const auto tensor = [&](std::int64_t offset) {
    return reinterpret_cast<T*>(params.workspace + offset) + entry;
  };
  const T* const query_weight = static_cast<const T*>(forward.query_weight);
  const T* const output_weight = static_cast<const T*>(forward.output_weight);

  start_projection<T, false, kSlabs>(stage, query_weight, channels);
  const int count = read_mask(bias, text, forward.mask + static_cast<std::int64_t>(b) * forward.tokens,
                              forward.tokens, parts.bias);
  normalise_tile<T>(query, tensor(layout.normed), static_cast<const T*>(forward.x) + entry,
                    static_cast<const T*>(forward.norm_weight), static_cast<const T*>(forward.norm_bias),
                    first, forward.positions, channels, forward.epsilon);
  {
    float gate[8];
    load_row(gate, static_cast<const T*>(forward.gate), channels, true);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int row = warp; row < W::kRows; row += kWarps) {
      const int n = first + row;
      float values[8];
      load_row(values,
               static_cast<const T*>(params.grad_output) + entry + static_cast<std::int64_t>(n) * channels,
               channels, n < forward.positions);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= gate[i];
      if (has_channels(channels)) store_floats<T, 8>(grad + row * stride + lane * 8, values);
    }
  }

  typename W::Accumulators acc;
  project<T, false, kSlabs>(acc, query, stage, query_weight, channels);
  __syncthreads();
  start_projection<T, true, kSlabs>(stage, output_weight, channels);
  const T* const query_bias = static_cast<const T*>(forward.query_bias);
  const float scale = kLog2E / sqrtf(static_cast<float>(forward.head_channels));
  for_each_pair<T>(acc, channels, [&](int place, int column, float left, float right) {
    const Vector<T, 2> add = load_vector<T, 2>(query_bias + column);
    store_pair(query + place, (left + to_float(add[0])) * scale, (right + to_float(add[1])) * scale);
  });
  project<T, true, kSlabs>(acc, grad, stage, output_weight, channels);
  __syncthreads();
  for_each_pair<T>(acc, channels, [&](int place, int column, float left, float right) {
    store_pair(grad + place, left, right);
  });
  __syncthreads();
  store_tile<T>(tensor(layout.query), query, first, forward.positions, channels);
  store_tile<T>(tensor(layout.grad_attended), grad, first, forward.positions, channels);
  __syncthreads();  // the queries are stored before their place is taken

  attend_backward<T>(query, grad, stage, bias, count, forward, layout, params.workspace, b, first,
                     parts.columns);
  __syncthreads();
  start_projection<T, true, kSlabs>(stage, query_weight, channels);
  store_tile<T>(tensor(layout.grad_query), query, first, forward.positions, channels);
  project<T, true, kSlabs>(acc, query, stage, query_weight, channels);
  for_each_pair<T>(acc, channels, [&](int place, int column, float left, float right) {
    store_pair(grad + place, left, right);
  });
  __syncthreads();
  finish_rows<T>(shared, query, grad, params, layout, b, first);
}

template <typename T>
Status launch_backward(const Params& params, cudaStream_t stream) {
  const FusionAttentionParams& forward = params.forward;
  const Workspace layout(forward.batch, forward.positions, forward.channels, forward.tokens, forward.heads,
                         sizeof(T));
  if (layout.tiles > 0) {
    const int bytes = RowLayout<T>(forward.channels, forward.tokens, forward.head_channels).bytes();
    if (Status status =
            launch("fusion_attention_backward_rows_kernel", fusion_attention_backward_rows_kernel<T>,
                   dim3(static_cast<unsigned>(layout.tiles)), dim3(kThreads), bytes, stream, params, layout);
        !status.ok()) {
      return status;
    }
  }
  return launch_sums<T>(params, layout, stream);
}

}  // namespace
}  // namespace fusion

Status fusion_attention_backward(const FusionAttentionBackwardParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.forward.dtype) {
    case DType::bfloat16: return fusion::launch_backward<__nv_bfloat16>(params, cuda_stream);
    case DType::float16: return fusion::launch_backward<__half>(params, cuda_stream);
    default: return fusion::launch_backward<float>(params, cuda_stream);
  }
}

}  // namespace visionllm::cuda
