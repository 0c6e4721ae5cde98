// The operators that tests can run under emulation. Each operator's lines are compiled into a driver of its own,
// which is built from cuda/<op>*.cu and cpp/<op>.cpp.
//
// A function's tensors are named in the order of its parameters: >output ~workspace &updated input
// @input-in-host-memory.
#include "emulation/operators.h"

#ifdef VISIONLLM_EMULATE_ms_deform_attn
#include "visionllm/ms_deform_attn.h"
namespace visionllm {
// The same with the levels in host memory.
static TensorView on_host(TensorView view) {
  view.device = Device::cpu;
  return view;
}
static Status ms_deform_attn_host_levels(const TensorView& output, const TensorView& value,
                                         const TensorView& shapes, const TensorView& starts,
                                         const TensorView& locations, const TensorView& attention,
                                         const Execution& execution) {
  return ms_deform_attn(output, value, on_host(shapes), on_host(starts), locations, attention, execution);
}
static Status ms_deform_attn_backward_host_levels(
    const TensorView& grad_value, const TensorView& grad_locations, const TensorView& grad_attention,
    const TensorView& workspace, const TensorView& grad_output, const TensorView& value,
    const TensorView& shapes, const TensorView& starts, const TensorView& locations,
    const TensorView& attention, bool deterministic, const Execution& execution) {
  return ms_deform_attn_backward(grad_value, grad_locations, grad_attention, workspace, grad_output, value,
                                 on_host(shapes), on_host(starts), locations, attention, deterministic,
                                 execution);
}
static Status ms_deform_attn_fused_host_levels(const TensorView& output, const TensorView& value,
                                               const TensorView& shapes, const TensorView& starts,
                                               const TensorView& reference, const TensorView& offsets,
                                               const TensorView& logits, const Execution& execution) {
  return ms_deform_attn_fused(output, value, on_host(shapes), on_host(starts), reference, offsets, logits,
                              execution);
}
static Status ms_deform_attn_fused_backward_host_levels(
    const TensorView& grad_value, const TensorView& grad_reference, const TensorView& grad_offsets,
    const TensorView& grad_logits, const TensorView& workspace, const TensorView& grad_output,
    const TensorView& value, const TensorView& shapes, const TensorView& starts, const TensorView& reference,
    const TensorView& offsets, const TensorView& logits, bool deterministic, const Execution& execution) {
  return ms_deform_attn_fused_backward(grad_value, grad_reference, grad_offsets, grad_logits, workspace,
                                       grad_output, value, on_host(shapes), on_host(starts), reference,
                                       offsets, logits, deterministic, execution);
}
// `value` [1, 1, H, D] is the last pixel of the last picture of a tensor [batch, pixels, H, D] with such strides, of which
// nothing else is in memory.
static Status ms_deform_attn_far(const TensorView& output, const TensorView& value, const TensorView& shapes,
                                 const TensorView& starts, const TensorView& locations,
                                 const TensorView& attention, std::int64_t batch, std::int64_t pixels,
                                 std::int64_t stride_b, std::int64_t stride_s, const Execution& execution) {
  TensorView far = value;
  far.shape[0] = batch, far.shape[1] = pixels;
  far.strides[0] = stride_b, far.strides[1] = stride_s;
  far.data =
      reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(value.data) -
                              ((batch - 1) * stride_b + (pixels - 1) * stride_s) * element_size(value.dtype));
  return ms_deform_attn(output, far, shapes, starts, locations, attention, execution);
}
}  // namespace visionllm
#define VISIONLLM_DEFORM_FORWARD "value spatial_shapes level_start_index sampling_locations attention_weights"
#define VISIONLLM_DEFORM_FUSED \
  "value spatial_shapes level_start_index reference_points sampling_offsets attention_logits"
#define VISIONLLM_DEFORM_BACKWARD                                            \
  ">grad_value >grad_sampling_locations >grad_attention_weights ~workspace " \
  "grad_output " VISIONLLM_DEFORM_FORWARD
#define VISIONLLM_DEFORM_FUSED_BACKWARD                                                          \
  ">grad_value >grad_reference_points >grad_sampling_offsets >grad_attention_logits ~workspace " \
  "grad_output " VISIONLLM_DEFORM_FUSED
