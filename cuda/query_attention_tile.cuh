// What the kernels of query_attention and its backward share: tiles in shared memory, tensor-core operands,
// the walk over the keys that a tile of queries sees, rotation, and stores of finished rows.
//
// The query rows of one KV head are numbered row = token * R + r with token = m * S + s and R = H / Hkv: the
// R heads that share keys stand together, and a tile of rows needs the keys of few groups.
//
// Tiles are [rows][DP] with DP = 64 or 128 >= D, zero beyond D. The 16-byte pieces of a row are permuted by
// the row's number, so that neither ldmatrix (8 rows at one column) nor a float32 operand meets a bank twice.
#pragma once

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "query_attention.h"

namespace visionllm::cuda::query_attention_tile {

constexpr float kLog2E = 1.44269504088896f;
constexpr float kInfinity = __builtin_huge_valf();

template <typename T, int DP>
__device__ __forceinline__ int tile_offset(int row, int column) {
  constexpr int V = kVectorSize<T>;
  return row * DP + (((column / V) ^ (row & 7)) * V) + column % V;
}

// ---- operands of one warp's products ----------------------------------------------------------------------

// 16-bit elements: 16 x 8 x 16 products.
template <typename T>
struct Operands {
  static constexpr int kStep = 16;  // products' depth
  struct A {
    std::uint32_t r[4];
  };
  struct B {
    std::uint32_t r[2];
  };

  // A[i][j] = tile[row + i][k + j]
  template <int DP>
  static __device__ __forceinline__ void load_a(A& a, const T* tile, int row, int k, int lane) {
    ldmatrix_x4(a.r, tile + tile_offset<T, DP>(row + (lane & 15), k + (lane >> 4) * 8));
  }

  // Two operands side by side: B[j][i] = tile[n + i][k + j], 16 columns i.
  template <int DP>
  static __device__ __forceinline__ void load_b(B (&b)[2], const T* tile, int n, int k, int lane) {
    std::uint32_t r[4];
    const int row = n + (lane & 7) + ((lane >> 4) << 3);
    ldmatrix_x4(r, tile + tile_offset<T, DP>(row, k + ((lane >> 3) & 1) * 8));
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }

  // Two operands side by side: B[j][i] = tile[k + j][n + i]; goes with an A from accumulators.
  template <int DP>
  static __device__ __forceinline__ void load_b_rows(B (&b)[2], const T* tile, int k, int n, int lane) {
    std::uint32_t r[4];
    ldmatrix_x4_trans(r, tile + tile_offset<T, DP>(k + (lane & 15), n + (lane >> 4) * 8));
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }

  // kStep columns of accumulators, rounded to T.
  static __device__ __forceinline__ void from_accumulators(A& a, const float (*c)[4]) {
    a.r[0] = pack2(from_float<T>(c[0][0]), from_float<T>(c[0][1]));
    a.r[1] = pack2(from_float<T>(c[0][2]), from_float<T>(c[0][3]));
    a.r[2] = pack2(from_float<T>(c[1][0]), from_float<T>(c[1][1]));
    a.r[3] = pack2(from_float<T>(c[1][2]), from_float<T>(c[1][3]));
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_16x8x16(d, a.r, b.r, T());
  }
};

// float32: every factor is the sum of two tf32 numbers, and three
// of the four products are taken; what is left out is at most 2^-21 of the product.
template <>
struct Operands<float> {
  static constexpr int kStep = 8;
  struct A {
    std::uint32_t high[4], low[4];
  };
  struct B {
    std::uint32_t high[2], low[2];
  };

  static __device__ __forceinline__ void divide(std::uint32_t& high, std::uint32_t& low, float x) {
    high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;  // to nearest
    low = __float_as_uint(x - __uint_as_float(high));
  }

  template <int DP>
  static __device__ __forceinline__ void load_a(A& a, const float* tile, int row, int k, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      divide(a.high[i], a.low[i], tile[tile_offset<float, DP>(row + g + (i & 1) * 8, k + t + (i >> 1) * 4)]);
    }
  }

