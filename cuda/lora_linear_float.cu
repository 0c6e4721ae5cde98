// The product of lora_linear in float32, W in float32 or int8, and the sum of partial products of all types:
//
//   y[m, n] = sum over i of x[m, i] w[n, i] + bias[n] + sum over r of s[m, r] v[a][n, r]     forward
//   y[m, n] = sum over i of x[m, i] w[i, n]           + sum over r of s[m, r] v[a][r, n]     transposed: backward
//
// Plain fused multiply-add, since TF32 has too few bits: a block computes 64 x 64, each of 256 threads 4 x 4 of
// them, from stages of 16 terms in shared memory whose successors are on their way in registers. int8 is scaled
// as it is put there. The low-rank term is further stages, one set per adapter that occurs in the tile.
#include "lora_linear_fragments.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPitch = kSimtRows + 4;  // keeps the banks of neighbouring terms apart, and 16-byte alignment
static_assert(kSimtRows == 64 && kSimtColumns == 64 && kSimtDepth == 16, "the division of work below");

// With the 1 ptxas takes the registers it needs; without, it aims at more blocks on some chips, and spills.
template <typename W, bool kTransposed>
__global__ __launch_bounds__(kThreads, 1) void product_kernel(ProductParams p) {
  VISIONLLM_SHARED_ARRAY(float, left, 2 * kSimtDepth * kPitch);   // x, by terms
  VISIONLLM_SHARED_ARRAY(float, right, 2 * kSimtDepth * kPitch);  // w, by terms
  VISIONLLM_SHARED_ARRAY(int, row_adapter, kSimtRows);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const std::int64_t row_tiles = (p.M + kSimtRows - 1) / kSimtRows;
  const std::int64_t m0 = blockIdx.x % row_tiles * kSimtRows, n0 = blockIdx.x / row_tiles * kSimtColumns;
  const std::int64_t begin = blockIdx.y * p.plan.split_length;
  const std::int64_t end = p.length - begin < p.plan.split_length ? p.length : begin + p.plan.split_length;
  const int base_stages = static_cast<int>((end - begin + kSimtDepth - 1) / kSimtDepth);
  const float* const x = static_cast<const float*>(p.x);
  const W* const w = static_cast<const W*>(p.w);
  const float* const v = static_cast<const float*>(p.v);
  const int R = p.adapters.rank;

  const auto next_in_tile = [&](int current) {
    const int first = row_adapter[lane], second = row_adapter[lane + kWarpSize];
    const int smaller = first > current && (second <= current || first < second) ? first : second;
    return next_adapter(smaller, current);
  };
  int stages = base_stages, adapter = 0, first_rank = 0;
  if (R > 0 && blockIdx.y == 0) {
    if (thread < kSimtRows) {
      row_adapter[thread] = adapter_of_row(p.adapters.index, m0 + thread, p.M, p.adapters.count);
    }
    __syncthreads();
    adapter = next_in_tile(-1);
    for (int a = adapter; a != INT_MAX; a = next_in_tile(a)) stages += (R + kSimtDepth - 1) / kSimtDepth;
  }

  // Each thread brings four elements of either side: along the direction in which they lie in memory.
  float next_left[4], next_right[4];
  const auto fetch = [&](int stage) {
    const bool base = stage < base_stages;
    const std::int64_t i0 = begin + static_cast<std::int64_t>(stage) * kSimtDepth;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int o = thread + j * kThreads, term = o % kSimtDepth, row = o / kSimtDepth;
      const std::int64_t m = m0 + row;
      if (base) {
        next_left[j] = m < p.M && i0 + term < end ? x[m * p.x_stride + i0 + term] : 0.0f;
      } else {
        const int r = first_rank + term;
        next_left[j] = row_adapter[row] == adapter && r < R ? p.s[m * R + r] : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int o = thread + j * kThreads;
      const int term = kTransposed ? o / kSimtColumns : o % kSimtDepth;
      const std::int64_t n = n0 + (kTransposed ? o % kSimtColumns : o / kSimtDepth);
      next_right[j] = 0.0f;
      if (base) {
        const std::int64_t i = i0 + term;
        if (n < p.N && i < end) {
          const W value = w[kTransposed ? i * p.w_stride + n : n * p.w_stride + i];
          next_right[j] = static_cast<float>(value);
          if constexpr (sizeof(W) == 1) next_right[j] *= p.w_scale[kTransposed ? i : n];
        }
      } else {
        const std::int64_t r = first_rank + term, a = adapter;
        if (n < p.N && r < R) next_right[j] = v[kTransposed ? (a * R + r) * p.N + n : (a * p.N + n) * R + r];
      }
    }
    if (!base && (first_rank += kSimtDepth) >= R) first_rank = 0, adapter = next_in_tile(adapter);
  };
  const auto put = [&](int buffer) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int o = thread + j * kThreads;
      left[(buffer * kSimtDepth + o % kSimtDepth) * kPitch + o / kSimtDepth] = next_left[j];
      const int term = kTransposed ? o / kSimtColumns : o % kSimtDepth;
      const int column = kTransposed ? o % kSimtColumns : o / kSimtDepth;
      right[(buffer * kSimtDepth + term) * kPitch + column] = next_right[j];
    }
  };

  const int row = thread / 16 * 4, column = thread % 16 * 4;
  float sum[4][4] = {};
  if (stages > 0) {
    fetch(0);
    put(0);
  }
  for (int stage = 0; stage < stages; ++stage) {
    __syncthreads();  // this stage is there, and everybody is done with the buffer that is filled next
    if (stage + 1 < stages) fetch(stage + 1);
    const float* const rows = left + stage % 2 * kSimtDepth * kPitch;
    const float* const columns = right + stage % 2 * kSimtDepth * kPitch;
#pragma unroll
    for (int k = 0; k < kSimtDepth; ++k) {
      const Vector<float, 4> a = load_vector<float, 4>(rows + k * kPitch + row);
      const Vector<float, 4> b = load_vector<float, 4>(columns + k * kPitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
    if (stage + 1 < stages) put((stage + 1) % 2);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t m = m0 + row + i;
    if (m >= p.M) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t n = n0 + column + j;
      if (n >= p.N) continue;
      if (p.plan.splits > 1) {
        p.partial[(blockIdx.y * p.M + m) * p.N + n] = sum[i][j];
      } else {
        const float bias = p.bias == nullptr ? 0.0f : static_cast<const float*>(p.bias)[n];
        static_cast<float*>(p.y)[m * p.y_stride + n] = sum[i][j] + bias;
      }
    }
  }
}

