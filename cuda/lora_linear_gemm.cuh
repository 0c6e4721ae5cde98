// The tensor-core product of lora_linear with 16-bit x and W of the same type or int8:
//
//   y[m, n] = sum over i of x[m, i] w[n, i] + bias[n] + sum over r of s[m, r] v[a][n, r]     forward
//   y[m, n] = sum over i of x[m, i] w[i, n]           + sum over r of s[m, r] v[a][r, n]     transposed: backward
//
// A block computes 64 or 128 rows by 128 columns with four warps of 64 columns each and half the rows. The sum
// runs in stages of 32 terms through a ring of four buffers that cp.async fills ahead; chunks of 16 bytes are
// permuted within a buffer so that neither the copies nor ldmatrix meet bank conflicts. The low-rank term is
// further stages of the same loop into the same accumulators: x is then [high | low] of s in 16 bits, w is v
// twice. Rows of other adapters are zero in such a stage, and there is one set of stages per adapter that occurs
// in the tile. int8 weights stay int8 in shared memory and are widened on the way to the registers; their scale
// is applied to the accumulators before the low-rank stages or, transposed, to the widened weight.
//
// A part of the sum (blockIdx.y) may go to a block of its own, which writes float32 for lora_add_partial.
//
// At K = N = 4096, R = 16, bfloat16, tiles of 128 rows: 128 + 1 stages, so that the adapter adds 0.8 % to the
// products; T = 900 is 256 tiles of 30.4 GFLOP together (34.4 with the empty rows of the last row tile).
#pragma once

#include "device/async_copy.cuh"
#include "lora_linear_fragments.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {

constexpr int kGemmStages = 4;
constexpr int kGemmThreads = 128;
constexpr int kGemmRowGroup = 8;  // row tiles that share a column tile of W while it is in L2

template <int kRows>
struct GemmShared {
  static constexpr int kLeft = kRows * kGemmDepth * 2;          // bytes of x in a stage
  static constexpr int kRight = kGemmColumns * kGemmDepth * 2;  // and of w, int8 too: v is wider
  static constexpr int kStage = kLeft + kRight;
  static constexpr int kAdapters = kGemmStages * kStage;  // int [kRows] behind the ring
  static constexpr int kBytes = kAdapters + kRows * 4;
};

// Byte offsets of 16-byte chunks in a buffer, permuted so that eight rows' equal chunks lie in different banks.
__device__ __forceinline__ int chunk_of_64(int row, int chunk) {  // rows of 64 bytes
  return (row * 4 + (chunk ^ (row >> 1 & 3))) * 16;
}
__device__ __forceinline__ int chunk_of_256(int row, int chunk) {
  return (row * 16 + (chunk ^ (row & 7))) * 16;
}
__device__ __forceinline__ int chunk_of_32(int row, int chunk) {
  return (row * 2 + (chunk ^ (row >> 2 & 1))) * 16;
}
__device__ __forceinline__ int chunk_of_128(int row, int chunk) {
  return (row * 8 + (chunk ^ (row >> 1 & 7))) * 16;
}