  template <int DP>
  static __device__ __forceinline__ void load_b(B (&b)[2], const float* tile, int n, int k, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      divide(b[i >> 1].high[i & 1], b[i >> 1].low[i & 1],
             tile[tile_offset<float, DP>(n + g + (i >> 1) * 8, k + t + (i & 1) * 4)]);
    }
  }

  // Accumulators hold columns 2t and 2t + 1 where A wants t and t + 4: as the order of a sum is free, the
  // rows of B take the same exchange.
  template <int DP>
  static __device__ __forceinline__ void load_b_rows(B (&b)[2], const float* tile, int k, int n, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      divide(b[i >> 1].high[i & 1], b[i >> 1].low[i & 1],
             tile[tile_offset<float, DP>(k + 2 * t + (i & 1), n + g + (i >> 1) * 8)]);
    }
  }

  static __device__ __forceinline__ void from_accumulators(A& a, const float (*c)[4]) {
    divide(a.high[0], a.low[0], c[0][0]);
    divide(a.high[1], a.low[1], c[0][2]);
    divide(a.high[2], a.low[2], c[0][1]);
    divide(a.high[3], a.low[3], c[0][3]);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_16x8x8_tf32(d, a.low, b.high);
    mma_16x8x8_tf32(d, a.high, b.low);
    mma_16x8x8_tf32(d, a.high, b.high);
  }
};

// sums[16][N * 8] += x[row ..][DP] . y[0 ..][DP] transposed, over all channels.
template <typename T, int DP, int N>
__device__ __forceinline__ void multiply_rows(float (&sums)[N][4], const T* x, int row, const T* y,
                                              int lane) {
  using Op = Operands<T>;
  // Loads of float32 operands would all be moved to the front, and registers run out.
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 2 ? DP / Op::kStep : 2;
#pragma unroll kUnroll
  for (int k = 0; k < DP; k += Op::kStep) {
    typename Op::A a;
    Op::template load_a<DP>(a, x, row, k, lane);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      typename Op::B b[2];
      Op::template load_b<DP>(b, y, n * 8, k, lane);
      Op::multiply(sums[n], a, b[0]);
      Op::multiply(sums[n + 1], a, b[1]);
    }
  }
}

// sums[16][DP] += weights[16][N * 8] . y[0 ..][DP]
template <typename T, int DP, int N>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[DP / 8][4], const float (&weights)[N][4],
                                                  const T* y, int lane) {
  using Op = Operands<T>;
#pragma unroll
  for (int k = 0; k < N * 8; k += Op::kStep) {
    typename Op::A a;
    Op::from_accumulators(a, &weights[k / 8]);
#pragma unroll
    for (int n = 0; n < DP / 8; n += 2) {
      typename Op::B b[2];
      Op::template load_b_rows<DP>(b, y, k, n * 8, lane);
      Op::multiply(sums[n], a, b[0]);
      Op::multiply(sums[n + 1], a, b[1]);
    }
  }
}

// ---- addresses --------------------------------------------------------------------------------------------

// What a block works on, and the sizes that follow from the parameters.
struct Place {
  int batch, kv_head;
  int repeats;  // R, query heads of a KV head
  int tokens;   // M * S
  int rows;     // tokens * R
  int length;   // real tokens of the prefix

  __device__ __forceinline__ Place(const QueryAttentionParams& p, int batch_and_head) {
    batch = batch_and_head / p.kv_heads, kv_head = batch_and_head % p.kv_heads;
    repeats = p.heads / p.kv_heads;
    tokens = p.groups * p.slots;
    rows = tokens * repeats;
    const std::int64_t given = p.prefix_length[batch];
    length = given < 0 ? 0 : given > p.prefix ? p.prefix : static_cast<int>(given);
  }

  // A token's row of one head in [B, M, S, heads, D].
  template <typename T>
  __device__ __forceinline__ const T* token(const SlotTensor& x, int slots, int token, int head) const {
    const int m = token / slots, s = token - m * slots;
    return static_cast<const T*>(x.data) + batch * x.stride_b + m * x.stride_m + s * x.stride_s +
           head * x.stride_h;
  }

  template <typename T>
  __device__ __forceinline__ const T* query(const SlotTensor& x, int slots, int row) const {
    const int at = row / repeats;
    return token<T>(x, slots, at, kv_head * repeats + row - at * repeats);
  }

