// Forward of fusion_attention; the contract is in visionllm/fusion_attention.h.
//
//   output = x + gate * (softmax(LN(x) Wq^T + bq . K^T / sqrt(D)) V Wo^T + bo)
//
// One launch. A block takes a tile of rows (64 of 16-bit elements, 32 of float32), which stays in shared memory
// from the layer norm to the residual: LN(x) is replaced by the queries, these by what they attend to, that by
// the output. Weights (128 KiB each, from L2) stream through shared memory in slabs of 8 KiB, four deep; keys
// and values come for the heads in work, 64 tokens at a time, and are loaded while the block is busy with the
// ones before. Nothing between x and output goes to device memory.
//
// At B = 1, N = 22223, C = 256, H = 8 in bfloat16:
//   device memory   x and output once each, 2 * 22223 * 256 * 2 bytes = 22.8 MB, weights, keys and values once,
//                   0.3 MB: the minimum. The residual reads x a second time, while its lines are in L2: 11.4 MB.
//   L2              (2 * 128 KiB of weights + T KiB of keys and values) for each of 348 tiles: 91 MB of weights
//                   and 23 MB at T = 64; with x and output 148 MB.
//   products        two projections, 2 * 2 * 22223 * 256 * 256 = 5.8 GFLOP, and 2 * 2 * 22223 * 256 * T for the
//                   attention: 1.5 at T = 64. Nothing is computed twice; tails add 0.2 % (22272 rows).
//   shared memory   a warp loads 2 + 4 matrices of 512 bytes for 16 products of 16 x 8 x 16: 192 bytes each
#include "fusion_attention.h"

#include "fusion_attention_tile.cuh"

namespace visionllm::cuda {
namespace fusion {
namespace {

constexpr int kSlabs = 4;

// Tokens in shared memory at a time.
template <typename T>
constexpr int kKeys = 128 / static_cast<int>(sizeof(T));

// The parts of dynamic shared memory, in order.
template <typename T>
struct Layout {
  int tile;     // elements of T: [kRows, C + padding]
  int stage;    // elements of T: the slabs, or keys and values
  int bias;     // floats: [T], rounded up to whole chunks
  int columns;  // of keys and of values, with padding