VISIONLLM_OPERATOR(ms_deform_attn, ">output " VISIONLLM_DEFORM_FORWARD)
VISIONLLM_OPERATOR(ms_deform_attn_host_levels, ">output " VISIONLLM_DEFORM_FORWARD)
VISIONLLM_OPERATOR(ms_deform_attn_far, ">output " VISIONLLM_DEFORM_FORWARD)
VISIONLLM_OPERATOR(ms_deform_attn_backward, VISIONLLM_DEFORM_BACKWARD)
VISIONLLM_OPERATOR(ms_deform_attn_backward_host_levels, VISIONLLM_DEFORM_BACKWARD)
VISIONLLM_OPERATOR(ms_deform_attn_fused, ">output " VISIONLLM_DEFORM_FUSED)
VISIONLLM_OPERATOR(ms_deform_attn_fused_host_levels, ">output " VISIONLLM_DEFORM_FUSED)
VISIONLLM_OPERATOR(ms_deform_attn_fused_backward, VISIONLLM_DEFORM_FUSED_BACKWARD)
VISIONLLM_OPERATOR(ms_deform_attn_fused_backward_host_levels, VISIONLLM_DEFORM_FUSED_BACKWARD)
#endif

#ifdef VISIONLLM_EMULATE_lora_linear
#include "visionllm/lora_linear.h"
VISIONLLM_OPERATOR(lora_linear,
                   ">output >low_rank ~workspace x weight weight_scale bias lora_a lora_b scale "
                   "adapter_index")
VISIONLLM_OPERATOR(lora_linear_backward,
                   ">grad_x >grad_a >grad_b ~workspace grad_output x weight weight_scale lora_a lora_b scale "
                   "adapter_index low_rank")
#endif

#ifdef VISIONLLM_EMULATE_fusion_attention
#include "visionllm/fusion_attention.h"
VISIONLLM_OPERATOR(
    fusion_attention,
    ">output x norm_weight norm_bias query_weight query_bias key value mask output_weight output_bias "
    "gate")
VISIONLLM_OPERATOR(
    fusion_attention_backward,
    ">grad_x >grad_norm_weight >grad_norm_bias >grad_query_weight >grad_query_bias >grad_key "
    ">grad_value >grad_output_weight >grad_output_bias >grad_gate ~workspace grad_output x norm_weight "
    "norm_bias query_weight query_bias key value mask output_weight output_bias gate")
#endif

#ifdef VISIONLLM_EMULATE_query_attention
#include "visionllm/query_attention.h"
VISIONLLM_OPERATOR(query_attention,
                   ">output >logsumexp ~workspace q k v prefix_k prefix_v prefix_length cosine sine")
VISIONLLM_OPERATOR(
    query_attention_backward,
    ">grad_q >grad_k >grad_v >grad_prefix_k >grad_prefix_v ~workspace grad_output output logsumexp "
    "q k v prefix_k prefix_v prefix_length cosine sine")
#endif

#ifdef VISIONLLM_EMULATE_slot_head
#include "visionllm/slot_head.h"
namespace visionllm {
// `rows` [1, 1, C] is the last of [1, V, C] with such a stride, of which nothing else is in memory.
static Status slot_head_cross_entropy_far(const TensorView& loss, const TensorView& logsumexp,
                                          const TensorView& target_logsumexp, const TensorView& workspace,
                                          const TensorView& states, const TensorView& rows,
                                          const TensorView& target, const TensorView& weight,
                                          const TensorView& valid, const TensorView& norm_weight,
                                          double epsilon, double scale, double sigma, std::int64_t stride,
                                          const Execution& execution) {
  TensorView far = rows;
  far.shape[1] = valid.shape[1], far.strides[1] = stride;
  far.data = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(rows.data) -
                                     (far.shape[1] - 1) * stride * element_size(rows.dtype));
  return slot_head_cross_entropy(loss, logsumexp, target_logsumexp, workspace, states, far, target, weight,
                                 valid, norm_weight, epsilon, scale, sigma, execution);
}
}  // namespace visionllm
VISIONLLM_OPERATOR(
    slot_head_cross_entropy_far,
    ">loss >logsumexp >target_logsumexp ~workspace states rows target weight valid norm_weight")
VISIONLLM_OPERATOR(slot_head_predict,
                   ">best >probability >logsumexp >expectation >probabilities ~workspace states rows valid "
                   "norm_weight")
VISIONLLM_OPERATOR(
    slot_head_cross_entropy,
    ">loss >logsumexp >target_logsumexp ~workspace states rows target weight valid norm_weight")
VISIONLLM_OPERATOR(slot_head_cross_entropy_backward,
                   ">grad_states >grad_rows >grad_norm_weight ~workspace grad_loss states rows target weight "
                   "valid norm_weight logsumexp target_logsumexp")
#endif
