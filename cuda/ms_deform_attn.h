// Launch interface of multi-scale deformable attention on CUDA; the contract, with the meaning of the shape
// letters, is in visionllm/ms_deform_attn.h. Arguments have been checked by cpp/ms_deform_attn.cpp.
#pragma once

#include <cstdint>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::cuda {

constexpr int kMaxLevels = 8;
constexpr int kMaxPointsPerLevel = 64;
constexpr int kMaxFusedPoints = 128;              // L * P of the fused form, which keeps a value for each
constexpr std::int64_t kMaxLevelWidth = 1 << 27;  // a width and four bits share one 32-bit word

struct DeformLevel {
  std::int32_t height, width;
  std::int32_t start;  // first pixel in S
};

// Strides are in elements. Pointers that a call has no use for are null.
struct MsDeformAttnParams {
  std::int64_t batch, pixels, heads, channels, queries;  // B, S, H, D, Q
  std::int32_t levels, points;                           // L, P
  DType value_dtype, attention_dtype;                    // the latter float32 or equal to the former

  // Sizes of the levels: here, or where `device_shapes` is set in device memory as int64 [L, 2] and [L]. A
  // level read from device memory that does not lie within S has no pixels.
  DeformLevel level[kMaxLevels];
  const std::int64_t* device_shapes;
  const std::int64_t* device_starts;
  // Q == S and the levels lie one after the other: neighbours in the picture share a block.
  bool queries_are_pixels;

  const void* value;  // [B, S, H, D]
  std::int64_t value_stride_b, value_stride_s, value_stride_h;
  const float* locations;  // [B, Q, H, L, P, 2]: sampling locations, or offsets in the fused form
  std::int64_t locations_stride_b, locations_stride_q, locations_stride_h;
  const void* attention;  // [B, Q, H, L, P]: weights, or logits in the fused form
  std::int64_t attention_stride_b, attention_stride_q, attention_stride_h;
  const float* reference;       // [B, Q, L, reference_size]; null where not fused
  std::int32_t reference_size;  // 2: offsets are in pixels of their level; 4: in halves of the box over P
  std::int64_t reference_stride_b, reference_stride_q, reference_stride_l;

  void* output;  // [B, Q, H * D], contiguous

  // Backward. Gradients are contiguous.
  const void* grad_output;  // [B, Q, H * D], the last dimension contiguous
  std::int64_t grad_output_stride_b, grad_output_stride_q;
  void* grad_value;        // [B, S, H, D] of value's type
  float* grad_value_sums;  // [B, S, H, D] float32 sums: grad_value itself where that is float32
  float* grad_locations;   // [B, Q, H, L, P, 2]
  void* grad_attention;    // [B, Q, H, L, P] of the attention's type
  float* grad_reference;   // [B, Q, L, reference_size], or null: not wanted
  bool deterministic;
  float* samples;        // deterministic: [B, H, L, Q, P, 3], see SampledPoint in ms_deform_attn_points.cuh
  std::int32_t* bounds;  // deterministic: [B, H, L, ceil(Q / 32), 4]
};

// stream: a cudaStream_t.
Status ms_deform_attn(const MsDeformAttnParams& params, void* stream);
Status ms_deform_attn_backward(const MsDeformAttnParams& params, void* stream);

// The part of the deterministic backward that sums grad_value; called by ms_deform_attn_backward.
Status ms_deform_attn_gather_grad_value(const MsDeformAttnParams& params, void* stream);

}  // namespace visionllm::cuda