  __host__ __device__ Layout(int channels, int tokens, int head_channels) {
    columns = heads_at_once<T>(head_channels) * head_channels + kPadding;
    tile = Tile<T>::kRows * (channels + kPadding);
    const int slabs = kSlabs * slab_elements<T>(channels), keys = 2 * kKeys<T> * columns;
    stage = slabs > keys ? slabs : keys;
    bias = (tokens + kKeys<T> - 1) / kKeys<T> * kKeys<T>;
  }
  __host__ __device__ int bytes() const {
    return (tile + stage) * static_cast<int>(sizeof(T)) + (bias + 4) * static_cast<int>(sizeof(float));
  }
};

// The queries in the tile become what they attend to, `count` tokens of batch entry b.
template <typename T>
__device__ __forceinline__ void attend(T* tile, T* stage, const float* bias, int count,
                                       const FusionAttentionParams& params, int b, int columns) {
  using W = Tile<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int head_channels = params.head_channels, stride = params.channels + kPadding;
  const int at_once = heads_at_once<T>(head_channels);
  const int chunks = (count + kKeys<T> - 1) / kKeys<T>;
  const int total = (params.heads + at_once - 1) / at_once * chunks;
  const int slot = warp / W::kRowGroups;  // of the heads in work
  T* const rows = tile + warp % W::kRowGroups * 16 * stride;
  T* const keys = stage;
  T* const values = stage + kKeys<T> * columns;
  const T* const key = static_cast<const T*>(params.key) + b * params.key_stride_b;
  const T* const value = static_cast<const T*>(params.value) + b * params.value_stride_b;

  const auto copy = [&](T* target, const T* source, std::int64_t stride_t, std::int64_t stride_h, int i) {
    if (i < total) {
      const int head = i / chunks * at_once;
      copy_tokens<T, kKeys<T>>(target, source + head * stride_h, stride_t, stride_h, bias,
                               i % chunks * kKeys<T>, at_once, params.heads - head, head_channels);
    }
    copy_async_commit();
  };
  const auto copy_keys = [&](int i) { copy(keys, key, params.key_stride_t, params.key_stride_h, i); };
  const auto copy_values = [&](int i) {
    copy(values, value, params.value_stride_t, params.value_stride_h, i);
  };

  if (total == 0) {
    __syncthreads();  // the queries are written
    for (int i = threadIdx.x; i < W::kRows * params.channels; i += kThreads) {
      tile[i / params.channels * stride + i % params.channels] = from_float<T>(0.0f);
    }
    return;
  }
  copy_keys(0);
  copy_values(0);
  Softmax softmax;
  float gathered[kFusionMaxHeadChannels / 8][4];
  for (int i = 0; i < total; ++i) {
    const int chunk = i % chunks, head = i / chunks * at_once + slot;
    const bool busy = slot < at_once && head < params.heads;
    const int left = count - chunk * kKeys<T>;
    if (chunk == 0) {
      softmax.reset();
      clear(gathered);
    }
    float scores[kKeys<T> / 8][4];
    copy_async_wait<1>();
    __syncthreads();  // these keys are there, and the queries the first time
    if (busy) {
      multiply_tokens<T, kKeys<T>>(scores, rows + head * head_channels, stride, keys + slot * head_channels,
                                   columns, head_channels, left);
    }
    __syncthreads();
    copy_keys(i + 1);
    if (busy) softmax.step<kKeys<T>>(scores, bias + chunk * kKeys<T>, gathered);
    copy_async_wait<1>();
    __syncthreads();  // these values are there
    if (busy) {
      gather_tokens<T, kKeys<T>>(gathered, scores, values + slot * head_channels, columns, head_channels,
                                 left);
      if (chunk == chunks - 1) {
        // Nobody else reads or writes this head of these rows.
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float factor = 1.0f / warp_sum<4>(softmax.sum[k]);  // at least one token is text
          T* const row = rows + (k * 8 + lane / 4) * stride + head * head_channels + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
            if (j * 8 < head_channels) {
              store_pair(row + j * 8, gathered[j][2 * k] * factor, gathered[j][2 * k + 1] * factor);
            }
          }
        }
      }
    }
    __syncthreads();
    copy_values(i + 1);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    fusion_attention_kernel(const FusionAttentionParams params, int tiles) {
  VISIONLLM_DYNAMIC_SHARED(shared);
  using W = Tile<T>;
  const int channels = params.channels, stride = channels + kPadding;
  const Layout<T> layout(channels, params.tokens, params.head_channels);
  T* const tile = reinterpret_cast<T*>(shared);
  T* const stage = tile + layout.tile;
  float* const bias = reinterpret_cast<float*>(stage + layout.stage);
  int* const text = reinterpret_cast<int*>(bias + layout.bias);
  const int b = static_cast<int>(blockIdx.x) / tiles,
            first = (static_cast<int>(blockIdx.x) - b * tiles) * W::kRows;
  const std::int64_t entry = static_cast<std::int64_t>(b) * params.positions * channels;
  const T* const x = static_cast<const T*>(params.x) + entry;

  start_projection<T, false, kSlabs>(stage, static_cast<const T*>(params.query_weight), channels);
  const int count = read_mask(bias, text, params.mask + static_cast<std::int64_t>(b) * params.tokens,
                              params.tokens, layout.bias);
  normalise_tile<T>(tile, nullptr, x, static_cast<const T*>(params.norm_weight),
                    static_cast<const T*>(params.norm_bias), first, params.positions, channels,
                    params.epsilon);

  typename W::Accumulators acc;
  project<T, false, kSlabs>(acc, tile, stage, static_cast<const T*>(params.query_weight), channels);
  __syncthreads();
  const T* const query_bias = static_cast<const T*>(params.query_bias);
  const float scale = kLog2E / sqrtf(static_cast<float>(params.head_channels));
  for_each_pair<T>(acc, channels, [&](int place, int column, float left, float right) {
    const Vector<T, 2> add = load_vector<T, 2>(query_bias + column);
    store_pair(tile + place, (left + to_float(add[0])) * scale, (right + to_float(add[1])) * scale);
  });

  attend<T>(tile, stage, bias, count, params, b, layout.columns);

  start_projection<T, false, kSlabs>(stage, static_cast<const T*>(params.output_weight), channels);
  project<T, false, kSlabs>(acc, tile, stage, static_cast<const T*>(params.output_weight), channels);
  __syncthreads();
  const int vectors = channels / W::kVector;
  for (int i = threadIdx.x; i < W::kRows * vectors; i += kThreads) {
    const int row = i / vectors, column = (i - row * vectors) * W::kVector;
    const bool valid = first + row < params.positions;
    copy_async_16(tile + row * stride + column,
                  valid ? x + static_cast<std::int64_t>(first + row) * channels + column : x, valid);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const T* const output_bias = static_cast<const T*>(params.output_bias);
  const T* const gate = static_cast<const T*>(params.gate);
  for_each_pair<T>(acc, channels, [&](int place, int column, float left, float right) {
    const Vector<T, 2> add = load_vector<T, 2>(output_bias + column), g = load_vector<T, 2>(gate + column);
    const Vector<T, 2> residual = load_vector<T, 2>(tile + place);
    store_pair(tile + place, to_float(residual[0]) + to_float(g[0]) * (left + to_float(add[0])),
               to_float(residual[1]) + to_float(g[1]) * (right + to_float(add[1])));
  });
  __syncthreads();
  store_tile<T>(static_cast<T*>(params.output) + entry, tile, first, params.positions, channels);
}

template <typename T>
Status launch_forward(const FusionAttentionParams& params, cudaStream_t stream) {
  const int tiles = (params.positions + Tile<T>::kRows - 1) / Tile<T>::kRows;
  const int bytes = Layout<T>(params.channels, params.tokens, params.head_channels).bytes();
  return launch("fusion_attention_kernel", fusion_attention_kernel<T>,
                dim3(static_cast<unsigned>(params.batch * tiles)), dim3(kThreads), bytes, stream, params,
                tiles);
}

}  // namespace
}  // namespace fusion

Status fusion_attention(const FusionAttentionParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::bfloat16: return fusion::launch_forward<__nv_bfloat16>(params, cuda_stream);
    case DType::float16: return fusion::launch_forward<__half>(params, cuda_stream);
    default: return fusion::launch_forward<float>(params, cuda_stream);
  }
}

}  // namespace visionllm::cuda
