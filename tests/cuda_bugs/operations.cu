// The emulator's operations, one kernel each, for tests against plain references. Blocks are one warp unless said
// otherwise; tensors are float32 except where an element type is asked for.
#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "visionllm/execution.h"
#include "visionllm/tensor.h"

namespace visionllm {
namespace {

using namespace cuda;

template <typename T>
T* data(const TensorView& tensor) {
  return static_cast<T*>(tensor.data);
}

cudaStream_t stream_of(const Execution& execution) { return static_cast<cudaStream_t>(execution.stream); }

// Rows of output [6, 32]: shuffles of input [32] in groups of `width` lanes by `amount`; the sum and the maximum of
// groups of 8.
__global__ void shuffles_kernel(float* output, const float* input, int amount, int width) {
  const int lane = threadIdx.x;
  const float x = input[lane];
  output[lane] = __shfl_sync(kFullWarp, x, amount, width);
  output[32 + lane] = __shfl_up_sync(kFullWarp, x, amount, width);
  output[64 + lane] = __shfl_down_sync(kFullWarp, x, amount, width);
  output[96 + lane] = __shfl_xor_sync(kFullWarp, x, amount, width);
  output[128 + lane] = warp_sum<8>(x);
  output[160 + lane] = warp_max<8>(x);
}

// Rows of output [7, 64] for predicates input [64] != 0 of 2 warps: ballot (its low 16 bits), any, all; in the
// half-warps' own masks any; the block's or, and, count.
__global__ void votes_kernel(float* output, const float* input) {
  const int i = threadIdx.x;
  const int predicate = input[i] != 0.0f ? 1 : 0;
  output[i] = static_cast<float>(__ballot_sync(kFullWarp, predicate) & 0xffffu);
  output[64 + i] = static_cast<float>(__any_sync(kFullWarp, predicate));
  output[128 + i] = static_cast<float>(__all_sync(kFullWarp, predicate));
  if (i % 32 < 16) {
    output[192 + i] = static_cast<float>(__any_sync(0x0000ffffu, predicate));
  } else {
    output[192 + i] = static_cast<float>(__any_sync(0xffff0000u, predicate));
  }
  output[256 + i] = static_cast<float>(__syncthreads_or(predicate));
  output[320 + i] = static_cast<float>(__syncthreads_and(predicate));
  output[384 + i] = static_cast<float>(__syncthreads_count(predicate));
}

// Threads (x, y, z) of blocks (x, y, z): output [grid z, y, x, block z, y, x] = its own linear number.
__global__ void numbers_kernel(float* output) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  output[i] = static_cast<float>(i);
}

// output [8] float32 and pairs [2, 2] float16, bfloat16: results of atomics by 5 blocks of 32 threads.
__global__ void atomics_kernel(float* output, __half2* half_pair, __nv_bfloat162* bfloat16_pair,
                               int* integers, unsigned long long* wide) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(output, 0.5f);
  atomicAdd(half_pair, __floats2half2_rn(1.0f, 2.0f));
  atomicAdd(bfloat16_pair, __floats2bfloat162_rn(1.0f, 0.5f));
  atomicAdd(integers, i);
  atomicMax(integers + 1, i);
  atomicMin(integers + 2, i);
  atomicOr(integers + 3, 1 << i % 8);
  if (i == 77) atomicExch(integers + 4, i);
  for (int seen = 0;;) {  // a sum by compare and swap
    const int before = atomicCAS(integers + 5, seen, seen + 2);
    if (before == seen) break;
    seen = before;
  }
  atomicAdd(wide, 1ull << 32);
}

