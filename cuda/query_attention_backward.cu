// Batched query decoding, backward; the contract is in visionllm/query_attention.h, the forward in
// query_attention.cu.
//
// With weights w = exp(score - logsumexp), g = grad_output and mean = g . output of a row:
//   grad_v = sum over rows of w g                        grad_score = w (g . v - mean) / sqrt(D)
//   grad_q = sum over keys of grad_score k'              grad_k' = sum over rows of grad_score q'
// where ' means rotated; grad_q and grad_k are turned back by their slots' angles.
//
// Two launches, no atomics, every sum in a fixed order:
//   1. grad_q: a block has 128 query rows of a KV head (float32: 64) and walks over the keys as the
//      forward does; it leaves the rows' means in the workspace.
//   2. grad_k, grad_v: a block has 64 keys of a KV head, prefix or slots, and walks over the query rows that
//      see them, all rows for the prefix, in tiles of 32 (float32: 16). A warp has 16 keys and computes
//      scores with keys as rows, so that weights go from accumulators into the next product without a detour.
//      float32: grad_k and grad_v are two blocks' work, as one has no registers for both.
//
// Counted for 100 groups of 5 slots, prefix 300, 32 heads of 128, bfloat16 (minimum in brackets; a product is
// 500 rows x 303 keys x 32 heads x 2 x 128 = 1.24 GFLOP, of which the backward has 5 and recomputes 2):
//   device memory  1. q, k, v, output, grad_output, grad_q 24.6 MB + prefix 4.9 MB   2. q, k, v, grad_output,
//                  grad_k, grad_v 24.6 MB + prefix and its gradient 9.8 MB; 64 MB (43 MB if all inputs stayed
//                  in the L2 cache between the launches, as they do on a GPU with 50 MB of it)
//   products       1. 4.6 GFLOP   2. 5.8 GFLOP; 10.5 GFLOP (8.7); 100 groups of 49 slots: 105.5 GFLOP (91.3)
// Shared memory at D > 64: 1. 96 KiB in all types; 2. 64.5 KiB, float32 96.25 KiB.
#include "query_attention.h"
#include "query_attention_tile.cuh"

namespace visionllm::cuda {
namespace {

using namespace query_attention_tile;

template <typename T, int DP>
struct QueryTiles {
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kBytes = (2 * kRows + 4 * kKeys) * DP * static_cast<int>(sizeof(T));
  static_assert(kRows * kStagingStride<DP> * 4 <= kBytes, "finished rows are staged in the tiles' memory");
};

// One block per (batch, KV head, tile of rows).
template <typename T, int DP>
__global__ void __launch_bounds__(QueryTiles<T, DP>::kThreads, 1)
    query_attention_grad_q_kernel(const QueryAttentionBackwardParams backward, int row_tiles, float scale) {
  using Tiles = QueryTiles<T, DP>;
  constexpr int kKeys = Tiles::kKeys, kKeyTiles = kKeys / 8;
  VISIONLLM_DYNAMIC_SHARED(shared);
  T* const queries = reinterpret_cast<T*>(shared);   // [kRows][DP]
  T* const gradients = queries + Tiles::kRows * DP;  // [kRows][DP]
  T* const keys = gradients + Tiles::kRows * DP;     // [2 stages][K, V][kKeys][DP]
  const QueryAttentionParams& p = backward.forward;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, t = lane & 3;

  const Place at(p, blockIdx.x / row_tiles);
  const int first_row = static_cast<int>(blockIdx.x % row_tiles) * Tiles::kRows;
  const int last_row = (first_row + Tiles::kRows < at.rows ? first_row + Tiles::kRows : at.rows) - 1;
  const KeyWalk<kKeys> walk(at, p.slots, first_row, last_row);
  const WarpRows mine(at, p.slots, first_row + warp * 16, lane);
  const auto stage = [&](int tile) { return keys + (tile & 1) * 2 * kKeys * DP; };

  load_tile<T, DP, Tiles::kRows, Tiles::kThreads>(queries, p.channels, [&](int i) -> const T* {
    return first_row + i < at.rows ? at.query<T>(p.q, p.slots, first_row + i) : nullptr;
  });
  load_tile<T, DP, Tiles::kRows, Tiles::kThreads>(gradients, p.channels, [&](int i) -> const T* {
    return first_row + i < at.rows ? at.query<T>(backward.grad_output, p.slots, first_row + i) : nullptr;
  });
  copy_async_commit();
  walk.template load<T, DP, Tiles::kThreads>(stage(0), stage(0) + kKeys * DP, p, at, 0);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  if (p.cosine != nullptr) {
    rotate_rows<T, DP>(queries, warp * 16, warp * 16 + 16, 2, p, lane, [&](int i) -> std::int64_t {
      return first_row + i < at.rows ? at.angles(p, (first_row + i) / at.repeats) : -1;
    });
    __syncwarp();
  }

  // Beyond the end: weights of zero.
  float mean[2] = {}, log2_sum[2] = {kInfinity, kInfinity};
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    if (mine.first + i >= at.rows) break;
    const std::int64_t result = at.result(p.heads, mine.first + i);
    float product = 0.0f;
    if (4 * lane < p.channels) {
      float output[4], gradient[4];
      load_floats(output, static_cast<const T*>(p.output) + result * p.channels + 4 * lane);
      load_floats(gradient, gradients + tile_offset<T, DP>(warp * 16 + i, 4 * lane));
#pragma unroll
      for (int j = 0; j < 4; ++j) product += output[j] * gradient[j];
    }
    product = warp_sum(product);
    if (lane == 0) backward.mean[result] = product;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (i == (lane >> 2) + 8 * j) mean[j] = product, log2_sum[j] = p.logsumexp[result] * kLog2E;
    }
  }

