// Launches of the kernels that make up lora_linear, one file each. Every one is for matrices of at least one
// row, except where it says that it fills with zeros; sums may be empty.
#pragma once

#include <cstdint>

#include "lora_linear.h"
#include "lora_linear_plan.h"
#include "visionllm/status.h"

namespace visionllm::cuda {

// ---- low-rank states: lora_linear_low_rank.cu ---------------------------------------------------------------

// s[t, r] = factor(a) * sum over c of m[t, c] * v[a][c, r], a the adapter of row t; zero without adapter.
struct LowRankParams {
  DType dtype;
  std::int64_t T;         // rows, at least 1
  std::int64_t columns;   // of m
  const void* m;          // [T, columns]
  std::int64_t m_stride;  // of rows, in elements
  const void* v;          // [E, R, columns] or, transposed, [E, columns, R]; contiguous
  bool transposed;
  LoraAdapters adapters;
  float* s;           // [T, R]
  void* s_half;       // [T, 2 half] in dtype, or null
  std::int64_t half;  // half_row(R)
};
Status lora_low_rank(const LowRankParams& params, void* stream);

// ---- matrix products --------------------------------------------------------------------------------------

// y[m, n] = sum over i of x[m, i] w[n, i] + bias[n] + sum over r of s[m, r] v[a][n, r]   (not transposed)
// y[m, n] = sum over i of x[m, i] w[i, n]           + sum over r of s[m, r] v[a][r, n]   (transposed)
// with a the adapter of row m.
struct ProductParams {
  DType dtype;
  bool int8;  // w is int8 with w_scale
  bool transposed;
  std::int64_t M, N, length;  // rows and columns of y, terms of the sum; M and N at least 1
  const void* x;              // [M, length]
  std::int64_t x_stride;
  const void* w;  // [N, length] or, transposed, [length, N]
  std::int64_t w_stride;
  const float* w_scale;  // int8: of w's rows: [N] or, transposed, [length]
  const void* bias;      // [N], or null
  void* y;               // [M, N]
  std::int64_t y_stride;
  const void* v;          // [E, N, R] or, transposed, [E, R, N], contiguous
  const float* s;         // [M, R]
  const void* s_half;     // [M, 2 half]; not for float32
  std::int64_t half;      // half_row(R)
  LoraAdapters adapters;  // rank 0: no adapters
  float* partial;         // [plan.splits, M, N]; not if there is one split
  GemmPlan plan;
};
Status lora_stream(const ProductParams& params, void* stream);  // lora_linear_stream.cu: M <= kStreamRows
Status lora_gemm(const ProductParams& params, void* stream);    // lora_linear_gemm.cu: 16 bits
Status lora_gemm_transposed(const ProductParams& params,
                            void* stream);                          // lora_linear_gemm_backward.cu: 16 bits
Status lora_gemm_float(const ProductParams& params, void* stream);  // lora_linear_float.cu: float32

// y = sum of the partial sums, in order, + bias: lora_linear_float.cu
Status lora_add_partial(const ProductParams& params, void* stream);

// ---- gradients of A and B: lora_linear_outer.cu -------------------------------------------------------------

// g[a][c, r] = sum over the rows t of adapter a of m[t, c] * s[t, r]
struct OuterProblem {
  const void* m;  // [T, columns]
  std::int64_t m_stride;
  std::int64_t columns;
  const float* s;                             // [T, R]
  void* g;                                    // dtype; null: not wanted
  std::int64_t stride_c, stride_r, stride_a;  // of g
};
struct OuterParams {
  DType dtype;
  std::int64_t T;  // may be 0: zeros
  LoraAdapters adapters;
  OuterProblem a, b;  // the two gradients, in one launch
};
Status lora_outer(const OuterParams& params, void* stream);

}  // namespace visionllm::cuda
