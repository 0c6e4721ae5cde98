// Kernels with one bug each, which the emulator must find, and their correct twins (fixed = true). Each writes
// output [n] (and some use workspace [n]) from input [n]; n = 64 and blocks of 32 or 64 threads unless said otherwise.
#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "visionllm/execution.h"
#include "visionllm/tensor.h"

namespace visionllm {
namespace {

using namespace cuda;

// ---- shared memory -------------------------------------------------------------------------------------------------

template <bool fixed>
__global__ void shared_overrun_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  tile[fixed ? i : i + 1] = input[i];
  __syncthreads();
  if (i < n) output[i] = tile[fixed || i > 0 ? i : 1];
}

template <bool fixed>
__global__ void dynamic_overrun_kernel(float* output, const float* input, int n) {
  VISIONLLM_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  const int i = threadIdx.x;
  tile[i] = input[i];
  __syncthreads();
  if (i < n) output[i] = tile[fixed ? (i + 1) % n : i + 1];
}

template <bool fixed>
__global__ void uninitialised_shared_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  if (fixed || i < n - 1) tile[i] = input[i];
  __syncthreads();
  output[i] = tile[i];
}

// ---- barriers ------------------------------------------------------------------------------------------------------

template <bool fixed>
__global__ void missing_barrier_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = input[i];
  if (fixed) __syncthreads();
  output[i] = tile[(i + 33) % n];
}

// The tile is filled again while others still read it.
template <bool fixed>
__global__ void missing_barrier_in_loop_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[i] = input[i] * static_cast<float>(round);
    __syncthreads();
    sum += tile[(i + 33) % n];
    if (fixed) __syncthreads();
  }
  output[i] = sum;
}

// A shuffle makes lanes meet, but is no barrier for memory.
template <bool fixed>
__global__ void missing_warp_barrier_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = input[i];
  const float sum = warp_sum(1.0f);
  if (fixed) __syncwarp();
  if (i < n) output[i] = tile[i ^ 1] * sum;
}

// Half-warps that keep to themselves, and read one element all together before it is set again; the wrong kernel looks
// into the other half.
template <bool fixed>
__global__ void barrier_of_half_warp_kernel(float* output, const float* input) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x, first = i / 16 * 16;
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  tile[i] = input[i];
  __syncwarp(half);
  float sum = tile[i ^ (fixed ? 15 : 16)];
  __syncwarp(half);
  for (int round = 0; round < 3; ++round) {
    if (i == first + round) tile[first] = static_cast<float>(round);
    __syncwarp(half);
    sum += tile[first];
    __syncwarp(half);
  }
  output[i] = sum;
}

template <bool fixed>
__global__ void shared_atomics_kernel(float* output, const float* input) {
  VISIONLLM_SHARED_ARRAY(float, sums, 4);
  const int i = threadIdx.x;
  if (i < 4) sums[i] = 0.0f;
  __syncthreads();
  atomicAdd(sums + i % 4, 1.0f);
  if (fixed) __syncthreads();
  output[i] = input[i] * sums[i % 4];
}

template <bool fixed>
__global__ void return_before_barrier_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  if (!fixed && i >= n - 8) return;
  tile[i] = input[i];
  __syncthreads();
  output[i] = tile[i];
}

template <bool fixed>
__global__ void two_barriers_kernel(float* output, const float* input) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = input[i];
  if (fixed || i % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  output[i] = tile[i];
}

template <bool fixed>
__global__ void barrier_against_warp_barrier_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  if (fixed || i % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  output[i] = input[i];
}

// ---- warps ---------------------------------------------------------------------------------------------------------

template <bool fixed>
__global__ void shuffle_in_branch_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  float x = input[i];
  if (fixed || i % 32 < 16) x = __shfl_xor_sync(kFullWarp, x, 1);
  output[i] = x;
}

template <bool fixed>
__global__ void shuffles_in_two_branches_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  float x = input[i];
  if (fixed || i % 32 < 16) {
    x = __shfl_xor_sync(kFullWarp, x, 1);
  } else {
    x = __shfl_xor_sync(kFullWarp, x, 2);
  }
  output[i] = x;
}

template <bool fixed>
__global__ void shuffle_from_missing_lane_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  float x = input[i];
  if (i % 32 < 16) x = __shfl_xor_sync(0x0000ffffu, x, fixed ? 8 : 16);
  output[i] = x;
}

template <bool fixed>
__global__ void vote_without_own_lane_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  output[i] = __any_sync(fixed ? kFullWarp : 0xfffffffeu, input[i] > 1e30f) != 0 ? 0.0f : input[i];
}