// 16 bytes of elements, zero beyond the first `count`.
template <typename T>
__device__ __forceinline__ void copy_chunk(unsigned char* shared, const T* source, std::int64_t count,
                                           bool aligned) {
  constexpr int kElements = 16 / sizeof(T);
  if (aligned && (count >= kElements || count <= 0)) {
    copy_async_16(shared, source, count > 0);
  } else {
    std::uint32_t words[4];
    load_words<false, kElements>(words, source, count);
    *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <typename T, typename W, bool kTransposed, int kRows>
__global__ __launch_bounds__(kGemmThreads, kRows == 128 || (sizeof(W) == 1 && kTransposed)
                                               ? 2
                                               : 3) void gemm_kernel(ProductParams p) {
  using Shared = GemmShared<kRows>;
  constexpr bool kInt8 = sizeof(W) == 1;
  constexpr int kWarpRows = kRows / 2, kRowTiles = kWarpRows / 16, kColumnTiles = 8;
  constexpr int kPerChunk = 16 / sizeof(W);  // elements of w
  VISIONLLM_DYNAMIC_SHARED(shared);
  int* const row_adapter = reinterpret_cast<int*>(shared + Shared::kAdapters);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int g = lane / 4, q = lane % 4, warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * 64;

  // Row tiles in groups, so that blocks that run together share w and not only x.
  const std::int64_t row_tiles = (p.M + kRows - 1) / kRows;
  const std::int64_t column_tiles = (p.N + kGemmColumns - 1) / kGemmColumns;
  const std::int64_t group = blockIdx.x / (kGemmRowGroup * column_tiles);
  const std::int64_t in_group = blockIdx.x % (kGemmRowGroup * column_tiles);
  const std::int64_t left = row_tiles - group * kGemmRowGroup;
  const std::int64_t group_rows = left < kGemmRowGroup ? left : kGemmRowGroup;
  const std::int64_t m0 = (group * kGemmRowGroup + in_group % group_rows) * kRows;
  const std::int64_t n0 = in_group / group_rows * kGemmColumns;

  const std::int64_t begin = blockIdx.y * p.plan.split_length;
  const std::int64_t end = p.length - begin < p.plan.split_length ? p.length : begin + p.plan.split_length;
  const int base_stages = static_cast<int>((end - begin + kGemmDepth - 1) / kGemmDepth);

  const T* const x = static_cast<const T*>(p.x);
  const W* const w = static_cast<const W*>(p.w);
  const T* const v = static_cast<const T*>(p.v);
  const T* const s = static_cast<const T*>(p.s_half);
  const auto aligned = [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  };
  const bool aligned_x = aligned(p.x) && p.x_stride % 8 == 0;
  const bool aligned_w = aligned(p.w) && p.w_stride % kPerChunk == 0;
  const int R = p.adapters.rank;
  const bool aligned_v = aligned(p.v) && (kTransposed ? p.N : R) % 8 == 0;

  // The adapters of this tile's rows; the first part of the sum has the low-rank stages.
  const auto next_in_tile = [&](int current) {
    int next = INT_MAX;
#pragma unroll
    for (int i = 0; i < kRows / kWarpSize; ++i) {
      const int a = row_adapter[lane + i * kWarpSize];
      next = a > current && a < next ? a : next;
    }
    return next_adapter(next, current);
  };
  int stages = base_stages, adapter = 0, low_rank_stage = 0;
  if (R > 0 && blockIdx.y == 0) {
    if (thread < kRows) {
      row_adapter[thread] = adapter_of_row(p.adapters.index, m0 + thread, p.M, p.adapters.count);
    }
    __syncthreads();
    const int per_adapter = static_cast<int>(2 * p.half / kGemmDepth);
    adapter = next_in_tile(-1);
    for (int a = adapter; a != INT_MAX; a = next_in_tile(a)) stages += per_adapter;
  }

  // Stages are loaded one after the other, each once.
  const auto load = [&](int stage) {
    unsigned char* const rows = shared + stage % kGemmStages * Shared::kStage;
    unsigned char* const columns = rows + Shared::kLeft;
    if (stage < base_stages) {
      const std::int64_t i0 = begin + static_cast<std::int64_t>(stage) * kGemmDepth, terms = end - i0;
#pragma unroll
      for (int j = 0; j < kRows * 4 / kGemmThreads; ++j) {
        const int row = (thread + j * kGemmThreads) / 4, chunk = thread % 4;
        const std::int64_t m = m0 + row;
        copy_chunk(rows + chunk_of_64(row, chunk), x + m * p.x_stride + i0 + chunk * 8,
                   m < p.M ? terms - chunk * 8 : 0, aligned_x);
      }
      constexpr int kAcross = (kTransposed ? kGemmColumns : kGemmDepth) / kPerChunk;  // chunks of a row
#pragma unroll
      for (int j = 0; j < kGemmColumns * kGemmDepth / kPerChunk / kGemmThreads; ++j) {
        const int row = (thread + j * kGemmThreads) / kAcross, chunk = (thread + j * kGemmThreads) % kAcross;
        if constexpr (kTransposed) {
          const std::int64_t n = n0 + chunk * kPerChunk;
          copy_chunk(columns + (kInt8 ? chunk_of_128(row, chunk) : chunk_of_256(row, chunk)),
                     w + (i0 + row) * p.w_stride + n, row < terms ? p.N - n : 0, aligned_w);
        } else {
          const std::int64_t n = n0 + row;
          copy_chunk(columns + (kInt8 ? chunk_of_32(row, chunk) : chunk_of_64(row, chunk)),
                     w + n * p.w_stride + i0 + chunk * kPerChunk, n < p.N ? terms - chunk * kPerChunk : 0,
                     aligned_w);
        }
      }
    } else {
      const int first = low_rank_stage * kGemmDepth, half = static_cast<int>(p.half);
#pragma unroll
      for (int j = 0; j < kRows * 4 / kGemmThreads; ++j) {
        const int row = (thread + j * kGemmThreads) / 4, chunk = thread % 4;
        copy_async_16(rows + chunk_of_64(row, chunk), s + (m0 + row) * 2 * half + first + chunk * 8,
                      row_adapter[row] == adapter);
      }
      constexpr int kAcross = (kTransposed ? kGemmColumns : kGemmDepth) / 8;
#pragma unroll
      for (int j = 0; j < kGemmColumns * kGemmDepth / 8 / kGemmThreads; ++j) {
        const int row = (thread + j * kGemmThreads) / kAcross, chunk = (thread + j * kGemmThreads) % kAcross;
        int r = first + (kTransposed ? row : chunk * 8);
        r = r < half ? r : r - half;
        if constexpr (kTransposed) {
          const std::int64_t n = n0 + chunk * 8;
          copy_chunk(columns + chunk_of_256(row, chunk),
                     v + (static_cast<std::int64_t>(adapter) * R + r) * p.N + n, r < R ? p.N - n : 0,
                     aligned_v);
        } else {
          const std::int64_t n = n0 + row;
          copy_chunk(columns + chunk_of_64(row, chunk), v + (adapter * p.N + n) * R + r, n < p.N ? R - r : 0,
                     aligned_v);
        }
      }
      if (++low_rank_stage * kGemmDepth == 2 * half) low_rank_stage = 0, adapter = next_in_tile(adapter);
    }
  };

  float sum[kRowTiles][kColumnTiles][4] = {};
  const auto scale_columns = [&] {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int64_t n = n0 + warp_column + 8 * j + 2 * q + i;
        const float scale = n < p.N ? p.w_scale[n] : 0.0f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) sum[tile][j][i] *= scale, sum[tile][j][2 + i] *= scale;
      }
    }
  };

