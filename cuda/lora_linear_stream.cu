// lora_linear for few rows (at most kStreamRows), where reading W is all that counts:
//
//   y[m, n] = sum over i of x[m, i] w[n, i] + bias[n] + sum over r of s[m, r] B[a][n, r]
//
// A block has 16 or 32 rows of W to itself; its eight warps share the sum, each taking every eighth step, and add
// their parts in a fixed order. W goes from memory to registers in 16-byte loads, three or four steps ahead of its
// use, is read once and never rests in shared memory: it is the column operand of the tensor cores, x the row
// operand, and the lanes of a group of four take consecutive terms of the sum (lora_linear_low_rank.cu says why
// that is allowed), so that a loaded vector is two operands as it stands. int8 becomes 16 bits in registers. The
// low-rank term is computed in float32 behind the first loads of W, before the loop.
//
// At K = N = 4096 in bfloat16, R = 16, one row: W 33.55 MB read once, B 131 KB, x 8 KB by each block, from L2;
// 33.6 MFLOP, and 16 times as many in the tensor cores, whose tiles have 16 rows. With int8: 16.78 MB.
#include "lora_linear_fragments.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// kTokens: 8 or a multiple of 16, at least M. kTiles: of eight rows of W.
template <typename T, typename W, int kTokens, int kTiles, bool kVector>
__global__ __launch_bounds__(kThreads, kTokens == 8 ? 2 : 1) void stream_kernel(ProductParams p) {
  constexpr int kRun = sizeof(W) == 1 ? 16 : 8;  // terms of a lane and step
  constexpr int kRows = 8 * kTiles, kTokenTiles = (kTokens + 15) / 16, kOutputs = kTokens * kRows;
  constexpr int kHalves = kTokens == 8 ? 1 : 2;  // of a 16-row token tile, those that have tokens
  constexpr int kStages = kTokens == 8 ? 4 : 3;  // steps of W in flight: 32 KB of a block, or 48 KB
  VISIONLLM_SHARED_ARRAY(float, part, kWarps* kOutputs);
  VISIONLLM_SHARED_ARRAY(float, low_rank, kOutputs);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, g = lane / 4, q = lane % 4;
  const std::int64_t n0 = static_cast<std::int64_t>(blockIdx.x) * kRows;

  // Terms are numbered in 32 bits: length < 2^31, and the loads ahead overshoot by less than another 2^31.
  const unsigned length = static_cast<unsigned>(p.length), steps = (length + 4 * kRun - 1) / (4 * kRun);
  const auto terms_from = [&](unsigned i, bool valid) {
    return valid && i < length ? static_cast<int>(length - i) : 0;
  };
  const W* w_row[kTiles];  // row g of each tile
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const std::int64_t n = n0 + 8 * tile + g;
    w_row[tile] = static_cast<const W*>(p.w) + (n < p.N ? n : 0) * p.w_stride;
  }
  const T* x_row[kTokenTiles][kHalves];  // tokens g and g + 8 of each tile
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const std::int64_t m = 16 * t + 8 * h + g;
      x_row[t][h] = static_cast<const T*>(p.x) + (m < p.M ? m : 0) * p.x_stride;
    }
  }

  std::uint32_t ahead[kStages][kTiles][4];  // 16 bytes of each row
  const auto load = [&](std::uint32_t (&rows)[kTiles][4], unsigned step) {
    const unsigned i = (step * 4 + q) * kRun;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_words<kVector, kRun>(rows[tile], w_row[tile] + i, terms_from(i, n0 + 8 * tile + g < p.N));
    }
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(ahead[stage], warp + kWarps * stage);

  // Each thread keeps the low-rank term of its own outputs in shared memory.
  if (p.adapters.rank > 0) {
    const int R = p.adapters.rank;
#pragma unroll 1
    for (int o = threadIdx.x; o < kOutputs; o += kThreads) {
      const std::int64_t n = n0 + o % kRows, m = o / kRows;
      const int a = m < p.M && n < p.N ? adapter_of_row(p.adapters.index, m, p.M, p.adapters.count) : -1;
      float value = 0.0f;
      if (a >= 0) {
        const T* const v = static_cast<const T*>(p.v) + (a * p.N + n) * R;
        const float* const s = p.s + m * R;
        int r = 0;
        if (kVector && R % 8 == 0) {
#pragma unroll 1
          for (; r < R; r += 8) {
            float terms[8];
            load_floats<T, 8>(terms, v + r);
#pragma unroll
            for (int i = 0; i < 8; ++i) value = fmaf(s[r + i], terms[i], value);
          }
        }
#pragma unroll 1
        for (; r < R; ++r) value = fmaf(s[r], to_float(v[r]), value);
      }
      low_rank[o] = value;
    }
  }

  float sum[kTokenTiles][kTiles][4] = {};
