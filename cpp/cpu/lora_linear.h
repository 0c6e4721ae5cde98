// What cpp/lora_linear.cpp hands to the CPU kernels of the linear layer with low-rank adapters. Arguments are
// checked already.
#pragma once

#include <stdint.h>

#include "element.h"
#include "every_isa.h"

namespace visionllm::cpu {

// Up to this many rows the forward reads the weights once, as they lie; with more rows it pays to pack them.
// Measured: 7 % faster with 64 rows of 1024 inputs, as fast with 96 (Zen 4).
constexpr int64_t kLoraStreamRows = 64;

// A block of the product: its sums, kLoraBlockRows (or all rows, where they are fewer) by kLoraBlockColumns, and
// as many packed columns of kLoraBlockDepth words stay in the second-level cache.
constexpr int64_t kLoraBlockRows = 480;
constexpr int64_t kLoraBlockColumns = 256;
constexpr int64_t kLoraBlockDepth = 256;

// Rows in the order of their adapters: position p is row order[p], and adapter e has the positions
// segments[e] .. segments[e + 1]. Those from segments[count] on have no adapter.
struct LoraRows {
  const int64_t* order;     // [T], or null: position p is row p
  const int64_t* segments;  // [E + 1]
};

// Strides in elements; the elements of a row lie side by side.
struct LoraLinearParams {
  int64_t T, K, N, E, R;  // R = 0: no adapters
  Element element;        // of x, output, bias, a, b and their gradients, and of weight unless int8
  bool int8;              // weight is int8 with weight_scale
  const void* x;          // [T, K]
  int64_t x_stride;
  const void* weight;  // [N, K]
  int64_t weight_stride;
  const float* weight_scale;  // [N], or null
  const void* bias;           // [N], or null
  const void* a;              // [E, R, K]
  const void* b;              // [E, N, R]
  const float* factor;        // [E], what each adapter's output is multiplied by
  LoraRows rows;
  const int64_t* index;  // [T] adapter of each row, -1 for none; null: adapter 0 (or none where R = 0)
  float* low_rank;       // [T, R]: forward s, written; backward read

  // Forward
  void* output;  // [T, N]
  int64_t output_stride;

  // Backward
  const void* grad_output;  // [T, N]
  int64_t grad_output_stride;
  float* grad_low_rank;  // [T, R]: factor * grad_output B
  void* grad_x;          // [T, K]
  int64_t grad_x_stride;
  void* grad_a;  // [E, R, K]
  void* grad_b;  // [E, N, R]
};

// Each runs the items [begin, end) on the calling thread.
//   lora_low_rank_kernel        positions: x A^T, to low_rank
//   lora_columns_kernel         columns of the output, which takes low_rank
//   lora_grad_low_rank_kernel   positions: grad_output B, to grad_low_rank
//   lora_grad_x_kernel          columns of grad_x, which takes grad_low_rank
//   lora_grad_a_kernel          columns of grad_a, which takes grad_low_rank
//   lora_grad_b_kernel          rows of grad_b, which takes low_rank
// workspace: lora_linear_workspace bytes, aligned to 64, for one call alone.
using LoraLinearKernel = void (*)(const LoraLinearParams& params, int64_t begin, int64_t end,
                                  void* workspace);

// Sums of a block (or of grad_a's and grad_b's adapter: up to 128 rows), packed columns of the base, an
// adapter's packed columns (or the transposed low-rank rows), a converted tile of rows. Static: see simd.h.
static inline int64_t lora_block_rows(const LoraLinearParams& p) {
  return p.T < kLoraBlockRows ? (p.T + 7) / 8 * 8 : kLoraBlockRows;
}
constexpr int64_t kLoraSumStride = kLoraBlockColumns + 16;  // rows start on different cache sets
static inline int64_t lora_linear_workspace(const LoraLinearParams& p) {
  const int64_t rows = lora_block_rows(p) > p.R ? lora_block_rows(p) : p.R;
  const int64_t adapter = p.R * (kLoraBlockColumns > p.T ? kLoraBlockColumns : (p.T + 15) / 16 * 16);
  return 4 * (rows * kLoraSumStride + kLoraBlockColumns * kLoraBlockDepth + adapter + 48 * kLoraSumStride +
              48 * 128) +
         5 * 64;
}

VISIONLLM_FOR_EVERY_ISA(
    void lora_low_rank_kernel(const LoraLinearParams& params, int64_t begin, int64_t end, void* workspace);
    void lora_columns_kernel(const LoraLinearParams& params, int64_t begin, int64_t end, void* workspace);
    void lora_grad_low_rank_kernel(const LoraLinearParams& params, int64_t begin, int64_t end,
                                   void* workspace);
    void lora_grad_x_kernel(const LoraLinearParams& params, int64_t begin, int64_t end, void* workspace);
    void lora_grad_a_kernel(const LoraLinearParams& params, int64_t begin, int64_t end, void* workspace);
    void lora_grad_b_kernel(const LoraLinearParams& params, int64_t begin, int64_t end, void* workspace);)

}  // namespace visionllm::cpu
