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
// Four launches; no atomics, every sum in one order, whatever the device:
//   rows     as the forward, a tile of rows a block: computes normed, query, attended and the score matrix anew,
//            then everything that belongs to a row, down to grad_x. Leaves five [B, N, C] tensors for the sums.
//   keys     a block takes some tokens of one head and a slice of the rows; the transposed scores are
//            accumulators whose values are operands of the next product as they are.
//   weights  a block takes 128 x 128 elements of one weight gradient and a slice of the rows.
//   finish   adds up the slices' partial sums.
//
// At B = 1, N = 22223, C = 256, H = 8, T = 64 in bfloat16:
//   device memory  x and grad_output in, grad_x out: 34 MB is the minimum. Between the launches five tensors of
//                  11.4 MB (57 MB, written once and read once; about what L2 of the largest GPUs holds), 16.8 MB
//                  of partial sums of weights and 8.4 MB of keys and values, written and read. 34 + 165 MB.
//   products       five projections' worth (query again, grad_attended, grad_query Wq, two weight gradients)
//                  14.6 GFLOP; 0.73 GFLOP each for the scores three times, weights V, grad_attended V^T twice,
//                  grad_query, grad_key and grad_value: 6.6. In all 21; the score matrix stored once would save
//                  2.9 of them and cost 2 * 22.8 MB.
#include "fusion_attention.h"
#include "fusion_attention_tile.cuh"

namespace visionllm::cuda {
namespace fusion {
namespace {

using Params = FusionAttentionBackwardParams;
using Workspace = FusionAttentionWorkspace;

constexpr int kSlabs = 3;
constexpr int kSums = 4;  // of columns: see FusionAttentionWorkspace::column_sums

// ---- rows -----------------------------------------------------------------------------------------------

template <typename T>
constexpr int kKeys = 64 / static_cast<int>(sizeof(T));

// The parts of the row kernel's dynamic shared memory, in order: two tiles, the stage, the mask.
template <typename T>
struct RowLayout {
  int tile;     // elements of T: [kRows, C + padding]
  int stage;    // elements of T: the slabs, or keys and values
  int bias;     // floats: [T], rounded up to whole chunks
  int columns;  // of keys and of values, with padding

