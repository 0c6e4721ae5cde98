// Low-rank states of lora_linear:
//
//   s[t, r] = scaling * scale[a] * sum over c of m[t, c] v[a][r, c]        forward: m = x, v = A
//   s[t, r] = scaling * scale[a] * sum over c of m[t, c] v[a][c, r]        backward: m = dy, v = B
//
// with a = adapter_index[t]. 16-bit types: one block per 16 rows and 16 or 64 ranks; its warps share the sum and
// add their parts in a fixed order. The tensor cores' operands go from global memory to registers without
// shared memory: in the product of a 16-row tile the order of the terms is free, so lane q of a group of four
// takes the eight consecutive terms 8q .. 8q + 7 of each 32, one 16-byte load, where the instruction's layout
// would ask for pairs. Rows of several adapters in one tile: the tile is computed once per adapter that occurs in
// it, and each row keeps its own.
//
// At T = 500, K = 4096, R = 16 in bfloat16: x 4.1 MB and A 0.13 MB read once from memory (A 32 times from L2),
// s 32 KB and its halves 32 KB written; 66 MFLOP.
#include "lora_linear_fragments.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {
namespace {

constexpr int kTileRows = 16;

template <bool kTransposed, int kTiles, bool kVector, typename T>
struct LowRankOperand {
  std::uint32_t b[2][kTiles][2];  // of two 16-term products: [product][tile][register]

  // Terms c .. c + 7 of the lane; `terms` of them exist. Tile j, column g is rank r0 + 8 j + g, transposed
  // r0 + kTiles g + j: then a lane's ranks lie side by side.
  __device__ __forceinline__ void load(const T* v, std::int64_t c, std::int64_t terms, std::int64_t columns,
                                       int r0, int R, int g) {
    if constexpr (!kTransposed) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int r = r0 + 8 * j + g;
        std::uint32_t words[4];
        load_words<kVector, 8>(words, v + static_cast<std::int64_t>(r) * columns + c, r < R ? terms : 0);
#pragma unroll
        for (int s = 0; s < 2; ++s) b[s][j][0] = words[2 * s], b[s][j][1] = words[2 * s + 1];
      }
    } else {
      const int r = r0 + kTiles * g;
      T rows[8][kTiles];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const T* const row = v + (c + i) * R + r;
        const int count = i < terms ? R - r : 0;
        if (kVector && count >= kTiles) {
          const Vector<T, kTiles> vector = load_vector<T, kTiles>(row);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) rows[i][j] = vector[j];
        } else {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) rows[i][j] = j < count ? row[j] : from_float<T>(0.0f);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          b[s][j][0] = pack2(rows[4 * s][j], rows[4 * s + 1][j]);
          b[s][j][1] = pack2(rows[4 * s + 2][j], rows[4 * s + 3][j]);
        }
      }
    }
  }
};

template <typename T, bool kTransposed, int kTiles, int kWarps, bool kVector>
__global__ __launch_bounds__(kWarps* kWarpSize, 1) void low_rank_kernel(LowRankParams p) {
  constexpr int kRanks = 8 * kTiles;
  VISIONLLM_SHARED_ARRAY(float, part, kWarps * kTileRows * kRanks);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.x) * kTileRows;
  const int r0 = blockIdx.y * kRanks, R = p.adapters.rank;
  const T* const m = static_cast<const T*>(p.m);
  const int mine =
      lane < kTileRows ? adapter_of_row(p.adapters.index, row0 + lane, p.T, p.adapters.count) : -1;

  const auto store = [&](std::int64_t t, int r, float value) {
    if (r < R) p.s[t * R + r] = value;
    if (p.s_half != nullptr && r < p.half) {
      T* const row = static_cast<T*>(p.s_half) + t * 2 * p.half;
      split_float(row + r, row + p.half + r, value);
    }
  };
  for (int i = threadIdx.x; i < kTileRows * kRanks; i += kWarps * kWarpSize) {
    const std::int64_t t = row0 + i / kRanks;
    if (t < p.T && adapter_of_row(p.adapters.index, t, p.T, p.adapters.count) < 0) {
      store(t, r0 + i % kRanks, 0.0f);
    }
  }

  for (int a = next_adapter(mine, -1); a != INT_MAX; a = next_adapter(mine, a)) {
    const T* const v = static_cast<const T*>(p.v) + static_cast<std::int64_t>(a) * R * p.columns;
    float sum[kTiles][4] = {};
#pragma unroll(kVector && !kTransposed && kTiles == 2 ? 4 : 1)  // as many as registers are there for
    for (std::int64_t c0 = warp * 32; c0 < p.columns; c0 += kWarps * 32) {
      const std::int64_t c = c0 + 8 * q, terms = p.columns - c;
      std::uint32_t x[2][4];  // rows g and g + 8
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int64_t t = row0 + 8 * h + g;
        load_words<kVector, 8>(x[h], m + t * p.m_stride + c, t < p.T ? terms : 0);
      }
      LowRankOperand<kTransposed, kTiles, kVector, T> operand;
      operand.load(v, c, terms, p.columns, r0, R, g);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const std::uint32_t rows[4] = {x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1]};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) mma_16x8x16(sum[j], rows, operand.b[s][j], T{});
      }
    }
    float* const own = part + warp * kTileRows * kRanks;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 2 * q + i % 2;
        const int r = kTransposed ? kTiles * column + j : 8 * j + column;
        own[(g + 8 * (i / 2)) * kRanks + r] = sum[j][i];
      }
    }
    __syncthreads();
    const float factor = p.adapters.scaling * (p.adapters.scale == nullptr ? 1.0f : p.adapters.scale[a]);
    for (int i = threadIdx.x; i < kTileRows * kRanks; i += kWarps * kWarpSize) {
      const std::int64_t t = row0 + i / kRanks;
      float value = 0.0f;
      for (int w = 0; w < kWarps; ++w) value += part[w * kTileRows * kRanks + i];
      if (adapter_of_row(p.adapters.index, t, p.T, p.adapters.count) == a) {
        store(t, r0 + i % kRanks, factor * value);
      }
    }
    __syncthreads();
  }
}