  // The row's number in the contiguous [B, M, S, H].
  __device__ __forceinline__ std::int64_t result(int heads, int row) const {
    const int at = row / repeats;
    return (static_cast<std::int64_t>(batch) * tokens + at) * heads + kv_head * repeats + row - at * repeats;
  }

  // Where in [positions, D / 2] a token's angles are.
  __device__ __forceinline__ std::int64_t angles(const QueryAttentionParams& p, int token) const {
    return static_cast<std::int64_t>(length + token % p.slots) * (p.channels / 2);
  }
};

// ---- tiles: loading, rotating -----------------------------------------------------------------------------

// Starts copying Rows rows; row_of(i) is the address of row i, or null for a row of zeros. All threads call.
template <typename T, int DP, int Rows, int Threads, typename RowOf>
__device__ __forceinline__ void load_tile(T* tile, int channels, RowOf row_of) {
  constexpr int V = kVectorSize<T>, kPieces = DP / V;
  // Beside the backward's float32 accumulators there is no room for the addresses of several pieces or rows.
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 2 ? 4 : 1;
#pragma unroll kUnroll
  for (int first = 0; first < Rows * kPieces; first += Threads) {
    const int piece = first + static_cast<int>(threadIdx.x);
    if (Rows * kPieces % Threads != 0 && piece >= Rows * kPieces) break;
    const int row = piece / kPieces, column = piece % kPieces * V;
    const T* const source = row_of(row);
    const bool valid = source != nullptr && column < channels;
    copy_async_16(tile + tile_offset<T, DP>(row, column), valid ? source + column : source, valid);
  }
}

// Rotates rows in place, half a warp each: first, first + step, ... below end, where `first` is the lower
// half's; angles_of(i) is where row i's angles are in the tables, or negative for a row to be left alone.
// Other threads' rows are not touched.
template <typename T, int DP, typename AnglesOf>
__device__ __forceinline__ void rotate_rows(T* tile, int first, int end, int step,
                                            const QueryAttentionParams& p, int lane, AnglesOf angles_of) {
  const int half = p.channels / 2, column = (lane & 15) * 4;
  if (column >= half) return;
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 2 ? 4 : 1;
#pragma unroll kUnroll
  for (int row = first + (lane >> 4); row < end; row += step) {
    const std::int64_t angles = angles_of(row);
    if (angles < 0) continue;
    float cosine[4], sine[4], low[4], high[4];
    load_floats(cosine, p.cosine + angles + column);
    load_floats(sine, p.sine + angles + column);
    T* const at_low = tile + tile_offset<T, DP>(row, column);
    T* const at_high = tile + tile_offset<T, DP>(row, column + half);
    load_floats(low, at_low);
    load_floats(high, at_high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = low[i], y = high[i];
      low[i] = x * cosine[i] - y * sine[i];
      high[i] = y * cosine[i] + x * sine[i];
    }
    store_floats(at_low, low);
    store_floats(at_high, high);
  }
}

// The keys that a tile of query rows sees, in tiles of Keys: first the prefix, then the tokens from the first
// row's group on to the last row's token.
template <int Keys>
struct KeyWalk {
  int prefix_tiles, tiles;
  int own_first, own_end;  // tokens

  __device__ __forceinline__ KeyWalk(const Place& at, int slots, int first_row, int last_row) {
    prefix_tiles = (at.length + Keys - 1) / Keys;
    own_first = first_row / at.repeats / slots * slots;
    own_end = last_row / at.repeats + 1;
    tiles = prefix_tiles + (own_end - own_first + Keys - 1) / Keys;
  }

  __device__ __forceinline__ bool is_own(int tile) const { return tile >= prefix_tiles; }

  // First key of the tile: a prefix token or one of the slots' tokens.
  __device__ __forceinline__ int first_key(int tile) const {
    return is_own(tile) ? own_first + (tile - prefix_tiles) * Keys : tile * Keys;
  }