  __host__ __device__ RowLayout(int channels, int tokens, int heads) {
    const int head_channels = channels / heads;
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

template <typename T>
__device__ __forceinline__ void clear(T (&tiles)[kFusionMaxHeadChannels / 8][4]) {
#pragma unroll
  for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
    tiles[j][0] = tiles[j][1] = tiles[j][2] = tiles[j][3] = 0.0f;
  }
}

// For the heads and rows of the block: writes attended, logsumexp and mean to the workspace, and grad_query in
// place of the query. Two passes over the tokens, the second backwards: it begins with what the first ended
// with, which is still in shared memory.
template <typename T>
__device__ __forceinline__ void attend_backward(T* query, const T* grad_attended, T* stage, const float* bias,
                                                int count, const FusionAttentionParams& params,
                                                const Workspace& layout, unsigned char* workspace,
                                                std::int64_t b, std::int64_t first, int columns) {
  using W = Tile<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int channels = params.channels, head_channels = channels / params.heads, stride = channels + kPadding;
  const int at_once = heads_at_once<T>(head_channels);
  const int chunks = (count + kKeys<T> - 1) / kKeys<T>;
  const int slot = warp / W::kRowGroups;  // of the heads in work
  const int group = warp % W::kRowGroups * 16;
  T* const keys = stage;
  T* const values = stage + kKeys<T> * columns;
  const T* const key = static_cast<const T*>(params.key) + b * params.key_stride_b;
  const T* const value = static_cast<const T*>(params.value) + b * params.value_stride_b;
  T* const attended = reinterpret_cast<T*>(workspace + layout.attended) + b * params.positions * channels;
  float* const logsumexp = reinterpret_cast<float*>(workspace + layout.logsumexp);
  float* const mean = reinterpret_cast<float*>(workspace + layout.mean);

  for (int head_0 = 0; head_0 < params.heads; head_0 += at_once) {
    const int head = head_0 + slot;
    const bool busy = slot < at_once && head < params.heads;
    T* const rows = query + group * stride + head * head_channels;
    const T* const grad_rows = grad_attended + group * stride + head * head_channels;
    const auto copy = [&](int chunk) {
      __syncthreads();  // nobody reads the tokens before any more
      copy_tokens<T, kKeys<T>>(keys, key + head_0 * params.key_stride_h, params.key_stride_t,
                               params.key_stride_h, bias, chunk * kKeys<T>, at_once, params.heads - head_0,
                               head_channels);
      copy_tokens<T, kKeys<T>>(values, value + head_0 * params.value_stride_h, params.value_stride_t,
                               params.value_stride_h, bias, chunk * kKeys<T>, at_once, params.heads - head_0,
                               head_channels);
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
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float sum = warp_sum<4>(softmax.sum[k]);
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        log_sum[k] = sum > 0.0f ? softmax.maximum[k] + log2f(sum) : 0.0f;
        const int row = group + k * 8 + g;
        const std::int64_t n = first + row;
        float partial = 0.0f;
#pragma unroll
        for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
          if (j * 8 < head_channels) {
            const float a0 = gathered[j][2 * k] * factor, a1 = gathered[j][2 * k + 1] * factor;
            const Vector<T, 2> grad = load_vector<T, 2>(grad_rows + (k * 8 + g) * stride + j * 8 + t * 2);
            partial += a0 * to_float(grad[0]) + a1 * to_float(grad[1]);
            if (n < params.positions) {
              store_pair(attended + n * channels + head * head_channels + j * 8 + t * 2, a0, a1);
            }
          }
        }
        dot[k] = warp_sum<4>(partial);
        if (t == 0 && n < params.positions) {
          const std::int64_t place = (b * params.heads + head) * params.positions + n;
          logsumexp[place] = log_sum[k];
          mean[place] = dot[k];
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
                                            const Params& params, const Workspace& layout, std::int64_t b,
                                            std::int64_t first) {
  const FusionAttentionParams& forward = params.forward;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int channels = forward.channels, stride = channels + kPadding;
  const std::int64_t entry = b * forward.positions * channels;
  const T* const x = static_cast<const T*>(forward.x) + entry;
  const T* const grad_output = static_cast<const T*>(params.grad_output) + entry;
  T* const grad_x = static_cast<T*>(params.grad_x) + entry;
  float sums[kSums][8] = {};
  float weight[8];
  load_row(weight, static_cast<const T*>(forward.norm_weight), channels, true);
  for (int row = warp; row < Tile<T>::kRows; row += kWarps) {
    const std::int64_t n = first + row;
    if (n >= forward.positions) break;
    float unit[8], normed[8], grad[8], query[8];
    load_row(unit, x + n * channels, channels, true);
    load_row(grad, grad_output + n * channels, channels, true);
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
    if (has_channels(channels)) store_floats<T, 8>(grad_x + n * channels + lane * 8, grad);
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

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    fusion_attention_backward_rows_kernel(const Params params, const Workspace layout) {
  VISIONLLM_DYNAMIC_SHARED(shared);
  using W = Tile<T>;
  const FusionAttentionParams& forward = params.forward;
  const int channels = forward.channels, stride = channels + kPadding;
  const RowLayout<T> parts(channels, forward.tokens, forward.heads);
  T* const query = reinterpret_cast<T*>(shared);
  T* const grad = query + parts.tile;
  T* const stage = grad + parts.tile;
  float* const bias = reinterpret_cast<float*>(stage + parts.stage);
  int* const text = reinterpret_cast<int*>(bias + parts.bias);
  const std::int64_t tiles = layout.tiles / forward.batch;
  const std::int64_t b = blockIdx.x / tiles, first = (blockIdx.x - b * tiles) * W::kRows;
  const std::int64_t entry = b * forward.positions * channels;
  const auto tensor = [&](std::int64_t offset) {
    return reinterpret_cast<T*>(params.workspace + offset) + entry;
  };
  const T* const query_weight = static_cast<const T*>(forward.query_weight);
  const T* const output_weight = static_cast<const T*>(forward.output_weight);

  start_projection<T, false, kSlabs>(stage, query_weight, channels);
  const int count = read_mask(bias, text, forward.mask + b * forward.tokens, forward.tokens, parts.bias);
  normalise_tile<T>(query, tensor(layout.normed), static_cast<const T*>(forward.x) + entry,
                    static_cast<const T*>(forward.norm_weight), static_cast<const T*>(forward.norm_bias),
                    first, forward.positions, channels, forward.epsilon);
  {
    float gate[8];
    load_row(gate, static_cast<const T*>(forward.gate), channels, true);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int row = warp; row < W::kRows; row += kWarps) {
      const std::int64_t n = first + row;
      float values[8];
      load_row(values, static_cast<const T*>(params.grad_output) + entry + n * channels, channels,
               n < forward.positions);
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
  const float scale = kLog2E / sqrtf(static_cast<float>(channels / forward.heads));
  for_each_pair<T>(acc, channels, [&](int row, int column, float first_one, float second) {
    const Vector<T, 2> add = load_vector<T, 2>(query_bias + column);
    store_pair(query + row * stride + column, (first_one + to_float(add[0])) * scale,
               (second + to_float(add[1])) * scale);
  });
  project<T, true, kSlabs>(acc, grad, stage, output_weight, channels);
  __syncthreads();
  for_each_pair<T>(acc, channels, [&](int row, int column, float first_one, float second) {
    store_pair(grad + row * stride + column, first_one, second);
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
  for_each_pair<T>(acc, channels, [&](int row, int column, float first_one, float second) {
    store_pair(grad + row * stride + column, first_one, second);
  });
  __syncthreads();
  finish_rows<T>(shared, query, grad, params, layout, b, first);
}

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
  const int head_channels = forward.channels / forward.heads, stride = head_stride(head_channels);
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

template <typename T>
Status launch_backward(const Params& params, cudaStream_t stream) {
  const FusionAttentionParams& forward = params.forward;
  const Workspace layout(forward.batch, forward.positions, forward.channels, forward.tokens, forward.heads,
                         sizeof(T));
  const int head_channels = forward.channels / forward.heads;
  const auto blocks = [](std::int64_t count) { return dim3(static_cast<unsigned>(count)); };
  if (layout.tiles > 0) {
    if (Status status = launch("fusion_attention_backward_rows_kernel",
                               fusion_attention_backward_rows_kernel<T>, blocks(layout.tiles), dim3(kThreads),
                               RowLayout<T>(forward.channels, forward.tokens, forward.heads).bytes(), stream,
                               params, layout);
        !status.ok())
      return status;
    const int bytes = kWeightStages * 2 * kWeightRows<T> * kSquareStride * static_cast<int>(sizeof(T));
    if (Status status =
            launch("fusion_attention_backward_weights_kernel", fusion_attention_backward_weights_kernel<T>,
                   blocks(2 * layout.weight_squares * layout.weight_slices), dim3(kThreads), bytes, stream,
                   params, layout);
        !status.ok())
      return status;
  }
  if (layout.key_slices > 0) {
    if (Status status =
            launch("fusion_attention_backward_keys_kernel", fusion_attention_backward_keys_kernel<T>,
                   blocks(forward.batch * forward.heads * layout.key_blocks * layout.key_slices),
                   dim3(kKeyThreads), key_shared_bytes<T>(head_channels), stream, params, layout);
        !status.ok())
      return status;
  }
  const std::int64_t tokens = 2 * forward.batch * forward.tokens * forward.channels;
  return launch("fusion_attention_backward_finish_kernel", fusion_attention_backward_finish_kernel<T>,
                blocks(forward.channels + (tokens + kThreads - 1) / kThreads), dim3(kThreads), 0, stream,
                params, layout);
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