template <bool fixed>
__global__ void returned_lane_kernel(float* output, const float* input, int n) {
  const int i = threadIdx.x;
  if (!fixed && i >= n - 8) return;
  output[i] = warp_sum(input[i]);
}

// ---- global memory -------------------------------------------------------------------------------------------------

template <bool fixed>
__global__ void read_out_of_bounds_kernel(float* output, const float* input, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  // Volatile: the compiler would drop a load whose value is not used.
  const float x = !fixed || i < n ? *static_cast<const volatile float*>(input + i) : 0.0f;
  if (i < n) output[i] = x;
}

template <bool fixed>
__global__ void write_out_of_bounds_kernel(float* output, const float* input, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) output[i] = input[i];
  if (!fixed && i == n) output[i] = 0.0f;
}

// 8 bytes at an address that is a multiple of 4.
template <bool fixed>
__global__ void misaligned_kernel(float* output, const float* input, int n) {
  const int i = threadIdx.x;
  if (2 * i + 2 < n) {
    const float2 pair = *reinterpret_cast<const float2*>(input + 2 * i + (fixed ? 0 : 1));
    output[2 * i] = pair.x;
    output[2 * i + 1] = pair.y;
  } else if (2 * i < n) {
    output[2 * i] = output[2 * i + 1] = 0.0f;
  }
}

template <bool fixed>
__global__ void write_to_input_kernel(float* output, float* input) {
  const int i = threadIdx.x;
  output[i] = input[i];
  if (!fixed) input[i] = 0.0f;
}

template <bool fixed>
__global__ void unwritten_output_kernel(float* output, const float* input, int n) {
  const int i = threadIdx.x;
  if (fixed || i != n / 2) output[i] = input[i];
}

template <bool fixed>
__global__ void uninitialised_output_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  if (fixed) output[i] = 0.0f;
  output[i] += input[i];
}

template <bool fixed>
__global__ void uninitialised_workspace_kernel(float* output, float* workspace, const float* input) {
  const int i = threadIdx.x;
  if (fixed) workspace[i] = 0.0f;
  atomicAdd(workspace + i, input[i]);
  output[i] = workspace[i];
}

// ---- blocks and threads at one element -----------------------------------------------------------------------------

__global__ void zero_kernel(float* output) { output[threadIdx.x] = 0.0f; }

template <bool fixed>
__global__ void sum_over_blocks_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  if (fixed) {
    atomicAdd(output + i, input[i]);
  } else {
    output[i] += input[i];
  }
}

template <bool fixed>
__global__ void two_threads_one_element_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  output[fixed ? i : i / 2 * 2] = input[i];
  if (!fixed && i % 2 == 0) output[i + 1] = input[i];
}

// The last block to finish adds up what all blocks left in the workspace; workspace[0] counts finished blocks.
template <bool fixed>
__global__ void last_block_kernel(float* output, float* workspace, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(int, last, 1);
  const int i = threadIdx.x;
  auto* const finished = reinterpret_cast<unsigned*>(workspace);
  float* const parts = workspace + 1;
  if (i == 0) parts[blockIdx.x] = input[blockIdx.x];
  if (fixed) __threadfence();
  __syncthreads();
  if (i == 0) last[0] = atomicAdd(finished, 1u) == gridDim.x - 1 ? 1 : 0;
  __syncthreads();
  if (last[0] != 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
    for (int j = i; j < n; j += static_cast<int>(blockDim.x)) output[j] = sum;
  }
}

