// Argument checks and dispatch of multi-scale deformable attention; the contract is in
// include/visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include <initializer_list>
#include <limits>

#include "check.h"
#include "ms_deform_attn_cpu.h"
#include "ms_deform_attn_cuda.h"

namespace visionllm {
namespace {

using Sizes = DeformSizes;

// What an operator calls its points and their attention.
struct Names {
  const char* locations;
  const char* attention;
};
constexpr Names kNames = {"sampling_locations", "attention_weights"};
constexpr Names kFusedNames = {"sampling_offsets", "attention_logits"};

// Checks the inputs that forward and backward share.
Status check_inputs(const char* op, const Names& names, const TensorView& value,
                    const TensorView& spatial_shapes, const TensorView& level_start_index,
                    const TensorView& sampling_locations, const TensorView& attention_weights, Sizes* sizes) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "value", value, "[B, S, H, D]", 4));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, names.locations, sampling_locations, "[B, Q, H, L, P, 2]", 6));
  Sizes& n = *sizes;
  n.B = value.shape[0], n.S = value.shape[1], n.H = value.shape[2], n.D = value.shape[3];
  n.Q = sampling_locations.shape[1], n.L = sampling_locations.shape[3], n.P = sampling_locations.shape[4];
  VISIONLLM_RETURN_IF_BAD(check_shape(op, names.locations, sampling_locations, "[B, Q, H, L, P, 2]",
                                      {n.B, n.Q, n.H, n.L, n.P, 2}));
  VISIONLLM_RETURN_IF_BAD(
      check_shape(op, names.attention, attention_weights, "[B, Q, H, L, P]", {n.B, n.Q, n.H, n.L, n.P}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "spatial_shapes", spatial_shapes, "[L, 2]", {n.L, 2}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "level_start_index", level_start_index, "[L]", {n.L}));
  if (!is_float(value.dtype)) {
    return bad_argument(
        op, std::string("value must be float32, bfloat16 or float16, got ") + dtype_name(value.dtype));
  }
  if (attention_weights.dtype != DType::float32 && attention_weights.dtype != value.dtype) {
    return bad_argument(op, std::string(names.attention) + " must be float32 or of value's type " +
                                dtype_name(value.dtype) + ", got " + dtype_name(attention_weights.dtype));
  }
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, names.locations, sampling_locations, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "spatial_shapes", spatial_shapes, DType::int64));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "level_start_index", level_start_index, DType::int64));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "value", value, 1));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, names.locations, sampling_locations, 3));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, names.attention, attention_weights, 2));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "spatial_shapes", spatial_shapes, 2));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "level_start_index", level_start_index, 1));
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (n.S > kLargest)
    return bad_argument(op, "value must have at most 2^31 - 1 pixels, got S = " + std::to_string(n.S));
  if (n.L * n.P > 65536)
    return bad_argument(op, "L * P must be at most 65536, got " + std::to_string(n.L * n.P));
  return {};
}

Status check_output(const char* op, const TensorView& output, const TensorView& value, const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "output", output, "[B, Q, H * D]", {n.B, n.Q, n.H * n.D}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "output", output, value.dtype));
  return check_inner_contiguous(op, "output", output, 3);
}

// Of what all backwards have.
Status check_gradients(const char* op, const Names& names, const TensorView& grad_value,
                       const TensorView& grad_locations, const TensorView& grad_attention,
                       const TensorView& grad_output, const TensorView& value, const TensorView& attention,
                       const Sizes& n) {
  const std::string locations_name = std::string("grad_") + names.locations;
  const std::string attention_name = std::string("grad_") + names.attention;
  VISIONLLM_RETURN_IF_BAD(
      check_shape(op, "grad_output", grad_output, "[B, Q, H * D]", {n.B, n.Q, n.H * n.D}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_value", grad_value, "[B, S, H, D]", {n.B, n.S, n.H, n.D}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, locations_name.c_str(), grad_locations, "[B, Q, H, L, P, 2]",
                                      {n.B, n.Q, n.H, n.L, n.P, 2}));
  VISIONLLM_RETURN_IF_BAD(
      check_shape(op, attention_name.c_str(), grad_attention, "[B, Q, H, L, P]", {n.B, n.Q, n.H, n.L, n.P}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_output", grad_output, value.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_value", grad_value, value.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, locations_name.c_str(), grad_locations, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, attention_name.c_str(), grad_attention, attention.dtype));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "grad_output", grad_output, 1));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "grad_value", grad_value, 4));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, locations_name.c_str(), grad_locations, 6));
  return check_inner_contiguous(op, attention_name.c_str(), grad_attention, 5);
}

// Both on one device: on the CPU, or where the rest of the call is.
Status check_level_device(const char* op, const TensorView& spatial_shapes,
                          const TensorView& level_start_index, Device device) {
  Device levels;
  VISIONLLM_RETURN_IF_BAD(check_device(
      op, {{"spatial_shapes", &spatial_shapes}, {"level_start_index", &level_start_index}}, &levels));
  if (levels == Device::cpu || levels == device) return {};
  return bad_argument(op, "spatial_shapes must be in CPU memory as value is, got CUDA memory");
}

