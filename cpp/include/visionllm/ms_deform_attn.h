// Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, eq. 2):
//
//   output[b, q, h, :] = sum over l, p of
//       attention_weights[b, q, h, l, p] * bilinear(value_l[b, :, h], location[b, q, h, l, p])
//
// Shape letters, used everywhere in this project:
//   B batch, S pixels of all levels together, H heads, D channels of a head, Q queries, L levels,
//   P points per level
//
//   value               [B, S, H, D]        float32, bfloat16 or float16; D contiguous, other strides free
//   spatial_shapes      [L, 2]              int64 (height, width), each >= 1; contiguous
//   level_start_index   [L]                 int64, first pixel of each level in S; contiguous
//   sampling_locations  [B, Q, H, L, P, 2]  float32 (x, y); 0 and 1 are the outer edges; [L, P, 2] contiguous
//   attention_weights   [B, Q, H, L, P]     float32 or value's type; [L, P] contiguous
//   output              [B, Q, H * D]       value's type; H * D contiguous
//
// A pixel centre is at (i + 0.5) / size. Corners outside the image count as zero. A point that is a pixel or
// more outside, infinite or NaN contributes nothing and receives no gradient, whatever its attention weight.
// Accumulation is in float32.
//
// CPU: in an order that does not depend on the number of threads, so results are deterministic.
//
// CUDA: L is at most 8, P at most 64, a level at most 2^27 pixels wide. Everything runs on Execution's
// stream, nothing is allocated and nothing waits. spatial_shapes and level_start_index are best in host
// memory: they are checked, and handed to the kernels by value. In device memory they are read by the
// kernels, so nothing can be checked: a level that does not lie within S contributes nothing. Fastest where D
// * (bytes of an element) is a multiple of 16, as are the addresses and strides, and where the queries are
// the pixels (Q == S) and the levels, in host memory, lie one after the other: then neighbours in the picture
// share a block. Other sizes take a path without vectors.
#pragma once

#include <cstdint>

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

Status ms_deform_attn(const TensorView& output, const TensorView& value, const TensorView& spatial_shapes,
                      const TensorView& level_start_index, const TensorView& sampling_locations,
                      const TensorView& attention_weights, const Execution& execution);

// Gradients of a scalar loss; every output element is written (not added to). Outputs are contiguous and have
// their input's shape and type.
//
// workspace: float32 [n], contiguous, aligned to 16 bytes, n at least ms_deform_attn_backward_workspace(...);
// may be absent where that is 0, as on the CPU. deterministic: on CUDA, sum grad_value without atomics, with
// the same bits in every run. Everything else is deterministic in any case.
Status ms_deform_attn_backward(const TensorView& grad_value, const TensorView& grad_sampling_locations,
                               const TensorView& grad_attention_weights, const TensorView& workspace,
                               const TensorView& grad_output, const TensorView& value,
                               const TensorView& spatial_shapes, const TensorView& level_start_index,
                               const TensorView& sampling_locations, const TensorView& attention_weights,
                               bool deterministic, const Execution& execution);

// The same with what surrounds it in a Deformable DETR layer: softmax over L * P, and locations from
// reference points and offsets, neither of which goes through memory. With r = reference_points[b, q, l]:
//
//   attention_weights[b, q, h] = softmax over l, p of attention_logits[b, q, h, l, p]
//   location = r.xy + offset / (width_l, height_l)      where r = (x, y)
//   location = r.xy + offset / P * r.wh / 2             where r = (x, y, w, h)
//
//   reference_points  [B, Q, L, 2 or 4]   float32, in 0 .. 1; last dimension contiguous, other strides free
//   sampling_offsets  [B, Q, H, L, P, 2]  float32; [L, P, 2] contiguous
//   attention_logits  [B, Q, H, L, P]     float32 or value's type; [L, P] contiguous
//
// A point that contributes nothing takes part in the softmax. On CUDA L * P is at most 128.
Status ms_deform_attn_fused(const TensorView& output, const TensorView& value,
                            const TensorView& spatial_shapes, const TensorView& level_start_index,
                            const TensorView& reference_points, const TensorView& sampling_offsets,
                            const TensorView& attention_logits, const Execution& execution);

// As ms_deform_attn_backward, with the same workspace. grad_reference_points may be absent: it is then not
// computed.
Status ms_deform_attn_fused_backward(const TensorView& grad_value, const TensorView& grad_reference_points,
                                     const TensorView& grad_sampling_offsets,
                                     const TensorView& grad_attention_logits, const TensorView& workspace,
                                     const TensorView& grad_output, const TensorView& value,
                                     const TensorView& spatial_shapes, const TensorView& level_start_index,
                                     const TensorView& reference_points, const TensorView& sampling_offsets,
                                     const TensorView& attention_logits, bool deterministic,
                                     const Execution& execution);

// Numbers of type float32 that the backward needs: value [B, S, H, D] and sampling_locations (or offsets) [B,
// Q, H, L, P, 2] give the sizes and the device; their data is not read. 0 where their ranks do not fit, which
// the backward refuses.
std::int64_t ms_deform_attn_backward_workspace(const TensorView& value, const TensorView& sampling_locations,
                                               bool deterministic);

}  // namespace visionllm