#pragma unroll 1
  for (unsigned step = warp; step < steps; step += kWarps * kStages) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const unsigned now = step + kWarps * stage, i = (now * 4 + q) * kRun;
      std::uint32_t tokens[kTokenTiles][kHalves][kRun / 2];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          load_words<kVector, kRun>(tokens[t][h], x_row[t][h] + i, terms_from(i, 16 * t + 8 * h + g < p.M));
        }
      }
#pragma unroll
      for (int k = 0; k < kRun / 4; ++k) {  // products of 16 terms, four of each lane
        std::uint32_t a[kTokenTiles][4];
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          a[t][0] = tokens[t][0][2 * k], a[t][2] = tokens[t][0][2 * k + 1];
          a[t][1] = kHalves == 2 ? tokens[t][kHalves - 1][2 * k] : 0;
          a[t][3] = kHalves == 2 ? tokens[t][kHalves - 1][2 * k + 1] : 0;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          std::uint32_t b[2];
          if constexpr (sizeof(W) == 1) {
            widen_int8<T>(b, ahead[stage][tile][k]);
          } else {
            b[0] = ahead[stage][tile][2 * k], b[1] = ahead[stage][tile][2 * k + 1];
          }
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) mma_16x8x16(sum[t][tile], a[t], b, T{});
        }
      }
      load(ahead[stage], now + kWarps * kStages);
    }
  }

  float* const own = part + warp * kOutputs;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        own[(16 * t + 8 * (i / 2) + g) * kRows + 8 * tile + 2 * q + i % 2] = sum[t][tile][i];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int o = threadIdx.x; o < kOutputs; o += kThreads) {
    const std::int64_t n = n0 + o % kRows, m = o / kRows;
    if (m >= p.M || n >= p.N) continue;
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) value += part[i * kOutputs + o];
    if constexpr (sizeof(W) == 1) value *= p.w_scale[n];
    if (p.adapters.rank > 0) value += low_rank[o];
    if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.y)[m * p.y_stride + n] = from_float<T>(value);
  }
}

template <typename T, typename W>
Status launch_stream(const ProductParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* address, std::int64_t stride, std::int64_t bytes) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0 && stride * bytes % 16 == 0;
  };
  constexpr std::int64_t kRun = sizeof(W) == 1 ? 16 : 8;
  const bool vector = p.length % kRun == 0 && aligned(p.x, p.x_stride, 2) && aligned(p.v, 0, 2) &&
                      aligned(p.w, p.w_stride, sizeof(W));
  const auto kernel = !vector    ? stream_kernel<T, W, 32, 4, false>
                      : p.M <= 8 ? stream_kernel<T, W, 8, 2, true>
                                 : stream_kernel<T, W, 32, 4, true>;
  const int rows = vector && p.M <= 8 ? 16 : 32;
  return launch("lora_linear stream", kernel, dim3(static_cast<unsigned>(blocks_of(p.N, rows))), kThreads, 0,
                stream, p);
}

}  // namespace

Status lora_stream(const ProductParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::bfloat16) {
    return p.int8 ? launch_stream<__nv_bfloat16, std::int8_t>(p, on)
                  : launch_stream<__nv_bfloat16, __nv_bfloat16>(p, on);
  }
  return p.int8 ? launch_stream<__half, std::int8_t>(p, on) : launch_stream<__half, __half>(p, on);
}

}  // namespace visionllm::cuda
