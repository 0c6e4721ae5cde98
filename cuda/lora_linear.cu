// lora_linear and its backward on CUDA: which kernels run, in which order. Each kernel's file says what it
// computes and how; together:
//
//   forward    s = scale x A^T                 lora_linear_low_rank.cu
//              y = x W^T + bias + s B^T        lora_linear_stream.cu   up to kStreamRows rows, 16 bits
//                                              lora_linear_gemm.cu     more rows, 16 bits
//                                              lora_linear_float.cu    float32
//   backward   ds = scale dy B                 lora_linear_low_rank.cu
//              dx = dy W + ds A                lora_linear_gemm_backward.cu, lora_linear_float.cu
//              dA = ds^T x, dB = dy^T s        lora_linear_outer.cu
//
// Few tiles share the terms of the sum among several blocks, and lora_add_partial adds their results. Everything
// is deterministic, and nothing is allocated, copied to the host or waited for.
//
// Counted at K = N = 4096, R = 16, bfloat16, one adapter, against each operand once and 2 T N K + 2 T R (N + K)
// products and sums (W 33.55 MB; x and y 8192 T bytes each; A and B 0.26 MB; s 64 T bytes, written and read):
//
//   T      bytes at least   bytes of the kernels, beyond L2       GFLOP at least   GFLOP of the kernels
//   1      33.8 MB          33.8 MB                               0.034            0.54   (16 rows of a tile)
//   64     34.9 MB          34.9 MB + 8.4 MB of partial sums      2.16             2.17
//   313    38.9 MB          39.0 MB                               10.6             10.8   (320 rows)
//   500    42.0 MB          42.1 MB                               16.9             17.3   (512 rows)
//   900    48.6 MB          48.7 MB                               30.4             34.7   (1024 rows)
//   4900   114 MB           115 MB                                165              169    (4992 rows)
//
// A vendor's product cannot take the low-rank term into its accumulator, but where it is measured to win for large
// T it can compute x W^T + bias first, with this file adding s B^T: lora_product below is the one place for that.
#include "lora_linear.h"

#include "device/platform.cuh"
#include "lora_linear_kernels.h"

namespace visionllm::cuda {
namespace {

template <typename T>
T* at(void* workspace, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}

// The base product with the low-rank term: chooses among our kernels.
Status lora_product(const ProductParams& p, void* stream) {
  if (p.dtype == DType::float32) return lora_gemm_float(p, stream);
  if (p.transposed) return lora_gemm_transposed(p, stream);
  return p.M <= kStreamRows ? lora_stream(p, stream) : lora_gemm(p, stream);
}

}  // namespace

Status lora_linear(const LoraLinearParams& p, void* stream) {
  if (p.T == 0) return {};
  const bool float32 = p.dtype == DType::float32;
  const Workspace workspace = forward_workspace(p.T, p.K, p.N, p.adapters.rank, float32);
  const bool streams = !float32 && p.T <= kStreamRows;
  void* const half = float32 || streams ? nullptr : at<void>(p.workspace, workspace.low_rank_half);
  if (p.adapters.rank > 0) {
    LowRankParams low_rank{};
    low_rank.dtype = p.dtype, low_rank.T = p.T, low_rank.columns = p.K;
    low_rank.m = p.x, low_rank.m_stride = p.x_stride;
    low_rank.v = p.adapters.a, low_rank.transposed = false;
    low_rank.adapters = p.adapters;
    low_rank.s = p.low_rank, low_rank.s_half = half, low_rank.half = half_row(p.adapters.rank);
    if (Status status = lora_low_rank(low_rank, stream); !status.ok()) return status;
  }
  if (p.N == 0) return {};
  ProductParams product{};
  product.dtype = p.dtype, product.int8 = p.int8, product.transposed = false;
  product.M = p.T, product.N = p.N, product.length = p.K;
  product.x = p.x, product.x_stride = p.x_stride;
  product.w = p.weight, product.w_stride = p.weight_stride, product.w_scale = p.weight_scale;
  product.bias = p.bias;
  product.y = p.output, product.y_stride = p.output_stride;
  product.v = p.adapters.b, product.s = p.low_rank, product.s_half = half;
  product.half = half_row(p.adapters.rank);
  product.adapters = p.adapters;
  product.partial = at<float>(p.workspace, workspace.partial);
  product.plan = gemm_plan(p.T, p.N, p.K, float32);
  return lora_product(product, stream);
}

Status lora_linear_backward(const LoraLinearBackwardParams& p, void* stream) {
  const bool float32 = p.dtype == DType::float32;
  const Workspace workspace = backward_workspace(p.T, p.K, p.N, p.adapters.rank, float32);
  float* const grad_low_rank = at<float>(p.workspace, workspace.low_rank);
  void* const half = float32 ? nullptr : at<void>(p.workspace, workspace.low_rank_half);
  const bool needs_x = p.grad_x != nullptr && p.T > 0 && p.K > 0;
  if (p.adapters.rank > 0 && p.T > 0 && (needs_x || p.grad_a != nullptr)) {
    LowRankParams low_rank{};
    low_rank.dtype = p.dtype, low_rank.T = p.T, low_rank.columns = p.N;
    low_rank.m = p.grad_output, low_rank.m_stride = p.grad_output_stride;
    low_rank.v = p.adapters.b, low_rank.transposed = true;
    low_rank.adapters = p.adapters;
    low_rank.s = grad_low_rank, low_rank.s_half = half, low_rank.half = half_row(p.adapters.rank);
    if (Status status = lora_low_rank(low_rank, stream); !status.ok()) return status;
  }
  if (needs_x) {
    ProductParams product{};
    product.dtype = p.dtype, product.int8 = p.int8, product.transposed = true;
    product.M = p.T, product.N = p.K, product.length = p.N;
    product.x = p.grad_output, product.x_stride = p.grad_output_stride;
    product.w = p.weight, product.w_stride = p.weight_stride, product.w_scale = p.weight_scale;
    product.y = p.grad_x, product.y_stride = p.grad_x_stride;
    product.v = p.adapters.a, product.s = grad_low_rank, product.s_half = half;
    product.half = half_row(p.adapters.rank);
    product.adapters = p.adapters;
    product.partial = at<float>(p.workspace, workspace.partial);
    product.plan = gemm_plan(p.T, p.K, p.N, float32);
    if (Status status = lora_product(product, stream); !status.ok()) return status;
  }
  if (p.adapters.rank == 0) return {};
  const std::int64_t R = p.adapters.rank;
  OuterParams outer{};
  outer.dtype = p.dtype, outer.T = p.T, outer.adapters = p.adapters;
  outer.a = {p.x, p.x_stride, p.K, grad_low_rank, p.grad_a, 1, p.K, R * p.K};
  outer.b = {p.grad_output, p.grad_output_stride, p.N, p.low_rank, p.grad_b, R, 1, p.N * R};
  return lora_outer(outer, stream);
}

}  // namespace visionllm::cuda
