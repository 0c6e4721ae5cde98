// Argument checks and dispatch of the slot head; the contract is in include/visionllm/slot_head.h.
#include "visionllm/slot_head.h"

#include <limits>

#include "../cuda/slot_head.h"
#include "check.h"

namespace visionllm {
namespace {

struct Sizes {
  std::int64_t B, G, S, C, V, R;
};

constexpr std::int64_t kAlignment = 16;  // bytes that the kernels move at a time

// Begins at a multiple of 16 bytes, and so does every vector of its last dimension.
Status check_vectors(const char* op, const char* name, const TensorView& tensor) {
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, name, tensor, 1));
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % kAlignment != 0)
    return bad_argument(op, std::string(name) + " must begin at a multiple of 16 bytes");
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    const std::int64_t bytes = tensor.strides[i] * element_size(tensor.dtype);
    if (tensor.size() != 0 && tensor.shape[i] != 1 && bytes % kAlignment != 0) {
      return bad_argument(op, std::string(name) + " must have strides of multiples of 16 bytes, got " +
                                  std::to_string(bytes) + " bytes in dimension " + std::to_string(i));
    }
  }
  return {};
}

// A contiguous float32 (or other) tensor over the slots.
Status check_slots(const char* op, const char* name, const TensorView& tensor, const Sizes& n, DType dtype) {
  VISIONLLM_RETURN_IF_BAD(check_shape(op, name, tensor, "[B, G, S]", {n.B, n.G, n.S}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, tensor, dtype));
  return check_contiguous(op, name, tensor);
}

Status check_inputs(const char* op, const TensorView& states, const TensorView& rows, const TensorView& valid,
                    const TensorView& norm_weight, Sizes* sizes) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "states", states, "[B, G, S, C]", 4));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "rows", rows, "[R, V, C]", 3));
  Sizes& n = *sizes;
  n.B = states.shape[0], n.G = states.shape[1], n.S = states.shape[2], n.C = states.shape[3];
  n.R = rows.shape[0], n.V = rows.shape[1];
  VISIONLLM_RETURN_IF_BAD(check_float(op, "states", states));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "rows", rows, states.dtype));
  if ((n.R != 1 && n.R != n.B) || n.V < 1 || rows.shape[2] != n.C) {
    return bad_argument(op, "rows must have shape [1 or B, V, C] = [1 or " + std::to_string(n.B) +
                                ", 1 or more, " + std::to_string(n.C) + "], got " + shape_text(rows));
  }
  if (n.V > kSlotHeadMaxRows)
    return bad_argument(op, "rows must be at most 65536, got V = " + std::to_string(n.V));
  if (n.C < 8 || n.C % 8 != 0)
    return bad_argument(op, "C must be a multiple of 8 and not 0, got " + std::to_string(n.C));
  VISIONLLM_RETURN_IF_BAD(check_vectors(op, "states", states));
  VISIONLLM_RETURN_IF_BAD(check_vectors(op, "rows", rows));
  if (!valid.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "valid", valid, "[B, V]", {n.B, n.V}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "valid", valid, DType::uint8));
    VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "valid", valid, 1));
  }
  if (!norm_weight.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "norm_weight", norm_weight, "[C]", {n.C}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "norm_weight", norm_weight, states.dtype));
    VISIONLLM_RETURN_IF_BAD(check_vectors(op, "norm_weight", norm_weight));
  }
  // Slots are numbered in 32 bits, and so are the blocks of every launch: tiles of 64 x 64.
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  const std::int64_t slots = n.B * n.G * n.S;
  if (slots > kLargest || (slots / 64 + n.B) * (n.V / 64 + 1) > kLargest ||
      (slots / 128 + n.B) * (n.C / 128 + 1) > kLargest ||
      n.B * (n.V / 128 + 1) * (n.C / 128 + 1) > kLargest) {
    return bad_argument(
        op, "too large for one call: states " + shape_text(states) + ", rows " + shape_text(rows));
  }
  return {};
}

Status check_target(const char* op, const TensorView& target, const TensorView& weight, double sigma,
                    const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(
      check_slots(op, "target", target, n, target.dtype == DType::float32 ? DType::float32 : DType::int64));
  if (target.dtype == DType::float32 && !(sigma > 0))
    return bad_argument(op, "sigma must be above 0 for a float32 target, got " + std::to_string(sigma));
  if (!weight.absent()) VISIONLLM_RETURN_IF_BAD(check_slots(op, "weight", weight, n, DType::float32));
  return {};
}

Status check_workspace(const char* op, const TensorView& workspace, SlotHeadCall call,
                       const TensorView& states, const TensorView& valid, const TensorView& norm_weight,
                       std::int64_t window, std::int64_t slots_at_once, const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[W]", 1));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "workspace", workspace, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_vectors(op, "workspace", workspace));
  const std::int64_t needed =
      slot_head_workspace_bytes(call, n.B, n.G, n.S, n.C, n.V, element_size(states.dtype), n.R == 1,
                                !valid.absent(), !norm_weight.absent(), window, slots_at_once);
  if (workspace.size() * 4 < needed) {
    return bad_argument(op, "workspace must have at least " + std::to_string(needed) + " bytes, got " +
                                std::to_string(workspace.size() * 4));
  }
  return {};
}

