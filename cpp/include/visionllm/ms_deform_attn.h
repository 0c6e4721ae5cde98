// Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, eq. 2):
//
//   output[b, q, h, :] = sum over l, p of
//       attention_weights[b, q, h, l, p] * bilinear(value_l[b, :, h, :], location[b, q, h, l, p])
//
// Shape letters, used everywhere in this project:
//   B batch, S pixels of all levels together, H heads, D channels of a head, Q queries, L levels,
//   P points per level
//
//   value               [B, S, H, D]        float32, bfloat16 or float16; D contiguous, other strides free (0 too)
//   spatial_shapes      [L, 2]              int64 (height, width), each >= 1; contiguous
//   level_start_index   [L]                 int64, first pixel of each level in S; contiguous
//   sampling_locations  [B, Q, H, L, P, 2]  float32 (x, y); 0 and 1 are the outer edges; [L, P, 2] contiguous
//   attention_weights   [B, Q, H, L, P]     float32 or value's type; [L, P] contiguous
//   output              [B, Q, H * D]       value's type; H * D contiguous
//
// A pixel centre is at (i + 0.5) / size. Corners outside the image count as zero. A point that is a pixel or
// more outside, infinite or NaN contributes nothing and receives no gradient, whatever its attention weight.
// Accumulation is in float32, in an order that does not depend on the number of threads: results are
// deterministic.
#pragma once

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

Status ms_deform_attn(const TensorView& output, const TensorView& value, const TensorView& spatial_shapes,
                      const TensorView& level_start_index, const TensorView& sampling_locations,
                      const TensorView& attention_weights, const Execution& execution);

// Gradients of a scalar loss; every output element is written (not added to). Outputs are contiguous and have
// their input's shape and type.
Status ms_deform_attn_backward(const TensorView& grad_value, const TensorView& grad_sampling_locations,
                               const TensorView& grad_attention_weights, const TensorView& grad_output,
                               const TensorView& value, const TensorView& spatial_shapes,
                               const TensorView& level_start_index, const TensorView& sampling_locations,
                               const TensorView& attention_weights, const Execution& execution);

}  // namespace visionllm