  const float log2_scale = scale * kLog2E;
  float sums[DP / 8][4] = {};
  for (int tile = 0; tile < walk.tiles; ++tile) {
    T* const k_tile = stage(tile);
    T* const v_tile = k_tile + kKeys * DP;
    copy_async_wait<0>();
    __syncthreads();  // the tile is complete, and everybody is through with the other stage
    if (tile + 1 < walk.tiles) {
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

    float scores[kKeyTiles][4] = {}, products[kKeyTiles][4] = {};
    multiply_rows<T, DP>(scores, queries, warp * 16, k_tile, lane);
    multiply_rows<T, DP>(products, gradients, warp * 16, v_tile, lane);
    const bool masked = own || first_key + kKeys > at.length;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 8 * n + 2 * t + (i & 1);
        const bool seen = !masked || (own ? key >= mine.own_group[i >> 1] && key < mine.own_token_end[i >> 1]
                                          : key < at.length);
        const float weight = exp2f(scores[n][i] * log2_scale - log2_sum[i >> 1]);
        scores[n][i] = seen ? weight * (products[n][i] - mean[i >> 1]) * scale : 0.0f;
      }
    }
    add_weighted_rows<T, DP>(sums, scores, k_tile, lane);
  }

  __syncthreads();  // the tiles' memory becomes the staging rows'
  if (!mine.any) return;
  float* const staging = reinterpret_cast<float*>(shared) + warp * 16 * kStagingStride<DP>;
  const float factor[2] = {1.0f, 1.0f};
  stage_rows<DP>(staging, sums, factor, lane);
  for (int i = 0; i < 16 && mine.first + i < at.rows; ++i) {
    const int row = mine.first + i;
    const std::int64_t angles = p.cosine != nullptr ? at.angles(p, row / at.repeats) : -1;
    store_row(static_cast<T*>(backward.grad_q) + at.result(p.heads, row) * p.channels,
              staging + i * kStagingStride<DP>, p, angles, lane);
  }
}

template <typename T, int DP>
struct KeyTiles {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kRows = sizeof(T) == 2 ? 32 : 16;
  static constexpr bool kApart = sizeof(T) == 4;  // grad_k and grad_v
  static constexpr int kTileBytes = (2 * kKeys + 4 * kRows) * DP * static_cast<int>(sizeof(T));
  static constexpr int kBytes = kTileBytes + 4 * kRows * static_cast<int>(sizeof(float));
  static_assert(kKeys * kStagingStride<DP> * 4 <= kTileBytes,
                "finished rows are staged in the tiles' memory");
};