Status check_reference(const char* op, const char* name, const TensorView& reference, const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, name, reference, "[B, Q, L, 2 or 4]", 4));
  const std::int64_t size = reference.shape[3] == 4 ? 4 : 2;
  VISIONLLM_RETURN_IF_BAD(check_shape(op, name, reference, "[B, Q, L, 2 or 4]", {n.B, n.Q, n.L, size}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, reference, DType::float32));
  return check_inner_contiguous(op, name, reference, 1);
}

// ---- CUDA -------------------------------------------------------------------------------------------------

Status set_reference(const char* op, const TensorView& reference, const Sizes& n,
                     cuda::MsDeformAttnParams* params) {
  if (n.L * n.P > cuda::kMaxFusedPoints) {
    return bad_argument(op, "L * P must be at most " + std::to_string(cuda::kMaxFusedPoints) + ", got " +
                                std::to_string(n.L * n.P));
  }
  params->reference = static_cast<const float*>(reference.data);
  params->reference_size = static_cast<std::int32_t>(reference.shape[3]);
  set_strides(reference, &params->reference_stride_b, &params->reference_stride_q,
              &params->reference_stride_l);
  return {};
}

void set_gradients(const TensorView& grad_locations, const TensorView& grad_attention,
                   const TensorView& grad_output, cuda::MsDeformAttnParams* params) {
  params->grad_locations = static_cast<float*>(grad_locations.data);
  params->grad_attention = grad_attention.data;
  params->grad_output = grad_output.data;
  set_strides(grad_output, &params->grad_output_stride_b, &params->grad_output_stride_q, nullptr);
}

Status run_on_cuda(const char* op, bool nothing_to_do, const cuda::MsDeformAttnParams& params,
                   const Execution& execution, bool backward) {
#ifdef VISIONLLM_HAVE_CUDA
  (void)op;
  if (nothing_to_do) return {};
  return backward ? cuda::ms_deform_attn_backward(params, execution.stream)
                  : cuda::ms_deform_attn(params, execution.stream);
#else
  (void)nothing_to_do, (void)params, (void)execution, (void)backward;
  return no_cuda_kernels(op);
#endif
}

}  // namespace

Status ms_deform_attn(const TensorView& output, const TensorView& value, const TensorView& spatial_shapes,
                      const TensorView& level_start_index, const TensorView& sampling_locations,
                      const TensorView& attention_weights, const Execution& execution) {
  constexpr const char* op = "ms_deform_attn";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, kNames, value, spatial_shapes, level_start_index,
                                       sampling_locations, attention_weights, &n));
  VISIONLLM_RETURN_IF_BAD(check_output(op, output, value, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"value", &value},
                                        {"output", &output},
                                        {"sampling_locations", &sampling_locations},
                                        {"attention_weights", &attention_weights}},
                                       &device));
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
  if (device == Device::cuda) {
    cuda::MsDeformAttnParams params;
    VISIONLLM_RETURN_IF_BAD(make_cuda_params(op, value, spatial_shapes, level_start_index, sampling_locations,
                                             attention_weights, n, &params));
    params.output = output.data;
    return run_on_cuda(op, output.size() == 0, params, execution, false);
  }
  const TensorView no_reference;
  const DeformCall call{value,       spatial_shapes, level_start_index, sampling_locations, attention_weights,
                        no_reference};
  return run_on_cpu(op, output, call, n, execution);
}

Status ms_deform_attn_backward(const TensorView& grad_value, const TensorView& grad_sampling_locations,
                               const TensorView& grad_attention_weights, const TensorView& workspace,
                               const TensorView& grad_output, const TensorView& value,
                               const TensorView& spatial_shapes, const TensorView& level_start_index,
                               const TensorView& sampling_locations, const TensorView& attention_weights,
                               bool deterministic, const Execution& execution) {
  constexpr const char* op = "ms_deform_attn_backward";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, kNames, value, spatial_shapes, level_start_index,
                                       sampling_locations, attention_weights, &n));
  VISIONLLM_RETURN_IF_BAD(check_gradients(op, kNames, grad_value, grad_sampling_locations,
                                          grad_attention_weights, grad_output, value, attention_weights, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"value", &value},
                                        {"grad_value", &grad_value},
                                        {"grad_sampling_locations", &grad_sampling_locations},
                                        {"grad_attention_weights", &grad_attention_weights},
                                        {"workspace", &workspace},
                                        {"grad_output", &grad_output},
                                        {"sampling_locations", &sampling_locations},
                                        {"attention_weights", &attention_weights}},
                                       &device));
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
  if (device == Device::cuda) {
    cuda::MsDeformAttnParams params;
    VISIONLLM_RETURN_IF_BAD(make_cuda_params(op, value, spatial_shapes, level_start_index, sampling_locations,
                                             attention_weights, n, &params));
    VISIONLLM_RETURN_IF_BAD(set_workspace(op, workspace, grad_value, n, deterministic, &params));
    set_gradients(grad_sampling_locations, grad_attention_weights, grad_output, &params);
    return run_on_cuda(op, false, params, execution, true);
  }
  const TensorView no_reference;
  const DeformCall call{value,       spatial_shapes, level_start_index, sampling_locations, attention_weights,
                        no_reference};
  const DeformGradients grads{grad_value, grad_sampling_locations, grad_attention_weights, no_reference};
  return run_backward_on_cpu(op, grads, grad_output, call, n, execution);
}

