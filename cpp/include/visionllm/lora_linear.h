// A linear layer with low-rank adapters (Hu et al., "LoRA", ICLR 2022), several of them in one batch:
//
//   s[t, :] = scaling * scale[a] * x[t, :] A[a]^T            with a = adapter_index[t]
//   y[t, :] = x[t, :] W^T + bias + s[t, :] B[a]^T
//
//   T rows, K inputs, N outputs, E adapters, R their rank (1 to 128)
//
//   output         [T, N]     x's type; N contiguous, row stride free
//   low_rank       [T, R]     float32, contiguous: s, which the backward takes; zero in rows without adapter
//   workspace      [bytes]    uint8, contiguous, 16-byte aligned, at least ..._workspace_bytes(...) long; may be
//                             absent where that is 0, and on the CPU. Its content before and after means nothing
//   x              [T, K]     float32, bfloat16 or float16; K contiguous, row stride free
//   weight         [N, K]     x's type, or int8 with weight_scale; K contiguous, row stride free
//   weight_scale   [N]        float32, contiguous: row n of W is weight_scale[n] * weight[n, :]; absent unless int8
//   bias           [N]        x's type, contiguous; may be absent
//   lora_a         [E, R, K]  x's type, contiguous; absent with lora_b and low_rank: a plain linear layer
//   lora_b         [E, N, R]  x's type, contiguous
//   scale          [E]        float32, contiguous; absent: 1 for every adapter
//   adapter_index  [T]        int64, contiguous; absent: adapter 0 for every row. A number outside 0 .. E - 1,
//                             -1 by convention, is a row without adapter
//
// Sums are in float32, in an order that depends on the sizes only: results are deterministic, and a row's
// result does not depend on the other rows' adapters, as long as these are finite: on CUDA, infinity or NaN in
// an adapter may reach rows without it that share a tile of 128 rows with its own. s is kept to at least 16 bits
// of mantissa wherever it is a factor; in float16 it has that type's range, as x has.
//
// On the CPU nothing goes to a vendor's library. One core of an EPYC (Zen 4), microseconds here (without adapter)
// against MKL's float32 and oneDNN's bfloat16 product through torch:
//
//   rows x inputs x outputs   float32          bfloat16
//   1 x 1024 x 1024           68 against 74    44 against 103
//   12 x 1024 x 1024          252 against 449  136 against 197
//   64 x 1024 x 1024          1381 against 1579  662 against 659
//   500 x 192 x 192           358 against 366  192 against 199
//
// The base (weight, weight_scale, bias) is frozen: it has no gradient here.
#pragma once

#include <cstdint>

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

constexpr std::int64_t kLoraLinearMaxRank = 128;

Status lora_linear(const TensorView& output, const TensorView& low_rank, const TensorView& workspace,
                   const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
                   const TensorView& bias, const TensorView& lora_a, const TensorView& lora_b,
                   const TensorView& scale, const TensorView& adapter_index, double scaling,
                   const Execution& execution);

// Gradients of a scalar loss, each written (not added to), each absent where it is not wanted:
//
//   grad_x  [T, K]     x's type, K contiguous, row stride free
//   grad_a  [E, R, K]  x's type, contiguous; zero for an adapter that no row takes
//   grad_b  [E, N, R]  x's type, contiguous; likewise
//
// low_rank is the forward's; grad_output [T, N] has x's type, N contiguous, row stride free. x is read for
// grad_a only and low_rank for grad_b only; they may be absent otherwise.
Status lora_linear_backward(const TensorView& grad_x, const TensorView& grad_a, const TensorView& grad_b,
                            const TensorView& workspace, const TensorView& grad_output, const TensorView& x,
                            const TensorView& weight, const TensorView& weight_scale,
                            const TensorView& lora_a, const TensorView& lora_b, const TensorView& scale,
                            const TensorView& adapter_index, const TensorView& low_rank, double scaling,
                            const Execution& execution);

// Bytes of workspace that the two need on CUDA; R = 0 without adapters.
std::int64_t lora_linear_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R,
                                         DType x);
std::int64_t lora_linear_backward_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t N,
                                                  std::int64_t R, DType x);

}  // namespace visionllm