// One block per (batch, KV head, tile of keys), or two: tiles of the prefix, then of the slots' tokens.
template <typename T, int DP>
__global__ void __launch_bounds__(KeyTiles<T, DP>::kThreads, 1)
    query_attention_grad_kv_kernel(const QueryAttentionBackwardParams backward, int prefix_tiles,
                                   int key_tiles, float scale) {
  using Tiles = KeyTiles<T, DP>;
  constexpr int kKeys = Tiles::kKeys, kRows = Tiles::kRows, kThreads = Tiles::kThreads;
  constexpr bool kApart = Tiles::kApart;
  VISIONLLM_DYNAMIC_SHARED(shared);
  T* const k_tile = reinterpret_cast<T*>(shared);  // [kKeys][DP]
  T* const v_tile = k_tile + kKeys * DP;           // [kKeys][DP]
  T* const rows = v_tile + kKeys * DP;             // [2 stages][Q, grad_output][kRows][DP]
  float* const scalars = reinterpret_cast<float*>(shared + Tiles::kTileBytes);  // [2][logsumexp, mean][kRows]
  const QueryAttentionParams& p = backward.forward;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane >> 2, t = lane & 3;

  const int block = blockIdx.x / (kApart ? 2 : 1);
  const bool with_v = !kApart || blockIdx.x % 2 == 0, with_k = !kApart || !with_v;
  const Place at(p, block / key_tiles);
  const int key_tile = block % key_tiles;
  const bool own = key_tile >= prefix_tiles;
  const int first_key = (own ? key_tile - prefix_tiles : key_tile) * kKeys;
  const int key_end = own ? at.tokens : at.length;  // of all tiles
  const int last_key = (first_key + kKeys < key_end ? first_key + kKeys : key_end) - 1;
  // The first row after those that see a token of the slots.
  const auto group_end = [&](int token) { return (token / p.slots + 1) * p.slots * at.repeats; };
  int row_begin = own ? first_key * at.repeats : 0, row_end = own ? group_end(last_key) : at.rows;
  if (first_key >= key_end) row_end = row_begin;  // padding of the prefix: gradients of zero

  // Rows that see this lane's keys g and g + 8 of the warp's 16, and those that see any of the 16.
  int seen_begin[2], seen_end[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = first_key + warp * 16 + g + 8 * i;
    seen_begin[i] = own ? key * at.repeats : 0;
    seen_end[i] = key >= key_end ? 0 : own ? group_end(key) : at.rows;
  }
  const int warp_first = first_key + warp * 16,
            warp_last = warp_first + 15 < last_key ? warp_first + 15 : last_key;
  const int warp_begin = own ? warp_first * at.repeats : 0;
  const int warp_end = warp_first > last_key ? 0 : own ? group_end(warp_last) : at.rows;

  const auto stage = [&](int row) { return ((row - row_begin) / kRows & 1); };
  const auto load_rows = [&](int first) {
    T* const target = rows + stage(first) * 2 * kRows * DP;
    load_tile<T, DP, kRows, kThreads>(target, p.channels, [&](int i) -> const T* {
      return first + i < at.rows ? at.query<T>(p.q, p.slots, first + i) : nullptr;
    });
    load_tile<T, DP, kRows, kThreads>(target + kRows * DP, p.channels, [&](int i) -> const T* {
      return first + i < at.rows ? at.query<T>(backward.grad_output, p.slots, first + i) : nullptr;
    });
    if (threadIdx.x < 2 * kRows) {
      const int row = first + static_cast<int>(threadIdx.x) % kRows;
      const float* const source = static_cast<int>(threadIdx.x) < kRows ? p.logsumexp : backward.mean;
      const bool valid = row < at.rows;
      copy_async_4(scalars + stage(first) * 2 * kRows + threadIdx.x,
                   valid ? source + at.result(p.heads, row) : source, valid);
    }
  };

  float sums[kApart ? 1 : 2][DP / 8][4] = {};  // the block's gradient, or that of v and that of k
  if (row_begin < row_end) {
    const PrefixTensor &pk = p.prefix_k, &pv = p.prefix_v;
    load_tile<T, DP, kKeys, kThreads>(k_tile, p.channels, [&](int i) -> const T* {
      const int key = first_key + i;
      if (key >= key_end) return nullptr;
      if (own) return at.token<T>(p.k, p.slots, key, at.kv_head);
      return static_cast<const T*>(pk.data) + at.batch * pk.stride_b + key * pk.stride_p +
             at.kv_head * pk.stride_h;
    });
    load_tile<T, DP, kKeys, kThreads>(v_tile, p.channels, [&](int i) -> const T* {
      const int key = first_key + i;
      if (key >= key_end) return nullptr;
      if (own) return at.token<T>(p.v, p.slots, key, at.kv_head);
      return static_cast<const T*>(pv.data) + at.batch * pv.stride_b + key * pv.stride_p +
             at.kv_head * pv.stride_h;
    });
    load_rows(row_begin);
    copy_async_commit();
  }

  const float log2_scale = scale * kLog2E;
  for (int first = row_begin; first < row_end; first += kRows) {
    T* const queries = rows + stage(first) * 2 * kRows * DP;
    const T* const gradients = queries + kRows * DP;
    const float* const logsumexps = scalars + stage(first) * 2 * kRows;
    const float* const means = logsumexps + kRows;
    copy_async_wait<0>();
    __syncthreads();  // the rows are complete, and everybody is through with the other stage
    if (first + kRows < row_end) {
      load_rows(first + kRows);
      copy_async_commit();
    }
    if (p.cosine != nullptr) {
      if (own && first == row_begin) {
        rotate_rows<T, DP>(k_tile, warp * 16, warp * 16 + 16, 2, p, lane, [&](int i) -> std::int64_t {
          return first_key + i < key_end ? at.angles(p, first_key + i) : -1;
        });
      }
      rotate_rows<T, DP>(queries, warp * 2, kRows, Tiles::kWarps * 2, p, lane, [&](int i) -> std::int64_t {
        return first + i < at.rows ? at.angles(p, (first + i) / at.repeats) : -1;
      });
      __syncthreads();
    }
    if (first >= warp_end || first + kRows <= warp_begin) continue;

    // [16 keys][kRows rows]
    float weights[kRows / 8][4] = {}, products[kRows / 8][4] = {};
    multiply_rows<T, DP>(weights, k_tile, warp * 16, queries, lane);
    if (with_k) multiply_rows<T, DP>(products, v_tile, warp * 16, gradients, lane);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + 2 * t + (i & 1), row = first + column;
        const bool seen = row >= seen_begin[i >> 1] && row < seen_end[i >> 1];
        const float weight = exp2f(weights[n][i] * log2_scale - logsumexps[column] * kLog2E);
        weights[n][i] = seen ? weight : 0.0f;
        products[n][i] = seen ? weight * (products[n][i] - means[column]) * scale : 0.0f;
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][i] = with_v ? weights[n][i] : products[n][i];
      }
      add_weighted_rows<T, DP>(sums[0], weights, with_v ? gradients : queries, lane);
    } else {
      add_weighted_rows<T, DP>(sums[0], weights, gradients, lane);
      add_weighted_rows<T, DP>(sums[1], products, queries, lane);
    }
  }

  __syncthreads();  // the tiles' memory becomes the staging rows'
  float* const staging = reinterpret_cast<float*>(shared) + warp * 16 * kStagingStride<DP>;
  const float factor[2] = {1.0f, 1.0f};
  const int store_end = own ? at.tokens : p.prefix;  // zeros behind the prefix's end
  const auto store = [&](void* target, const float (&sums)[DP / 8][4], bool turn_back) {
    stage_rows<DP>(staging, sums, factor, lane);
    for (int i = 0; i < 16 && warp_first + i < store_end; ++i) {
      const int key = warp_first + i;
      const std::int64_t row =
          (static_cast<std::int64_t>(at.batch) * store_end + key) * p.kv_heads + at.kv_head;
      store_row(static_cast<T*>(target) + row * p.channels, staging + i * kStagingStride<DP>, p,
                turn_back ? at.angles(p, key) : -1, lane);
    }
    __syncwarp();
  };
  if (with_v) store(own ? backward.grad_v : backward.grad_prefix_v, sums[0], false);
  if (with_k) {
    store(own ? backward.grad_k : backward.grad_prefix_k, sums[kApart ? 0 : 1], own && p.cosine != nullptr);
  }
}