// Which block comes first decides.
template <bool fixed>
__global__ void order_of_blocks_kernel(float* output, float* workspace, const float* input, int n) {
  const int i = threadIdx.x;
  if (i != 0) return;
  const float before = atomicExch(workspace, static_cast<float>(blockIdx.x));
  const int per_block = n / static_cast<int>(gridDim.x);
  for (int j = 0; j < per_block; ++j) {
    const int k = static_cast<int>(blockIdx.x) * per_block + j;
    output[k] = input[k] + (fixed ? 0.0f : before);
  }
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

enum class CopyBug { none, no_wait, wait_for_too_few, no_barrier, refill, misaligned };

template <CopyBug bug>
__global__ void copy_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 2 * 64);
  const int i = threadIdx.x;
  if (4 * i < n) {
    if (bug == CopyBug::misaligned) {
      copy_async_16(tile + 4 * i + 1, input + 4 * i, true);
    } else {
      copy_async_16(tile + 4 * i, input + 4 * i, true);
    }
  }
  copy_async_commit();
  if (4 * i < n) copy_async_16(tile + 64 + 4 * i, input, true);
  copy_async_commit();
  if (bug == CopyBug::wait_for_too_few) copy_async_wait<2>();
  if (bug != CopyBug::no_wait && bug != CopyBug::wait_for_too_few) copy_async_wait<1>();
  if (bug != CopyBug::no_barrier) __syncthreads();
  output[i] = tile[i];
  if (bug == CopyBug::refill && 4 * i < n) {
    copy_async_16(tile + 4 * i, input, true);  // while others may still read
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// ---- matrices ------------------------------------------------------------------------------------------------------

template <bool fixed>
__global__ void misaligned_matrix_kernel(float* output, const float* input) {
  VISIONLLM_SHARED_ARRAY(__half, tile, 8 * 16);
  const int i = threadIdx.x;
  for (int j = i; j < 8 * 16; j += 32) tile[j] = from_float<__half>(0.0f);
  __syncwarp();
  std::uint32_t r[2];
  ldmatrix_x2(r, tile + i % 8 * (fixed ? 8 : 12));
  for (int j = i; j < 64; j += 32) output[j] = input[j] + __uint_as_float(r[0]);
}

// ---- what only the sanitizers or the machine find ------------------------------------------------------------------

template <bool fixed>
__global__ void integer_overflow_kernel(float* output, const float* input, int n) {
  const int i = threadIdx.x;
  int far = 2147483647 - n + i;
  if (!fixed && i == n - 1) ++far;
  if (!fixed && i == n - 1) ++far;
  output[i] = far == 0 ? 0.0f : input[i];
}

template <bool fixed>
__global__ void register_array_overrun_kernel(float* output, const float* input, int n) {
  float values[4] = {0, 1, 2, 3};
  const int i = threadIdx.x;
  output[i] = input[i] + 0.0f * values[fixed ? i % 4 : n / 16 + i % 4];
}

template <bool fixed>
__device__ float deep(const float* input, int depth) {
  volatile float frame[256];
  frame[depth % 256] = *input;
  return depth == 0 ? frame[0] : frame[depth % 256] + deep<fixed>(input, depth - 1);
}

template <bool fixed>
__global__ void stack_overflow_kernel(float* output, const float* input) {
  output[threadIdx.x] = input[threadIdx.x] + 0.0f * deep<fixed>(input, fixed ? 3 : 5000);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

struct Call {
  float* output;
  float* workspace;
  float* input;
  int n;
  cudaStream_t stream;
};

Call call_of(const TensorView& output, const TensorView& workspace, const TensorView& input,
             const Execution& execution) {
  return {static_cast<float*>(output.data), static_cast<float*>(workspace.data),
          static_cast<float*>(input.data), static_cast<int>(output.size()),
          static_cast<cudaStream_t>(execution.stream)};
}

}  // namespace

#define VISIONLLM_BUG(name, ...)                                                                          \
  Status name(const TensorView& output, const TensorView& workspace, const TensorView& input, bool fixed, \
              const Execution& execution) {                                                               \
    const Call c = call_of(output, workspace, input, execution);                                          \
    (void)c;                                                                                              \
    __VA_ARGS__                                                                                           \
  }
#define VISIONLLM_RUN(kernel, grid, block, shared, ...)                                    \
  return fixed ? launch(#kernel, kernel<true>, grid, block, shared, c.stream, __VA_ARGS__) \
               : launch(#kernel, kernel<false>, grid, block, shared, c.stream, __VA_ARGS__);

VISIONLLM_BUG(shared_overrun, VISIONLLM_RUN(shared_overrun_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(dynamic_overrun, VISIONLLM_RUN(dynamic_overrun_kernel, 1, 64, 256, c.output, c.input, c.n))
VISIONLLM_BUG(uninitialised_shared,
              VISIONLLM_RUN(uninitialised_shared_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(missing_barrier, VISIONLLM_RUN(missing_barrier_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(missing_barrier_in_loop,
              VISIONLLM_RUN(missing_barrier_in_loop_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(missing_warp_barrier,
              VISIONLLM_RUN(missing_warp_barrier_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(barrier_of_half_warp, VISIONLLM_RUN(barrier_of_half_warp_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(shared_atomics, VISIONLLM_RUN(shared_atomics_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(return_before_barrier,
              VISIONLLM_RUN(return_before_barrier_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(two_barriers, VISIONLLM_RUN(two_barriers_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(barrier_against_warp_barrier,
              VISIONLLM_RUN(barrier_against_warp_barrier_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(shuffle_in_branch, VISIONLLM_RUN(shuffle_in_branch_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(shuffles_in_two_branches,
              VISIONLLM_RUN(shuffles_in_two_branches_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(shuffle_from_missing_lane,
              VISIONLLM_RUN(shuffle_from_missing_lane_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(vote_without_own_lane, VISIONLLM_RUN(vote_without_own_lane_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(returned_lane, VISIONLLM_RUN(returned_lane_kernel, 1, 64, 0, c.output, c.input, c.n))
// Four blocks of 20 threads for 64 elements.
VISIONLLM_BUG(read_out_of_bounds, VISIONLLM_RUN(read_out_of_bounds_kernel, 4, 20, 0, c.output, c.input, c.n))
VISIONLLM_BUG(write_out_of_bounds,
              VISIONLLM_RUN(write_out_of_bounds_kernel, 4, 20, 0, c.output, c.input, c.n))
VISIONLLM_BUG(misaligned, VISIONLLM_RUN(misaligned_kernel, 1, 32, 0, c.output, c.input, c.n))
VISIONLLM_BUG(write_to_input, VISIONLLM_RUN(write_to_input_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(unwritten_output, VISIONLLM_RUN(unwritten_output_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(uninitialised_output, VISIONLLM_RUN(uninitialised_output_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(uninitialised_workspace,
              VISIONLLM_RUN(uninitialised_workspace_kernel, 1, 64, 0, c.output, c.workspace, c.input))
VISIONLLM_BUG(sum_over_blocks,
              if (Status s = launch("zero", zero_kernel, 1, 64, 0, c.stream, c.output); !s.ok()) return s;
              VISIONLLM_RUN(sum_over_blocks_kernel, 5, 64, 0, c.output, c.input))
VISIONLLM_BUG(two_threads_one_element,
              VISIONLLM_RUN(two_threads_one_element_kernel, 1, 64, 0, c.output, c.input))
VISIONLLM_BUG(last_block, if (cudaMemsetAsync(c.workspace, 0, 4, c.stream) !=
                              cudaSuccess) return Status::cuda_error("memset");
              VISIONLLM_RUN(last_block_kernel, 5, 32, 0, c.output, c.workspace, c.input, c.n))
VISIONLLM_BUG(order_of_blocks, if (cudaMemsetAsync(c.workspace, 0, 4, c.stream) !=
                                   cudaSuccess) return Status::cuda_error("memset");
              VISIONLLM_RUN(order_of_blocks_kernel, 8, 32, 0, c.output, c.workspace, c.input, c.n))

#define VISIONLLM_COPY_BUG(name)                                                                            \
  VISIONLLM_BUG(copy_##name, return launch("copy_kernel",                                                   \
                                           fixed ? copy_kernel<CopyBug::none> : copy_kernel<CopyBug::name>, \
                                           1, 64, 0, c.stream, c.output, c.input, c.n);)
VISIONLLM_COPY_BUG(no_wait)
VISIONLLM_COPY_BUG(wait_for_too_few)
VISIONLLM_COPY_BUG(no_barrier)
VISIONLLM_COPY_BUG(refill)
VISIONLLM_COPY_BUG(misaligned)

VISIONLLM_BUG(misaligned_matrix, VISIONLLM_RUN(misaligned_matrix_kernel, 1, 32, 0, c.output, c.input))
VISIONLLM_BUG(integer_overflow, VISIONLLM_RUN(integer_overflow_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(register_array_overrun,
              VISIONLLM_RUN(register_array_overrun_kernel, 1, 64, 0, c.output, c.input, c.n))
VISIONLLM_BUG(stack_overflow, VISIONLLM_RUN(stack_overflow_kernel, 1, 64, 0, c.output, c.input))

// The launcher, not the kernel, is wrong.
VISIONLLM_BUG(too_many_threads, return launch("unwritten_output_kernel", unwritten_output_kernel<true>, 1,
                                              fixed ? 64 : 1088, 0, c.stream, c.output, c.input, c.n);)
VISIONLLM_BUG(empty_grid, return launch("unwritten_output_kernel", unwritten_output_kernel<true>,
                                        fixed ? 1 : 0, 64, 0, c.stream, c.output, c.input, c.n);)
VISIONLLM_BUG(too_much_shared_memory,
              return launch("dynamic_overrun_kernel", dynamic_overrun_kernel<true>, 1, 64,
                            fixed ? 101376 : 101377, c.stream, c.output, c.input, c.n);)
VISIONLLM_BUG(host_reads_device_memory, const float scale = fixed ? 1.0f : c.input[0];
              return launch("unwritten_output_kernel", unwritten_output_kernel<true>, 1, 64, 0, c.stream,
                            c.output, c.input, scale > 1e30f ? 0 : c.n);)

}  // namespace visionllm