// float32: a warp per row and eight ranks.
constexpr int kFloatRanks = 8;
constexpr int kFloatWarps = 8;

__global__ __launch_bounds__(kFloatWarps* kWarpSize) void low_rank_float_kernel(LowRankParams p) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kFloatWarps + warp;
  const int r0 = blockIdx.y * kFloatRanks, R = p.adapters.rank;
  if (t >= p.T) return;
  const int a = adapter_of_row(p.adapters.index, t, p.T, p.adapters.count);
  const int ranks = R - r0 < kFloatRanks ? R - r0 : kFloatRanks;
  float sum[kFloatRanks] = {};
  if (a >= 0) {
    const float* const m = static_cast<const float*>(p.m) + t * p.m_stride;
    const float* const v = static_cast<const float*>(p.v) + static_cast<std::int64_t>(a) * R * p.columns;
    const std::int64_t stride_c = p.transposed ? R : 1, stride_r = p.transposed ? 1 : p.columns;
    for (std::int64_t c = lane; c < p.columns; c += kWarpSize) {
      const float x = m[c];
#pragma unroll
      for (int j = 0; j < kFloatRanks; ++j) {
        if (j < ranks) sum[j] = fmaf(x, v[c * stride_c + (r0 + j) * stride_r], sum[j]);
      }
    }
  }
  const float factor =
      a < 0 ? 0.0f : p.adapters.scaling * (p.adapters.scale == nullptr ? 1.0f : p.adapters.scale[a]);
#pragma unroll
  for (int j = 0; j < kFloatRanks; ++j) {
    const float value = warp_sum(sum[j]);
    if (lane == 0 && j < ranks) p.s[t * R + r0 + j] = factor * value;
  }
}

template <typename T, bool kTransposed, int kTiles, int kWarps>
Status launch_low_rank(const LowRankParams& p, bool vector, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(p.T, kTileRows)),
                  static_cast<unsigned>(blocks_of(p.adapters.rank, 8 * kTiles)));
  const auto kernel = vector ? low_rank_kernel<T, kTransposed, kTiles, kWarps, true>
                             : low_rank_kernel<T, kTransposed, kTiles, kWarps, false>;
  return launch("lora_linear low rank", kernel, grid, kWarps * kWarpSize, 0, stream, p);
}

template <typename T>
Status launch_low_rank_type(const LowRankParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  };
  const bool wide = p.adapters.rank > 32;
  const std::int64_t run = p.transposed ? (wide ? 8 : 2) : 8;  // elements of a load of v
  const std::int64_t length = p.transposed ? p.adapters.rank : p.columns;
  const bool vector =
      aligned(p.m) && aligned(p.v) && p.m_stride % 8 == 0 && p.columns % 8 == 0 && length % run == 0;
  if (p.transposed) {
    return wide ? launch_low_rank<T, true, 8, 8>(p, vector, stream)
                : launch_low_rank<T, true, 2, 8>(p, vector, stream);
  }
  return wide ? launch_low_rank<T, false, 8, 8>(p, vector, stream)
              : launch_low_rank<T, false, 2, 16>(p, vector, stream);
}

}  // namespace

Status lora_low_rank(const LowRankParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::bfloat16: return launch_low_rank_type<__nv_bfloat16>(p, on);
    case DType::float16: return launch_low_rank_type<__half>(p, on);
    default: break;
  }
  const dim3 grid(static_cast<unsigned>(blocks_of(p.T, kFloatWarps)),
                  static_cast<unsigned>(blocks_of(p.adapters.rank, kFloatRanks)));
  return launch("lora_linear low rank float", low_rank_float_kernel, grid, kFloatWarps * kWarpSize, 0, on, p);
}

}  // namespace visionllm::cuda
