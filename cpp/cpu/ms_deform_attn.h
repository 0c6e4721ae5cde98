// What cpp/ms_deform_attn.cpp hands to the CPU kernels of multi-scale deformable attention. Arguments are
// checked already.
#pragma once

#include <stdint.h>

#include "element.h"
#include "every_isa.h"

namespace visionllm::cpu {

// Points are taken in chunks of this many: a multiple of the width of every instruction set.
constexpr int kPointChunk = 16;

// Strides are in elements. points = L * P; tables have `padded_points` entries, a multiple of kPointChunk.
struct MsDeformAttnParams {
  int64_t batch, queries, heads, channels;  // B, Q, H, D
  int64_t pixels;                           // S
  int32_t levels, points, padded_points;    // L, L * P

  const float* level_width;   // [padded_points] the level's width and height, as float and as int, and its
                              // first pixel in S,
  const float* level_height;  // repeated for each of its points
  const int32_t* level_width_int;
  const int32_t* level_height_int;
  const int32_t* level_start;
  const float* level_number;  // 0 .. L - 1

  Element element;  // of value, output and grad_output
  const void* value;
  int64_t value_stride_b, value_stride_s, value_stride_h;
  const float* locations;  // fused: offsets
  int64_t locations_stride_b, locations_stride_q, locations_stride_h;
  Element attention_element;
  const void* attention;  // fused: logits
  int64_t attention_stride_b, attention_stride_q, attention_stride_h;

  // Fused only, else null and 0.
  const float* reference;  // [B, Q, L, reference_size]
  int64_t reference_stride_b, reference_stride_q, reference_stride_l;
  int32_t reference_size;  // 2: points, 4: boxes
  float half_over_points;  // 1 / (2 P)

  void* output;  // forward only; [B, Q, H * D]
  int64_t output_stride_b, output_stride_q;

  // Backward only.
  const void* grad_output;  // [B, Q, H * D]
  int64_t grad_output_stride_b, grad_output_stride_q;
  void* grad_value;  // [B, S, H, D] contiguous, of type element
  float*
      grad_locations;  // [B, Q, H, L, P, 2] contiguous; fused: of offsets, or with by_location of locations
  bool by_location;
  void* grad_attention;  // [B, Q, H, L, P] contiguous, of type attention_element; fused: of logits
};

// Both run the items [begin, end) on the calling thread. Memory that one call alone uses:
//   workspace   workspace_bytes(params), aligned to 64
//   value_rows  [S + 1, D] floats, or null. One head's rows lie H * D elements apart in value and so share
//               few sets of the caches; with many queries it pays to copy them together first.
//   grad_rows   [S + 1, D] floats, or null as value_rows is. With null, grad_value is float32, has been
//               cleared by the caller, and is added to in place.
//   slots       null, or [S + 1 + R] with value_rows and grad_rows [R, D] for R = ms_deform_attn_most_rows: few
//               of the rows are looked at, and only those are copied. Then too, grad_value has been cleared.
// Items:
//   forward   B * H * Q, one query of one head each
//   backward  b * H + h; all of one item's gradients are written by its call, so none needs an atomic
using MsDeformAttnForward = void (*)(const MsDeformAttnParams& params, int64_t begin, int64_t end,
                                     void* workspace, float* value_rows);
using MsDeformAttnBackward = void (*)(const MsDeformAttnParams& params, int64_t begin, int64_t end,
                                      void* workspace, float* value_rows, float* grad_rows, int32_t* slots);

// Rows of a head that all queries together can look at, and one of zeros.
static inline int64_t ms_deform_attn_most_rows(const MsDeformAttnParams& params) {
  const int64_t corners = 4 * params.queries * params.points;
  return (corners < params.pixels ? corners : params.pixels) + 1;
}

// Twice: per point four row numbers and weights, four dot products, seven factors of the backward pass; per
// chunk a validity word. Static, for this header reaches sources compiled for one instruction set: see simd.h.
static inline int64_t ms_deform_attn_workspace_bytes(const MsDeformAttnParams& params) {
  const int64_t chunks = params.padded_points / kPointChunk;
  return 2 * (params.padded_points * static_cast<int64_t>(4 * (4 + 4 + 4 + 7)) + (chunks + 15) / 16 * 64);
}

VISIONLLM_FOR_EVERY_ISA(void ms_deform_attn_kernel(const MsDeformAttnParams& params, int64_t begin,
                                                   int64_t end, void* workspace, float* value_rows);
                        void ms_deform_attn_backward_kernel(const MsDeformAttnParams& params, int64_t begin,
                                                            int64_t end, void* workspace, float* value_rows,
                                                            float* grad_rows, int32_t* slots);)

}  // namespace visionllm::cpu