// d [16, 8] = c + a [16, 16] b [16, 8] with 16-bit a and b, fragments by hand as the PTX manual has them.
template <typename T>
__global__ void product_kernel(float* d, const T* a, const T* b, const float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair_of_a = [&](int row, int column) {
    return pack2(a[row * 16 + column], a[row * 16 + column + 1]);
  };
  const auto pair_of_b = [&](int row) { return pack2(b[row * 8 + g], b[(row + 1) * 8 + g]); };
  const std::uint32_t fa[4] = {pair_of_a(g, 2 * t), pair_of_a(g + 8, 2 * t), pair_of_a(g, 2 * t + 8),
                               pair_of_a(g + 8, 2 * t + 8)};
  const std::uint32_t fb[2] = {pair_of_b(2 * t), pair_of_b(2 * t + 8)};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  mma_16x8x16(sum, fa, fb, T());
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// The same with the fragments loaded by ldmatrix, b transposed on the way or, as [8, 16], as it is; the tiles come
// by asynchronous copies.
template <typename T>
__global__ void product_from_shared_kernel(float* d, const T* a, const T* b, const T* b_transposed) {
  VISIONLLM_SHARED_ARRAY(T, tile_a, 16 * 16);
  VISIONLLM_SHARED_ARRAY(T, tile_b, 16 * 8);
  VISIONLLM_SHARED_ARRAY(T, tile_bt, 8 * 16);
  const int lane = threadIdx.x;
  copy_async_16(tile_a + 8 * lane, a + 8 * lane, true);
  if (lane < 16) copy_async_16(tile_b + 8 * lane, b + 8 * lane, true);
  if (lane >= 16) copy_async_16(tile_bt + 8 * (lane - 16), b_transposed + 8 * (lane - 16), true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  std::uint32_t fa[4], fb[2], fbt[2], f4[4];
  ldmatrix_x4(fa, tile_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(fb, tile_b + lane % 16 * 8);
  ldmatrix_x2(fbt, tile_bt + lane % 8 * 16 + lane / 8 % 2 * 8);
  ldmatrix_x4_trans(f4, tile_b + lane % 16 * 8);  // the same two matrices twice
  float sum[4] = {}, again[4] = {}, third[4] = {};
  mma_16x8x16(sum, fa, fb, T());
  mma_16x8x16(again, fa, fbt, T());
  const std::uint32_t last_two[2] = {f4[2], f4[3]};
  mma_16x8x16(third, fa, last_two, T());
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const bool agree = sum[i] == again[i] && sum[i] == third[i];
    d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = agree ? sum[i] : __uint_as_float(0x7fc00000u);
  }
}

// d [16, 8] = c + a [16, 8] b [8, 8] in tf32.
__global__ void product_tf32_kernel(float* d, const float* a, const float* b, const float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto bits_of_a = [&](int row, int column) { return __float_as_uint(a[row * 8 + column]); };
  const std::uint32_t fa[4] = {bits_of_a(g, t), bits_of_a(g + 8, t), bits_of_a(g, t + 4),
                               bits_of_a(g + 8, t + 4)};
  const std::uint32_t fb[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  mma_16x8x8_tf32(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// output [n] of T = input [n] float32, 8 elements a thread; n is a multiple of 8. And back, times one.
template <typename T>
__global__ void convert_kernel(T* output, float* back, const float* input, int n) {
  const int i = 8 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float values[8];
  load_floats(values, input + i);
  store_floats(output + i, values);
  float again[8];
  load_floats(again, output + i);
  store_floats(back + i, again);
}

// output [3, 32, 4]: copies of 16, 8 and 4 bytes in three groups, those of odd threads not valid; each is read when
// its own group is over and later ones are not.
__global__ void copies_kernel(float* output, const float* input) {
  VISIONLLM_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  const int i = threadIdx.x;
  const bool valid = i % 2 == 0;
  for (int j = 0; j < 3 * 4; ++j) tile[(j / 4 * 32 + i) * 4 + j % 4] = -1.0f;
  const float* const source = valid ? input + 4 * i : nullptr;  // never read where not valid
  copy_async_16(tile + 4 * i, source, valid);
  copy_async_commit();
  copy_async_8(tile + 128 + 4 * i, source, valid);
  copy_async_commit();
  copy_async_4(tile + 256 + 4 * i, source, valid);
  copy_async_commit();
  copy_async_wait<2>();
  for (int j = 0; j < 4; ++j) output[4 * i + j] = tile[4 * i + j];
  copy_async_wait<1>();
  for (int j = 0; j < 4; ++j) output[128 + 4 * i + j] = tile[128 + 4 * i + j];
  copy_async_wait<0>();
  for (int j = 0; j < 4; ++j) output[256 + 4 * i + j] = tile[256 + 4 * i + j];
}

}  // namespace

Status shuffles(const TensorView& output, const TensorView& input, std::int64_t amount, std::int64_t width,
                const Execution& execution) {
  return launch("shuffles_kernel", shuffles_kernel, 1, 32, 0, stream_of(execution), data<float>(output),
                data<float>(input), amount, width);
}

Status votes(const TensorView& output, const TensorView& input, const Execution& execution) {
  return launch("votes_kernel", votes_kernel, 1, 64, 0, stream_of(execution), data<float>(output),
                data<float>(input));
}

Status numbers(const TensorView& output, const Execution& execution) {
  return launch("numbers_kernel", numbers_kernel, dim3(3, 2, 2), dim3(5, 3, 4), 0, stream_of(execution),
                data<float>(output));
}

Status atomics(const TensorView& output, const TensorView& half_pair, const TensorView& bfloat16_pair,
               const TensorView& integers, const TensorView& wide, const Execution& execution) {
  return launch("atomics_kernel", atomics_kernel, 5, 32, 0, stream_of(execution), data<float>(output),
                data<__half2>(half_pair), data<__nv_bfloat162>(bfloat16_pair), data<int>(integers),
                data<unsigned long long>(wide));
}

Status product(const TensorView& d, const TensorView& a, const TensorView& b, const TensorView& c,
               const Execution& execution) {
  if (a.dtype == DType::float32) {
    return launch("product_tf32_kernel", product_tf32_kernel, 1, 32, 0, stream_of(execution), data<float>(d),
                  data<float>(a), data<float>(b), data<float>(c));
  }
  if (a.dtype == DType::float16) {
    return launch("product_kernel", product_kernel<__half>, 1, 32, 0, stream_of(execution), data<float>(d),
                  data<__half>(a), data<__half>(b), data<float>(c));
  }
  return launch("product_kernel", product_kernel<__nv_bfloat16>, 1, 32, 0, stream_of(execution),
                data<float>(d), data<__nv_bfloat16>(a), data<__nv_bfloat16>(b), data<float>(c));
}

Status product_from_shared(const TensorView& d, const TensorView& a, const TensorView& b,
                           const TensorView& bt, const Execution& execution) {
  if (a.dtype == DType::float16) {
    return launch("product_from_shared_kernel", product_from_shared_kernel<__half>, 1, 32, 0,
                  stream_of(execution), data<float>(d), data<__half>(a), data<__half>(b), data<__half>(bt));
  }
  return launch("product_from_shared_kernel", product_from_shared_kernel<__nv_bfloat16>, 1, 32, 0,
                stream_of(execution), data<float>(d), data<__nv_bfloat16>(a), data<__nv_bfloat16>(b),
                data<__nv_bfloat16>(bt));
}

Status convert(const TensorView& output, const TensorView& back, const TensorView& input,
               const Execution& execution) {
  const int n = static_cast<int>(input.size()), blocks = (n / 8 + 63) / 64;
  if (output.dtype == DType::float16) {
    return launch("convert_kernel", convert_kernel<__half>, blocks, 64, 0, stream_of(execution),
                  data<__half>(output), data<float>(back), data<float>(input), n);
  }
  return launch("convert_kernel", convert_kernel<__nv_bfloat16>, blocks, 64, 0, stream_of(execution),
                data<__nv_bfloat16>(output), data<float>(back), data<float>(input), n);
}

Status copies(const TensorView& output, const TensorView& input, const Execution& execution) {
  return launch("copies_kernel", copies_kernel, 1, 32, 3 * 32 * 16, stream_of(execution), data<float>(output),
                data<float>(input));
}

}  // namespace visionllm