  template <typename T, int DP, int Threads>
  __device__ __forceinline__ void load(T* k_tile, T* v_tile, const QueryAttentionParams& p, const Place& at,
                                       int tile) const {
    const int first = first_key(tile);
    if (is_own(tile)) {
      const int end = own_end;
      load_tile<T, DP, Keys, Threads>(k_tile, p.channels, [&](int i) -> const T* {
        return first + i < end ? at.token<T>(p.k, p.slots, first + i, at.kv_head) : nullptr;
      });
      load_tile<T, DP, Keys, Threads>(v_tile, p.channels, [&](int i) -> const T* {
        return first + i < end ? at.token<T>(p.v, p.slots, first + i, at.kv_head) : nullptr;
      });
    } else {
      const PrefixTensor &k = p.prefix_k, &v = p.prefix_v;
      const T* const k_rows = static_cast<const T*>(k.data) + at.batch * k.stride_b + at.kv_head * k.stride_h;
      const T* const v_rows = static_cast<const T*>(v.data) + at.batch * v.stride_b + at.kv_head * v.stride_h;
      load_tile<T, DP, Keys, Threads>(k_tile, p.channels, [&](int i) -> const T* {
        return first + i < at.length ? k_rows + (first + i) * k.stride_p : nullptr;
      });
      load_tile<T, DP, Keys, Threads>(v_tile, p.channels, [&](int i) -> const T* {
        return first + i < at.length ? v_rows + (first + i) * v.stride_p : nullptr;
      });
    }
  }

  // Rotates a tile of the slots' keys; all Warps call.
  template <typename T, int DP, int Warps>
  __device__ __forceinline__ void rotate(T* k_tile, const QueryAttentionParams& p, const Place& at, int tile,
                                         int warp, int lane) const {
    const int first = first_key(tile);
    rotate_rows<T, DP>(k_tile, warp * 2, Keys, Warps * 2, p, lane, [&](int i) -> std::int64_t {
      return first + i < own_end ? at.angles(p, first + i) : -1;
    });
  }
};

// The 16 query rows of one warp. A lane's accumulators belong to rows g and g + 8 of them, g = lane / 4.
struct WarpRows {
  int first;                           // row of the KV head
  bool any;                            // whether there is any
  int group_first, token_end;          // tokens that any of the rows sees
  int own_group[2], own_token_end[2];  // tokens that this lane's rows see; none for a row beyond the end

  __device__ __forceinline__ WarpRows(const Place& at, int slots, int first_of_warp, int lane) {
    first = first_of_warp;
    any = first < at.rows;
    const int last = (first + 16 < at.rows ? first + 16 : at.rows) - 1;
    group_first = first / at.repeats / slots * slots, token_end = last / at.repeats + 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + lane / 4 + 8 * i, token = row / at.repeats;
      own_group[i] = token / slots * slots, own_token_end[i] = row < at.rows ? token + 1 : 0;
    }
  }
};

// ---- finished rows ----------------------------------------------------------------------------------------

template <int DP>
constexpr int kStagingStride = DP + 8;  // in floats: accumulators are written without bank conflicts

// A warp puts its 16 rows of accumulators, rows g and g + 8 times factor[], into its own shared memory.
template <int DP>
__device__ __forceinline__ void stage_rows(float* staging, const float (&sums)[DP / 8][4],
                                           const float (&factor)[2], int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float both[2] = {sums[n][2 * i] * factor[i], sums[n][2 * i + 1] * factor[i]};
      store_floats(staging + (g + 8 * i) * kStagingStride<DP> + 8 * n + 2 * t, both);
    }
  }
  __syncwarp();
}

// Writes one staged row, all lanes together; `angles` >= 0: turned back by them (the gradient of a rotation).
template <typename T>
__device__ __forceinline__ void store_row(T* target, const float* row, const QueryAttentionParams& p,
                                          std::int64_t angles, int lane) {
  const int column = 4 * lane, half = p.channels / 2;
  if (column >= p.channels) return;
  float values[4];
  load_floats(values, row + column);
  if (angles >= 0) {
    const bool is_low = column < half;
    const int angle = is_low ? column : column - half;
    float partner[4], cosine[4], sine[4];
    load_floats(partner, row + (is_low ? column + half : column - half));
    load_floats(cosine, p.cosine + angles + angle);
    load_floats(sine, p.sine + angles + angle);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = values[i] * cosine[i] + (is_low ? partner[i] : -partner[i]) * sine[i];
    }
  }
  store_floats(target + column, values);
}

}  // namespace visionllm::cuda::query_attention_tile