// One thread per output and turn.
template <typename T>
__global__ __launch_bounds__(kThreads) void add_partial_kernel(ProductParams p) {
  const std::int64_t outputs = p.M * p.N;
  for (std::int64_t o = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; o < outputs;
       o += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t m = o / p.N, n = o % p.N;
    float value = 0.0f;
    for (int split = 0; split < p.plan.splits; ++split) value += p.partial[split * outputs + o];
    if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.y)[m * p.y_stride + n] = from_float<T>(value);
  }
}

}  // namespace

Status lora_add_partial(const ProductParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  // Splits exist for small products only; larger ones than this take turns.
  const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(blocks_of(p.M * p.N, kThreads), 65535)));
  const auto kernel = p.dtype == DType::float32    ? add_partial_kernel<float>
                      : p.dtype == DType::bfloat16 ? add_partial_kernel<__nv_bfloat16>
                                                   : add_partial_kernel<__half>;
  return launch("lora_linear add partial", kernel, grid, kThreads, 0, on, p);
}

Status lora_gemm_float(const ProductParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t tiles = blocks_of(p.M, kSimtRows) * blocks_of(p.N, kSimtColumns);
  if (tiles > INT_MAX) return Status::unsupported("lora_linear: the product has 2^31 tiles or more");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.plan.splits));
  const auto kernel =
      p.int8 ? (p.transposed ? product_kernel<std::int8_t, true> : product_kernel<std::int8_t, false>)
             : (p.transposed ? product_kernel<float, true> : product_kernel<float, false>);
  Status status = launch("lora_linear float", kernel, grid, kThreads, 0, on, p);
  if (!status.ok() || p.plan.splits == 1) return status;
  return lora_add_partial(p, stream);
}

}  // namespace visionllm::cuda
