// Batched query decoding, forward; the contract is in visionllm/query_attention.h, the backward in
// query_attention_backward.cu.
//
//   output = softmax([rope(q) . prefix_k, rope(q) . rope(k) of the own group, causal] / sqrt(D))
//            [prefix_v, v]
//
// One launch. A block has one KV head and 128 consecutive query rows of it (float32: 64), whichever groups
// and query heads they are of, and walks over the prefix and then over the tokens of its groups in tiles of
// 64 keys (float32: 32), the next tile being copied while this one is worked on. Both parts go into the same
// online softmax. A warp has 16 rows and leaves out tiles of slots that none of its rows sees. Few rows with
// a long prefix: the walk is divided among several blocks, whose results a second kernel merges.
//
// Counted for 100 groups of 5 slots, prefix 300, 32 heads of 128, bfloat16 (minimum in brackets):
//   device memory  q, k, v, output 16.4 MB + prefix 4.9 MB + logsumexp 0.06 MB = 21.4 MB (21.3 MB)
//   L2 to blocks   128 blocks, for each 32 KiB of queries and 428 to 440 keys of 512 B: 32 MB;
//                  with K and V copied per group the prefix alone would be 492 MB, from device memory
//   products       512 rows x (320 prefix + 64 or 128 own keys) x 32 heads x 4 x 128 = 3.3 GFLOP (2.5)
// and for 100 groups of 49 slots: 166 MB (166), 327 MB, 33.9 GFLOP (26.1).
// Shared memory at D > 64: 96 KiB in all types.
#include "query_attention.h"

#include "query_attention_tile.cuh"

namespace visionllm::cuda {
namespace {

using namespace query_attention_tile;

template <typename T, int DP>
struct ForwardTiles {
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kBytes = (kRows + 4 * kKeys) * DP * static_cast<int>(sizeof(T));
  static_assert(kRows * kStagingStride<DP> * 4 <= kBytes, "finished rows are staged in the tiles' memory");
};

// One block per (batch, KV head, tile of rows, split), the split varying fastest.
template <typename T, int DP>
__global__ void __launch_bounds__(ForwardTiles<T, DP>::kThreads, 1)
    query_attention_kernel(const QueryAttentionParams p, int row_tiles, float scale) {
  using Tiles = ForwardTiles<T, DP>;
  using Op = Operands<T>;
  constexpr int kKeys = Tiles::kKeys, kKeyTiles = kKeys / 8, kSteps = DP / Op::kStep;
  constexpr bool kQueriesInRegisters = sizeof(T) == 2;
  VISIONLLM_DYNAMIC_SHARED(shared);
  T* const queries = reinterpret_cast<T*>(shared);  // [kRows][DP]
  T* const keys = queries + Tiles::kRows * DP;      // [2 stages][K, V][kKeys][DP]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, t = lane & 3;

  const int split = blockIdx.x % p.splits, block = blockIdx.x / p.splits;
  const Place at(p, block / row_tiles);
  const int first_row = block % row_tiles * Tiles::kRows;
  const int last_row = (first_row + Tiles::kRows < at.rows ? first_row + Tiles::kRows : at.rows) - 1;
  const KeyWalk<kKeys> walk(at, p.slots, first_row, last_row);
  const WarpRows mine(at, p.slots, first_row + warp * 16, lane);
  const int begin = walk.tiles * split / p.splits, end = walk.tiles * (split + 1) / p.splits;
  const auto stage = [&](int tile) { return keys + ((tile - begin) & 1) * 2 * kKeys * DP; };

  load_tile<T, DP, Tiles::kRows, Tiles::kThreads>(queries, p.channels, [&](int i) -> const T* {
    return first_row + i < at.rows ? at.query<T>(p.q, p.slots, first_row + i) : nullptr;
  });
  copy_async_commit();
  if (begin < end) {
    walk.template load<T, DP, Tiles::kThreads>(stage(begin), stage(begin) + kKeys * DP, p, at, begin);
  }
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  if (p.cosine != nullptr) {
    rotate_rows<T, DP>(queries, warp * 16, warp * 16 + 16, 2, p, lane, [&](int i) -> std::int64_t {
      return first_row + i < at.rows ? at.angles(p, (first_row + i) / at.repeats) : -1;
    });
    __syncwarp();
  }
  typename Op::A query[kQueriesInRegisters ? kSteps : 1];
  if constexpr (kQueriesInRegisters) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Op::template load_a<DP>(query[k], queries, warp * 16, k * Op::kStep, lane);
    }
  }