Status ms_deform_attn_fused(const TensorView& output, const TensorView& value,
                            const TensorView& spatial_shapes, const TensorView& level_start_index,
                            const TensorView& reference_points, const TensorView& sampling_offsets,
                            const TensorView& attention_logits, const Execution& execution) {
  constexpr const char* op = "ms_deform_attn_fused";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, kFusedNames, value, spatial_shapes, level_start_index,
                                       sampling_offsets, attention_logits, &n));
  VISIONLLM_RETURN_IF_BAD(check_reference(op, "reference_points", reference_points, n));
  VISIONLLM_RETURN_IF_BAD(check_output(op, output, value, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"value", &value},
                                        {"output", &output},
                                        {"reference_points", &reference_points},
                                        {"sampling_offsets", &sampling_offsets},
                                        {"attention_logits", &attention_logits}},
                                       &device));
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
  if (device == Device::cpu) {
    const DeformCall call{
        value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, reference_points};
    return run_on_cpu(op, output, call, n, execution);
  }
  cuda::MsDeformAttnParams params;
  VISIONLLM_RETURN_IF_BAD(make_cuda_params(op, value, spatial_shapes, level_start_index, sampling_offsets,
                                           attention_logits, n, &params));
  VISIONLLM_RETURN_IF_BAD(set_reference(op, reference_points, n, &params));
  params.output = output.data;
  return run_on_cuda(op, output.size() == 0, params, execution, false);
}

Status ms_deform_attn_fused_backward(const TensorView& grad_value, const TensorView& grad_reference_points,
                                     const TensorView& grad_sampling_offsets,
                                     const TensorView& grad_attention_logits, const TensorView& workspace,
                                     const TensorView& grad_output, const TensorView& value,
                                     const TensorView& spatial_shapes, const TensorView& level_start_index,
                                     const TensorView& reference_points, const TensorView& sampling_offsets,
                                     const TensorView& attention_logits, bool deterministic,
                                     const Execution& execution) {
  constexpr const char* op = "ms_deform_attn_fused_backward";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, kFusedNames, value, spatial_shapes, level_start_index,
                                       sampling_offsets, attention_logits, &n));
  VISIONLLM_RETURN_IF_BAD(check_reference(op, "reference_points", reference_points, n));
  VISIONLLM_RETURN_IF_BAD(check_gradients(op, kFusedNames, grad_value, grad_sampling_offsets,
                                          grad_attention_logits, grad_output, value, attention_logits, n));
  if (!grad_reference_points.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_reference_points", grad_reference_points,
                                        "reference_points'", {n.B, n.Q, n.L, reference_points.shape[3]}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_reference_points", grad_reference_points, DType::float32));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "grad_reference_points", grad_reference_points));
  }
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"value", &value},
                                        {"grad_value", &grad_value},
                                        {"grad_reference_points", &grad_reference_points},
                                        {"grad_sampling_offsets", &grad_sampling_offsets},
                                        {"grad_attention_logits", &grad_attention_logits},
                                        {"workspace", &workspace},
                                        {"grad_output", &grad_output},
                                        {"reference_points", &reference_points},
                                        {"sampling_offsets", &sampling_offsets},
                                        {"attention_logits", &attention_logits}},
                                       &device));
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
  if (device == Device::cpu) {
    const DeformCall call{
        value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, reference_points};
    const DeformGradients grads{grad_value, grad_sampling_offsets, grad_attention_logits,
                                grad_reference_points};
    return run_backward_on_cpu(op, grads, grad_output, call, n, execution);
  }
  cuda::MsDeformAttnParams params;
  VISIONLLM_RETURN_IF_BAD(make_cuda_params(op, value, spatial_shapes, level_start_index, sampling_offsets,
                                           attention_logits, n, &params));
  VISIONLLM_RETURN_IF_BAD(set_reference(op, reference_points, n, &params));
  VISIONLLM_RETURN_IF_BAD(set_workspace(op, workspace, grad_value, n, deterministic, &params));
  set_gradients(grad_sampling_offsets, grad_attention_logits, grad_output, &params);
  params.grad_reference = static_cast<float*>(grad_reference_points.data);
  return run_on_cuda(op, false, params, execution, true);
}

std::int64_t ms_deform_attn_backward_workspace(const TensorView& value, const TensorView& sampling_locations,
                                               bool deterministic) {
  if (value.rank != 4 || sampling_locations.rank != 6) return 0;
  const std::int64_t* v = value.shape;
  const std::int64_t* p = sampling_locations.shape;
  return DeformWorkspace({v[0], v[1], v[2], v[3], p[1], p[3], p[4]}, value.dtype, deterministic).total;
}

}  // namespace visionllm