#pragma unroll
  for (int stage = 0; stage < kGemmStages - 1; ++stage) {
    if (stage < stages) load(stage);
    copy_async_commit();
  }
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<kGemmStages - 2>();
    __syncthreads();  // this stage has arrived, and everybody is done with the one before: its buffer is next
    if (stage + kGemmStages - 1 < stages) load(stage + kGemmStages - 1);
    copy_async_commit();
    if (kInt8 && !kTransposed && stage == base_stages) scale_columns();
    const unsigned char* const rows = shared + stage % kGemmStages * Shared::kStage;
    const unsigned char* const columns = rows + Shared::kLeft;
#pragma unroll
    for (int k = 0; k < kGemmDepth / 16; ++k) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        ldmatrix_x4(a[tile], rows + chunk_of_64(warp_row + 16 * tile + lane % 16, 2 * k + lane / 16));
      }
      // int8, transposed: the scales of the lane's terms 2q, 2q + 1, 2q + 8 and 2q + 9 of these 16.
      [[maybe_unused]] float scale[4];
      if constexpr (kInt8 && kTransposed) {
        const std::int64_t i0 = begin + static_cast<std::int64_t>(stage) * kGemmDepth + 16 * k + 2 * q;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t term = i0 + i % 2 + i / 2 * 8;
          scale[i] = term < end ? p.w_scale[term] : 0.0f;
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        std::uint32_t b[2][2];
        if (!kInt8 || stage >= base_stages) {
          std::uint32_t pair[4];
          if constexpr (kTransposed) {
            ldmatrix_x4_trans(
                pair, columns + chunk_of_256(16 * k + lane % 16, (warp_column + 8 * j) / 8 + lane / 16));
          } else {
            const int column = warp_column + 8 * j + lane / 16 * 8 + lane % 8;
            ldmatrix_x4(pair, columns + chunk_of_64(column, 2 * k + lane / 8 % 2));
          }
          b[0][0] = pair[0], b[0][1] = pair[1], b[1][0] = pair[2], b[1][1] = pair[3];
        } else if constexpr (kInt8) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = warp_column + 8 * (j + e) + g;
            if constexpr (kTransposed) {
              T element[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int row = 16 * k + 2 * q + i % 2 + i / 2 * 8;
                const unsigned char* const byte = columns + chunk_of_128(row, column / 16) + column % 16;
                const float value = static_cast<float>(*reinterpret_cast<const signed char*>(byte));
                element[i] = from_float<T>(scale[i] * value);
              }
              b[e][0] = pack2(element[0], element[1]), b[e][1] = pack2(element[2], element[3]);
            } else {
              const unsigned char* const chunk = columns + chunk_of_32(column, k) + 2 * q;
              const std::uint32_t low = *reinterpret_cast<const unsigned short*>(chunk);
              const std::uint32_t high = *reinterpret_cast<const unsigned short*>(chunk + 8);
              widen_int8<T>(b[e], low | high << 16);
            }
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int tile = 0; tile < kRowTiles; ++tile) mma_16x8x16(sum[tile][j + e], a[tile], b[e], T{});
        }
      }
    }
  }
  if (kInt8 && !kTransposed && stages == base_stages) scale_columns();
  copy_async_wait<0>();

  if (p.plan.splits > 1) {
    float* const partial = p.partial + blockIdx.y * p.M * p.N;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int64_t m = m0 + warp_row + 16 * tile + 8 * h + g;
        if (m >= p.M) continue;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const std::int64_t n = n0 + warp_column + 8 * j + 2 * q;
          float* const to = partial + m * p.N + n;
          if (n + 1 < p.N && p.N % 2 == 0) {
            *reinterpret_cast<float2*>(to) = make_float2(sum[tile][j][2 * h], sum[tile][j][2 * h + 1]);
          } else {
            if (n < p.N) to[0] = sum[tile][j][2 * h];
            if (n + 1 < p.N) to[1] = sum[tile][j][2 * h + 1];
          }
        }
      }
    }
    return;
  }

  // Through shared memory, so that whole 128-byte lines are written. A row of 72 elements keeps the banks apart.
  constexpr int kPitch = 72;
  static_assert(4 * kWarpRows * kPitch * 2 <= Shared::kAdapters, "the result fits where the stages were");
  __syncthreads();
  T* const mine = reinterpret_cast<T*>(shared) + warp * kWarpRows * kPitch;
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int64_t n = n0 + warp_column + 8 * j + 2 * q + i;
        if (n < p.N) bias[i] = to_float(static_cast<const T*>(p.bias)[n]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<std::uint32_t*>(mine + (16 * tile + 8 * h + g) * kPitch + 8 * j + 2 * q) = pack2(
            from_float<T>(sum[tile][j][2 * h] + bias[0]), from_float<T>(sum[tile][j][2 * h + 1] + bias[1]));
      }
    }
  }
  __syncwarp();
  const bool aligned_y = aligned(p.y) && p.y_stride % 8 == 0;