  const float log2_scale = scale * kLog2E;
  float sums[DP / 8][4] = {};
  float maximum[2] = {-kInfinity, -kInfinity};  // of the unscaled scores
  float total[2] = {};                          // this lane's part of it
  for (int tile = begin; tile < end; ++tile) {
    T* const k_tile = stage(tile);
    T* const v_tile = k_tile + kKeys * DP;
    copy_async_wait<0>();
    __syncthreads();  // the tile is complete, and everybody is through with the other stage
    if (tile + 1 < end) {
      walk.template load<T, DP, Tiles::kThreads>(stage(tile + 1), stage(tile + 1) + kKeys * DP, p, at,
                                                 tile + 1);
      copy_async_commit();
    }
    const bool own = walk.is_own(tile);
    const int first_key = walk.first_key(tile);
    if (own && p.cosine != nullptr) {
      walk.template rotate<T, DP, Tiles::kWarps>(k_tile, p, at, tile, warp, lane);
      __syncthreads();
    }
    if (!mine.any || (own && (first_key >= mine.token_end || first_key + kKeys <= mine.group_first)))
      continue;

    float scores[kKeyTiles][4] = {};
    if constexpr (kQueriesInRegisters) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          typename Op::B b[2];
          Op::template load_b<DP>(b, k_tile, n * 8, k * Op::kStep, lane);
          Op::multiply(scores[n], query[k], b[0]);
          Op::multiply(scores[n + 1], query[k], b[1]);
        }
      }
    } else {
      multiply_rows<T, DP>(scores, queries, warp * 16, k_tile, lane);
    }
    if (own || first_key + kKeys > at.length) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first_key + 8 * n + 2 * t + (i & 1);
          const bool seen =
              own ? key >= mine.own_group[i >> 1] && key < mine.own_token_end[i >> 1] : key < at.length;
          if (!seen) scores[n][i] = -kInfinity;
        }
      }
    }
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = maximum[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      }
      largest = warp_max<4>(largest);
      shift[i] = largest == -kInfinity ? 0.0f : largest * log2_scale;  // nothing seen yet: weights are zero
      const float factor = exp2f(maximum[i] * log2_scale - shift[i]);
      maximum[i] = largest;
      total[i] *= factor;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) sums[n][2 * i] *= factor, sums[n][2 * i + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2f(scores[n][i] * log2_scale - shift[i >> 1]);
        total[i >> 1] += scores[n][i];
      }
    }
    add_weighted_rows<T, DP>(sums, scores, v_tile, lane);
  }

  copy_async_wait<0>();
  __syncthreads();  // the tiles' memory becomes the staging rows'
  if (!mine.any) return;
  float inverse[2];
  float logsumexp[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] = warp_sum<4>(total[i]);
    inverse[i] = total[i] == 0.0f ? 0.0f : 1.0f / total[i];  // a split may have nothing that the row sees
    logsumexp[i] = total[i] == 0.0f ? -kInfinity : maximum[i] * scale + logf(total[i]);
  }
  float* const staging = reinterpret_cast<float*>(shared) + warp * 16 * kStagingStride<DP>;
  stage_rows<DP>(staging, sums, inverse, lane);
  const std::int64_t results = static_cast<std::int64_t>(p.batch) * at.tokens * p.heads;
  float* const part = p.workspace + split * results * p.channels;
  float* const logsumexps =
      p.splits == 1 ? p.logsumexp : p.workspace + p.splits * results * p.channels + split * results;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = mine.first + (lane >> 2) + 8 * i;
    if (t == 0 && row < at.rows) logsumexps[at.result(p.heads, row)] = logsumexp[i];
  }
  for (int i = 0; i < 16 && mine.first + i < at.rows; ++i) {
    const std::int64_t target = at.result(p.heads, mine.first + i) * p.channels;
    const float* const row = staging + i * kStagingStride<DP>;
    if (p.splits == 1) {
      store_row(static_cast<T*>(p.output) + target, row, p, -1, lane);
    } else {
      store_row(part + target, row, p, -1, lane);
    }
  }
}

constexpr int kMergeWarps = 8;

// One warp per row: output = sum over splits of exp(logsumexp of the split - logsumexp of all) * its output.
template <typename T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    query_attention_merge_kernel(const QueryAttentionParams p, std::int64_t results) {
  const int lane = threadIdx.x % kWarpSize;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kMergeWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (row >= results) return;
  const float* const logsumexps = p.workspace + p.splits * results * p.channels + row;
  float maximum = -kInfinity;
  for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, logsumexps[i * results]);
  float total = 0.0f;
  for (int i = 0; i < p.splits; ++i) total += exp2f((logsumexps[i * results] - maximum) * kLog2E);
  const float logsumexp = maximum + logf(total);
  if (lane == 0) p.logsumexp[row] = logsumexp;
  const int column = 4 * lane;
  if (column >= p.channels) return;
  float sums[4] = {};
  for (int i = 0; i < p.splits; ++i) {
    const float weight = exp2f((logsumexps[i * results] - logsumexp) * kLog2E);
    float values[4];
    load_floats(values, p.workspace + (i * results + row) * p.channels + column);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += weight * values[j];
  }
  store_floats(static_cast<T*>(p.output) + row * p.channels + column, sums);
}

template <typename T, int DP>
Status launch_forward(const QueryAttentionParams& p, cudaStream_t stream) {
  using Tiles = ForwardTiles<T, DP>;
  const std::int64_t rows = static_cast<std::int64_t>(p.groups) * p.slots * (p.heads / p.kv_heads);
  const int row_tiles = static_cast<int>((rows + Tiles::kRows - 1) / Tiles::kRows);
  const unsigned blocks = static_cast<unsigned>(p.batch) * p.kv_heads * row_tiles * p.splits;
  const float scale = 1.0f / sqrtf(static_cast<float>(p.channels));
  return launch("query_attention_kernel", query_attention_kernel<T, DP>, dim3(blocks), dim3(Tiles::kThreads),
                Tiles::kBytes, stream, p, row_tiles, scale);
}

template <typename T>
Status run_forward(const QueryAttentionParams& p, cudaStream_t stream) {
  const Status status =
      p.channels <= 64 ? launch_forward<T, 64>(p, stream) : launch_forward<T, 128>(p, stream);
  if (!status.ok() || p.splits == 1) return status;
  const std::int64_t results = static_cast<std::int64_t>(p.batch) * p.groups * p.slots * p.heads;
  const auto blocks = static_cast<unsigned>((results + kMergeWarps - 1) / kMergeWarps);
  return launch("query_attention_merge_kernel", query_attention_merge_kernel<T>, dim3(blocks),
                dim3(kMergeWarps * kWarpSize), 0, stream, p, results);
}

}  // namespace

Status query_attention(const QueryAttentionParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::bfloat16: return run_forward<__nv_bfloat16>(params, on);
    case DType::float16: return run_forward<__half>(params, on);
    default: return run_forward<float>(params, on);
  }
}

}  // namespace visionllm::cuda