template <typename T, int DP>
Status launch_backward(const QueryAttentionBackwardParams& backward, cudaStream_t stream) {
  const QueryAttentionParams& p = backward.forward;
  const float scale = 1.0f / sqrtf(static_cast<float>(p.channels));
  const std::int64_t tokens = static_cast<std::int64_t>(p.groups) * p.slots;
  const std::int64_t rows = tokens * (p.heads / p.kv_heads);
  const unsigned heads = static_cast<unsigned>(p.batch) * p.kv_heads;
  if (rows > 0) {
    using Tiles = QueryTiles<T, DP>;
    const int row_tiles = static_cast<int>((rows + Tiles::kRows - 1) / Tiles::kRows);
    const Status status =
        launch("query_attention_grad_q_kernel", query_attention_grad_q_kernel<T, DP>, dim3(heads * row_tiles),
               dim3(Tiles::kThreads), Tiles::kBytes, stream, backward, row_tiles, scale);
    if (!status.ok()) return status;
  }
  using Tiles = KeyTiles<T, DP>;
  const int prefix_tiles = (p.prefix + Tiles::kKeys - 1) / Tiles::kKeys;
  const int key_tiles = prefix_tiles + static_cast<int>((tokens + Tiles::kKeys - 1) / Tiles::kKeys);
  return launch("query_attention_grad_kv_kernel", query_attention_grad_kv_kernel<T, DP>,
                dim3(heads * key_tiles * (Tiles::kApart ? 2 : 1)), dim3(Tiles::kThreads), Tiles::kBytes,
                stream, backward, prefix_tiles, key_tiles, scale);
}

template <typename T>
Status run_backward(const QueryAttentionBackwardParams& p, cudaStream_t stream) {
  return p.forward.channels <= 64 ? launch_backward<T, 64>(p, stream) : launch_backward<T, 128>(p, stream);
}

}  // namespace

Status query_attention_backward(const QueryAttentionBackwardParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (params.forward.dtype) {
    case DType::bfloat16: return run_backward<__nv_bfloat16>(params, on);
    case DType::float16: return run_backward<__half>(params, on);
    default: return run_backward<float>(params, on);
  }
}

}  // namespace visionllm::cuda
