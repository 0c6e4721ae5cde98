// Language fusion (VisionLLM, Wang et al., NeurIPS 2023, 3.3): every position of every scale looks at the
// text's tokens, and what it sees is added to it through a gate.
//
//   normed = (x - mean) / sqrt(variance + epsilon) * norm_weight + norm_bias           over C, for each row
//   query  = normed query_weight^T + query_bias                                        split into H heads
//   attended[b, n, h, :] = sum over t of
//                      softmax_t(query[b, n, h, :] . key[b, t, h, :] / sqrt(D)) value[b, t, h, :]
//   output = x + gate * (attended output_weight^T + output_bias)
//
// The softmax is over the tokens whose mask is not 0. What key and value hold at the others is not used. A
// batch entry without any token (T = 0 too) attends to nothing: attended is 0.
//
// Shape letters: B batch, N positions of all scales together, C channels, T text tokens, H heads,
//   D = C / H channels of a head
//
//   x              [B, N, C]     float32, bfloat16 or float16; contiguous
//   norm_weight    [C]           x's type, as every tensor below but the mask; contiguous
//   norm_bias      [C]           contiguous
//   query_weight   [C, C]        (outputs, inputs); contiguous
//   query_bias     [C]           contiguous
//   key            [B, T, H, D]  D contiguous; other strides are free (0 too)
//   value          [B, T, H, D]  as key; both may be views of one projection
//   mask           [B, T]        uint8 or boolean, not 0 where there is text; contiguous
//   output_weight  [C, C]        (outputs, inputs); contiguous
//   output_bias    [C]           contiguous
//   gate           [C]           contiguous
//   output         [B, N, C]     contiguous
//
// Accumulation is in float32. Forward and backward are deterministic, on the CPU for any number of threads.
//
// On CUDA all addresses, and the free strides of key and value, are multiples of 16 bytes; C is up to 256 and a
// multiple of 16, D up to 64 and a multiple of 8, T up to 512 and N up to 2^31 - 256. On the CPU there are no
// such limits.
//
// In bfloat16 and float16 the operands of matrix products (normed, query, the softmax's weights, attended) are
// rounded to that type where the hardware multiplies it: on CUDA, and bfloat16 on a CPU with AVX-512's dot
// products for it. Elsewhere they are float32.
//
// The CPU's kernels go through the whole layer with a block of positions at a time, and leave nothing to
// another library. For short texts, H T <= C + T, weights and tokens are multiplied first: a row then costs
// 4 C H T operations instead of 4 C (C + T).
#pragma once

#include <cstdint>

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

Status fusion_attention(const TensorView& output, const TensorView& x, const TensorView& norm_weight,
                        const TensorView& norm_bias, const TensorView& query_weight,
                        const TensorView& query_bias, const TensorView& key, const TensorView& value,
                        const TensorView& mask, const TensorView& output_weight,
                        const TensorView& output_bias, const TensorView& gate, double epsilon,
                        const Execution& execution);

// Bytes of workspace that the backward of these sizes needs; `element_bytes` is 4 for float32, else 2.
std::int64_t fusion_attention_backward_workspace_bytes(std::int64_t B, std::int64_t N, std::int64_t C,
                                                       std::int64_t T, std::int64_t H,
                                                       std::int64_t element_bytes);

// Gradients of a scalar loss; every output element is written (not added to). The gradients are contiguous and
// have their input's shape and type. `workspace` is float32 [W], at least as many bytes as the function above
// says, of any content; its content afterwards means nothing. The CPU needs none: W may be 0 there. grad_output
// is contiguous.
Status fusion_attention_backward(
    const TensorView& grad_x, const TensorView& grad_norm_weight, const TensorView& grad_norm_bias,
    const TensorView& grad_query_weight, const TensorView& grad_query_bias, const TensorView& grad_key,
    const TensorView& grad_value, const TensorView& grad_output_weight, const TensorView& grad_output_bias,
    const TensorView& grad_gate, const TensorView& workspace, const TensorView& grad_output,
    const TensorView& x, const TensorView& norm_weight, const TensorView& norm_bias,
    const TensorView& query_weight, const TensorView& query_bias, const TensorView& key,
    const TensorView& value, const TensorView& mask, const TensorView& output_weight,
    const TensorView& output_bias, const TensorView& gate, double epsilon, const Execution& execution);

}  // namespace visionllm