#ifdef VISIONLLM_HAVE_CUDA
cuda::SlotHeadInputs make_inputs(const TensorView& workspace, const TensorView& states,
                                 const TensorView& rows, const TensorView& valid,
                                 const TensorView& norm_weight, double epsilon, double scale,
                                 const Sizes& n) {
  cuda::SlotHeadInputs in{};
  in.dtype = states.dtype;
  in.B = n.B, in.G = n.G, in.S = n.S, in.C = n.C, in.V = n.V;
  in.shared_rows = n.R == 1;
  in.states = states.data;
  in.states_stride_b = states.strides[0], in.states_stride_g = states.strides[1];
  in.states_stride_s = states.strides[2];
  in.rows = rows.data, in.rows_stride_r = rows.strides[0], in.rows_stride_v = rows.strides[1];
  in.valid = static_cast<const std::uint8_t*>(valid.data);
  in.valid_stride_b = valid.absent() ? 0 : valid.strides[0];
  in.norm_weight = norm_weight.data;
  in.epsilon = static_cast<float>(epsilon), in.scale = static_cast<float>(scale);
  in.workspace = static_cast<unsigned char*>(workspace.data);
  return in;
}

cuda::SlotHeadTarget make_target(const TensorView& target, const TensorView& weight, double sigma) {
  cuda::SlotHeadTarget made{};
  if (target.dtype == DType::float32) {
    made.centre = static_cast<const float*>(target.data);
    made.inverse_variance = static_cast<float>(1 / (2 * sigma * sigma));
  } else {
    made.row = static_cast<const std::int64_t*>(target.data);
  }
  made.weight = static_cast<const float*>(weight.data);
  return made;
}
#endif

}  // namespace

std::int64_t slot_head_workspace_bytes(SlotHeadCall call, std::int64_t B, std::int64_t G, std::int64_t S,
                                       std::int64_t C, std::int64_t V, std::int64_t element_bytes,
                                       bool shared, bool masked, bool normed, std::int64_t window,
                                       std::int64_t slots_at_once) {
  if (B < 0 || G < 0 || S < 0 || C < 0 || V < 1 || V > kSlotHeadMaxRows || window > kSlotHeadMaxWindow)
    return -1;
  return cuda::slot_head_plan(call, B, G, S, C, V, element_bytes, shared, masked, normed, window,
                              slots_at_once)
      .bytes;
}

Status slot_head_predict(const TensorView& best, const TensorView& probability, const TensorView& logsumexp,
                         const TensorView& expectation, const TensorView& probabilities,
                         const TensorView& workspace, const TensorView& states, const TensorView& rows,
                         const TensorView& valid, const TensorView& norm_weight, double epsilon, double scale,
                         std::int64_t window, double offset, const Execution& execution) {
  constexpr const char* op = "slot_head_predict";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, states, rows, valid, norm_weight, &n));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "best", best, n, DType::int64));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "probability", probability, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  if (!expectation.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_slots(op, "expectation", expectation, n, DType::float32));
    if (window < 0 || window > kSlotHeadMaxWindow)
      return bad_argument(op, "window must be from 0 to 31, got " + std::to_string(window));
  }
  if (!probabilities.absent()) {
    VISIONLLM_RETURN_IF_BAD(
        check_shape(op, "probabilities", probabilities, "[B, G, S, V]", {n.B, n.G, n.S, n.V}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "probabilities", probabilities, DType::float32));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "probabilities", probabilities));
  }
  VISIONLLM_RETURN_IF_BAD(check_workspace(op, workspace, SlotHeadCall::predict, states, valid, norm_weight,
                                          expectation.absent() ? -1 : window, 0, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &states},
                                        {"rows", &rows},
                                        {"valid", &valid},
                                        {"norm_weight", &norm_weight},
                                        {"workspace", &workspace},
                                        {"best", &best},
                                        {"probability", &probability},
                                        {"logsumexp", &logsumexp},
                                        {"expectation", &expectation},
                                        {"probabilities", &probabilities}},
                                       &device));
  if (device == Device::cpu) return no_cpu_kernel(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadPredictParams params{};
  params.inputs = make_inputs(workspace, states, rows, valid, norm_weight, epsilon, scale, n);
  params.best = static_cast<std::int64_t*>(best.data);
  params.probability = static_cast<float*>(probability.data);
  params.logsumexp = static_cast<float*>(logsumexp.data);
  params.expectation = static_cast<float*>(expectation.data);
  params.probabilities = static_cast<float*>(probabilities.data);
  params.window = static_cast<int>(window), params.offset = static_cast<float>(offset);
  return cuda::slot_head_predict(params, execution.stream);
#else
  (void)epsilon, (void)scale, (void)offset, (void)execution;
  return no_cuda_kernels(op);
#endif
}