#pragma unroll 4
  for (int i = 0; i < kWarpRows / 4; ++i) {
    const int row = 4 * i + lane / 8, column = lane % 8 * 8;
    const std::int64_t m = m0 + warp_row + row, n = n0 + warp_column + column;
    if (m >= p.M) continue;
    const Vector<T, 8> values = load_vector<T, 8>(mine + row * kPitch + column);
    T* const to = static_cast<T*>(p.y) + m * p.y_stride + n;
    if (aligned_y && n + 8 <= p.N) {
      store_vector<T, 8>(to, values);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (n + c < p.N) to[c] = values[c];
      }
    }
  }
}

template <typename T, typename W, bool kTransposed, int kRows>
Status launch_gemm_tile(const ProductParams& p, cudaStream_t stream) {
  const std::int64_t tiles = blocks_of(p.M, kRows) * blocks_of(p.N, kGemmColumns);
  if (tiles > INT_MAX) return Status::unsupported("lora_linear: the product has 2^31 tiles or more");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.plan.splits));
  return launch("lora_linear gemm", gemm_kernel<T, W, kTransposed, kRows>, grid, kGemmThreads,
                GemmShared<kRows>::kBytes, stream, p);
}

template <bool kTransposed>
Status launch_gemm(const ProductParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto choose = [&](auto element) {
    using T = decltype(element);
    const bool large = p.plan.tile_rows == 128;
    if (p.int8) {
      return large ? launch_gemm_tile<T, std::int8_t, kTransposed, 128>(p, on)
                   : launch_gemm_tile<T, std::int8_t, kTransposed, 64>(p, on);
    }
    return large ? launch_gemm_tile<T, T, kTransposed, 128>(p, on)
                 : launch_gemm_tile<T, T, kTransposed, 64>(p, on);
  };
  Status status = p.dtype == DType::bfloat16 ? choose(__nv_bfloat16{}) : choose(__half{});
  if (!status.ok() || p.plan.splits == 1) return status;
  return lora_add_partial(p, stream);
}

}  // namespace visionllm::cuda
