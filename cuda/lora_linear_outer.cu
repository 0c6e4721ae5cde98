// Gradients of lora_linear's adapters, both in one launch:
//
//   dA[a][r, c] = sum over the rows t of adapter a of x[t, c] ds[t, r]
//   dB[a][c, r] = sum over the rows t of adapter a of dy[t, c] s[t, r]
//
// A block has 64 columns c and 16 ranks of one adapter; its eight warps share the rows and add their parts in a
// fixed order, so nothing is added atomically. 16-bit types: ranks are the rows and columns the columns of a
// tensor-core product. Both operands are wanted along t but lie along the other dimension, so a lane loads
// eight rows t of eight columns, 16 bytes each, and pairs the elements of neighbouring rows in registers; its
// columns lie side by side (tile j, column g is column 8 g + j). s enters as high + low part, to 16 bits of
// mantissa and more. Rows of other adapters are not read.
//
// At T = 500, K = N = 4096, R = 16 in bfloat16: x and dy 8.2 MB read once, s and ds 64 KB by each of 128 blocks,
// from L2; dA and dB 0.26 MB written; 131 MFLOP, twice that with the low parts.
#include "lora_linear_fragments.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {
namespace {

constexpr int kColumns = 64;
constexpr int kRanks = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// The columns of both problems stand side by side in the grid.
__device__ __forceinline__ const OuterProblem& problem_of(const OuterParams& p, int width, std::int64_t* c0) {
  const std::int64_t blocks_a = p.a.g == nullptr ? 0 : (p.a.columns + width - 1) / width;
  const bool first = blockIdx.x < blocks_a;
  *c0 = (blockIdx.x - (first ? 0 : blocks_a)) * width;
  return first ? p.a : p.b;
}

template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, 1) void outer_kernel(OuterParams p) {
  VISIONLLM_SHARED_ARRAY(float, part, kWarps * kRanks * kColumns);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
  std::int64_t c0;
  const OuterProblem& problem = problem_of(p, kColumns, &c0);
  const int r0 = blockIdx.y * kRanks, adapter = blockIdx.z, R = p.adapters.rank;
  const std::int64_t c = c0 + 8 * g;
  const T* const m = static_cast<const T*>(problem.m) + c;
  const int columns = problem.columns - c < 8 ? static_cast<int>(problem.columns - c) : 8;  // of the lane

  float sum[8][4] = {};
#pragma unroll 1
  for (std::int64_t t0 = warp * 32; t0 < p.T; t0 += kWarps * 32) {
    std::uint32_t rows[8][4];  // row t0 + 8 q + i, eight columns
    float state[2][8];         // ranks g and g + 8 of the same rows
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::int64_t t = t0 + 8 * q + i;
      const bool taken = adapter_of_row(p.adapters.index, t, p.T, p.adapters.count) == adapter;
      load_words<kVector, 8>(rows[i], m + t * problem.m_stride, taken ? columns : 0);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = r0 + 8 * h + g;
        state[h][i] = taken && r < R ? problem.s[t * R + r] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // products of 16 rows, four of each lane
      std::uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          T big[2], small[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) split_float(&big[e], &small[e], state[h][4 * k + 2 * i + e]);
          high[2 * i + h] = pack2(big[0], big[1]);
          low[2 * i + h] = pack2(small[0], small[1]);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        std::uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const std::uint32_t first = rows[4 * k + 2 * i][j / 2], second = rows[4 * k + 2 * i + 1][j / 2];
          b[i] = j % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
        }
        mma_16x8x16(sum[j], high, b, T{});
        mma_16x8x16(sum[j], low, b, T{});
      }
    }
  }

  float* const own = part + warp * kRanks * kColumns;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(g + 8 * (i / 2)) * kColumns + 8 * (2 * q + i % 2) + j] = sum[j][i];
  }
  __syncthreads();
  // Neighbouring threads write neighbouring elements of either gradient.
  const bool along_columns = problem.stride_c == 1;
  for (int o = threadIdx.x; o < kRanks * kColumns; o += kThreads) {
    const int r = along_columns ? o / kColumns : o % kRanks,
              column = along_columns ? o % kColumns : o / kRanks;
    if (r0 + r >= R || c0 + column >= problem.columns) continue;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += part[(w * kRanks + r) * kColumns + column];
    static_cast<T*>(problem.g)[adapter * problem.stride_a + (r0 + r) * problem.stride_r +
                               (c0 + column) * problem.stride_c] = from_float<T>(value);
  }
}