Status slot_head_cross_entropy(const TensorView& loss, const TensorView& logsumexp,
                               const TensorView& target_logsumexp, const TensorView& workspace,
                               const TensorView& states, const TensorView& rows, const TensorView& target,
                               const TensorView& weight, const TensorView& valid,
                               const TensorView& norm_weight, double epsilon, double scale, double sigma,
                               const Execution& execution) {
  constexpr const char* op = "slot_head_cross_entropy";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, states, rows, valid, norm_weight, &n));
  VISIONLLM_RETURN_IF_BAD(check_target(op, target, weight, sigma, n));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "loss", loss, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "target_logsumexp", target_logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(
      check_workspace(op, workspace, SlotHeadCall::cross_entropy, states, valid, norm_weight, -1, 0, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &states},
                                        {"rows", &rows},
                                        {"target", &target},
                                        {"weight", &weight},
                                        {"valid", &valid},
                                        {"norm_weight", &norm_weight},
                                        {"workspace", &workspace},
                                        {"loss", &loss},
                                        {"logsumexp", &logsumexp},
                                        {"target_logsumexp", &target_logsumexp}},
                                       &device));
  if (device == Device::cpu) return no_cpu_kernel(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadCrossEntropyParams params{};
  params.inputs = make_inputs(workspace, states, rows, valid, norm_weight, epsilon, scale, n);
  params.target = make_target(target, weight, sigma);
  params.loss = static_cast<float*>(loss.data);
  params.logsumexp = static_cast<float*>(logsumexp.data);
  params.target_logsumexp = static_cast<float*>(target_logsumexp.data);
  return cuda::slot_head_cross_entropy(params, execution.stream);
#else
  (void)epsilon, (void)scale, (void)execution;
  return no_cuda_kernels(op);
#endif
}

Status slot_head_cross_entropy_backward(
    const TensorView& grad_states, const TensorView& grad_rows, const TensorView& grad_norm_weight,
    const TensorView& workspace, const TensorView& grad_loss, const TensorView& states,
    const TensorView& rows, const TensorView& target, const TensorView& weight, const TensorView& valid,
    const TensorView& norm_weight, const TensorView& logsumexp, const TensorView& target_logsumexp,
    double epsilon, double scale, double sigma, std::int64_t slots_at_once, const Execution& execution) {
  constexpr const char* op = "slot_head_cross_entropy_backward";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, states, rows, valid, norm_weight, &n));
  VISIONLLM_RETURN_IF_BAD(check_target(op, target, weight, sigma, n));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "grad_loss", grad_loss, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "target_logsumexp", target_logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_states", grad_states, "[B, G, S, C]", {n.B, n.G, n.S, n.C}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_rows", grad_rows, "[R, V, C]", {n.R, n.V, n.C}));
  if (grad_norm_weight.absent() != norm_weight.absent())
    return bad_argument(op, "grad_norm_weight must be there exactly when norm_weight is");
  if (!norm_weight.absent())
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_norm_weight", grad_norm_weight, "[C]", {n.C}));
  const NamedTensor grads[] = {
      {"grad_states", &grad_states}, {"grad_rows", &grad_rows}, {"grad_norm_weight", &grad_norm_weight}};
  for (const NamedTensor& grad : grads) {
    if (grad.tensor->absent()) continue;
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, grad.name, *grad.tensor, states.dtype));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, grad.name, *grad.tensor));
    VISIONLLM_RETURN_IF_BAD(check_vectors(op, grad.name, *grad.tensor));
  }
  VISIONLLM_RETURN_IF_BAD(check_workspace(op, workspace, SlotHeadCall::backward, states, valid, norm_weight,
                                          -1, slots_at_once, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &states},
                                        {"rows", &rows},
                                        {"target", &target},
                                        {"weight", &weight},
                                        {"valid", &valid},
                                        {"norm_weight", &norm_weight},
                                        {"grad_loss", &grad_loss},
                                        {"logsumexp", &logsumexp},
                                        {"target_logsumexp", &target_logsumexp},
                                        {"workspace", &workspace},
                                        {"grad_states", &grad_states},
                                        {"grad_rows", &grad_rows},
                                        {"grad_norm_weight", &grad_norm_weight}},
                                       &device));
  if (device == Device::cpu) return no_cpu_kernel(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadBackwardParams params{};
  params.inputs = make_inputs(workspace, states, rows, valid, norm_weight, epsilon, scale, n);
  params.target = make_target(target, weight, sigma);
  params.grad_loss = static_cast<const float*>(grad_loss.data);
  params.logsumexp = static_cast<const float*>(logsumexp.data);
  params.target_logsumexp = static_cast<const float*>(target_logsumexp.data);
  params.grad_states = grad_states.data;
  params.grad_rows = grad_rows.data;
  params.grad_norm_weight = grad_norm_weight.data;
  params.slots_at_once = slots_at_once;
  return cuda::slot_head_cross_entropy_backward(params, execution.stream);
#else
  (void)epsilon, (void)scale, (void)execution;
  return no_cuda_kernels(op);
#endif
}

}  // namespace visionllm