// float32: a thread per column and eight ranks, for every eighth row.
constexpr int kFloatColumns = 32;
constexpr int kFloatRanks = 8;

__global__ __launch_bounds__(kThreads) void outer_float_kernel(OuterParams p) {
  VISIONLLM_SHARED_ARRAY(float, part, kWarps * kFloatRanks * kFloatColumns);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  std::int64_t c0;
  const OuterProblem& problem = problem_of(p, kFloatColumns, &c0);
  const int r0 = blockIdx.y * kFloatRanks, adapter = blockIdx.z, R = p.adapters.rank;
  const std::int64_t c = c0 + lane;
  const int ranks = R - r0 < kFloatRanks ? R - r0 : kFloatRanks;
  float sum[kFloatRanks] = {};
  if (c < problem.columns) {
    for (std::int64_t t = warp; t < p.T; t += kWarps) {
      if (adapter_of_row(p.adapters.index, t, p.T, p.adapters.count) != adapter) continue;
      const float m = static_cast<const float*>(problem.m)[t * problem.m_stride + c];
#pragma unroll
      for (int j = 0; j < kFloatRanks; ++j) {
        if (j < ranks) sum[j] = fmaf(m, problem.s[t * R + r0 + j], sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kFloatRanks; ++j) part[(warp * kFloatRanks + j) * kFloatColumns + lane] = sum[j];
  __syncthreads();
  if (c >= problem.columns || warp >= ranks) return;
  float value = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value += part[(w * kFloatRanks + warp) * kFloatColumns + lane];
  static_cast<float*>(
      problem.g)[adapter * problem.stride_a + (r0 + warp) * problem.stride_r + c * problem.stride_c] = value;
}

std::int64_t column_blocks(const OuterParams& p, int width) {
  return (p.a.g == nullptr ? 0 : blocks_of(p.a.columns, width)) +
         (p.b.g == nullptr ? 0 : blocks_of(p.b.columns, width));
}

bool vectors(const OuterProblem& problem) {
  return problem.g == nullptr || (problem.columns % 8 == 0 && problem.m_stride % 8 == 0 &&
                                  reinterpret_cast<std::uintptr_t>(problem.m) % 16 == 0);
}

template <typename T>
Status launch_outer(const OuterParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(column_blocks(p, kColumns)),
                  static_cast<unsigned>(blocks_of(p.adapters.rank, kRanks)),
                  static_cast<unsigned>(p.adapters.count));
  const auto kernel = vectors(p.a) && vectors(p.b) ? outer_kernel<T, true> : outer_kernel<T, false>;
  return launch("lora_linear outer", kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

Status lora_outer(const OuterParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.adapters.count == 0 || column_blocks(p, kColumns) == 0) return {};
  switch (p.dtype) {
    case DType::bfloat16: return launch_outer<__nv_bfloat16>(p, on);
    case DType::float16: return launch_outer<__half>(p, on);
    default: break;
  }
  const dim3 grid(static_cast<unsigned>(column_blocks(p, kFloatColumns)),
                  static_cast<unsigned>(blocks_of(p.adapters.rank, kFloatRanks)),
                  static_cast<unsigned>(p.adapters.count));
  return launch("lora_linear outer float", outer_float_kernel, grid, kThreads, 0, on, p);
}

}  // namespace visionllm::cuda
