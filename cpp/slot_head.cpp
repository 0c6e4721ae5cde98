// Argument checks and dispatch of the slot head; the contract is in include/visionllm/slot_head.h.
#include "visionllm/slot_head.h"

#include <limits>

#include "../cuda/slot_head.h"
#include "check.h"
#include "slot_head_cpu.h"

namespace visionllm {
namespace {

using Sizes = SlotHeadSizes;

constexpr std::int64_t kAlignment = 16;  // bytes that the CUDA kernels move at a time

// On CUDA it begins at a multiple of 16 bytes, and so does every vector of its last dimension.
Status check_vectors(const char* op, const char* name, const TensorView& tensor) {
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, name, tensor, 1));
  if (tensor.device == Device::cpu) return {};
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

// What all calls have. row_scale is there with int8 rows, which the functions for them take.
struct Inputs {
  const TensorView& states;
  const TensorView& rows;
  const TensorView& row_scale;
  const TensorView& valid;
  const TensorView& norm_weight;
  double epsilon, scale;
  bool quantized;
};

Status check_row_scale(const char* op, const Inputs& in, const Sizes& n) {
  if (!in.quantized) return check_dtype(op, "rows", in.rows, in.states.dtype);
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "rows", in.rows, DType::int8));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "row_scale", in.row_scale, "[R, V]", {n.R, n.V}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "row_scale", in.row_scale, DType::float32));
  return check_inner_contiguous(op, "row_scale", in.row_scale, 1);
}

Status check_inputs(const char* op, const Inputs& in, Sizes* sizes) {
  const TensorView &states = in.states, &rows = in.rows, &valid = in.valid, &norm_weight = in.norm_weight;
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "states", states, "[B, G, S, C]", 4));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "rows", rows, "[R, V, C]", 3));
  Sizes& n = *sizes;
  n.B = states.shape[0], n.G = states.shape[1], n.S = states.shape[2], n.C = states.shape[3];
  n.R = rows.shape[0], n.V = rows.shape[1];
  VISIONLLM_RETURN_IF_BAD(check_float(op, "states", states));
  if ((n.R != 1 && n.R != n.B) || n.V < 1 || rows.shape[2] != n.C) {
    return bad_argument(op, "rows must have shape [1 or B, V, C] = [1 or " + std::to_string(n.B) +
                                ", 1 or more, " + std::to_string(n.C) + "], got " + shape_text(rows));
  }
  VISIONLLM_RETURN_IF_BAD(check_row_scale(op, in, n));
  const bool on_cpu = states.device == Device::cpu;
  const std::int64_t most = on_cpu ? kSlotHeadMaxRowsOnCpu : kSlotHeadMaxRows;
  if (n.V > most) {
    return bad_argument(op,
                        "rows must be at most " + std::to_string(most) + ", got V = " + std::to_string(n.V));
  }
  if (on_cpu && n.C < 1) return bad_argument(op, "C must be at least 1, got 0");
  if (!on_cpu && (n.C < 8 || n.C % 8 != 0))
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
  if (on_cpu) return {};
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

Status check_workspace(const char* op, const TensorView& workspace, SlotHeadCall call, const Inputs& in,
                       std::int64_t window, std::int64_t slots_at_once, const Sizes& n) {
  if (in.states.device == Device::cpu) return {};
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[W]", 1));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "workspace", workspace, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_vectors(op, "workspace", workspace));
  const std::int64_t needed =
      slot_head_workspace_bytes(call, n.B, n.G, n.S, n.C, n.V, element_size(in.states.dtype), n.R == 1,
                                !in.valid.absent(), !in.norm_weight.absent(), window, slots_at_once);
  if (workspace.size() * 4 < needed) {
    return bad_argument(op, "workspace must have at least " + std::to_string(needed) + " bytes, got " +
                                std::to_string(workspace.size() * 4));
  }
  return {};
}

cpu::SlotHeadParams cpu_params(const Inputs& in, const Sizes& n) {
  return slot_head_params(in.states, in.rows, in.row_scale, in.valid, in.norm_weight, in.epsilon, in.scale,
                          n);
}

// int8 rows have no CUDA kernels, nor has the loss with its gradients.
Status cpu_only(const char* op) {
  return Status::unsupported(std::string(op) + ": there are CPU kernels only");
}

#ifdef VISIONLLM_HAVE_CUDA
cuda::SlotHeadInputs make_inputs(const TensorView& workspace, const Inputs& given, const Sizes& n) {
  const TensorView &states = given.states, &rows = given.rows, &valid = given.valid;
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
  in.norm_weight = given.norm_weight.data;
  in.epsilon = static_cast<float>(given.epsilon), in.scale = static_cast<float>(given.scale);
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

Status predict(const char* op, const TensorView& best, const TensorView& probability,
               const TensorView& logsumexp, const TensorView& expectation, const TensorView& probabilities,
               const TensorView& workspace, const Inputs& in, std::int64_t window, double offset,
               const Execution& execution) {
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, in, &n));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "best", best, n, DType::int64));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "probability", probability, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  if (!expectation.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_slots(op, "expectation", expectation, n, DType::float32));
    if (window < 0) return bad_argument(op, "window must be at least 0, got " + std::to_string(window));
    if (window > kSlotHeadMaxWindow && in.states.device != Device::cpu)
      return bad_argument(op, "window must be from 0 to 31, got " + std::to_string(window));
  }
  if (!probabilities.absent()) {
    VISIONLLM_RETURN_IF_BAD(
        check_shape(op, "probabilities", probabilities, "[B, G, S, V]", {n.B, n.G, n.S, n.V}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "probabilities", probabilities, DType::float32));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "probabilities", probabilities));
  }
  VISIONLLM_RETURN_IF_BAD(
      check_workspace(op, workspace, SlotHeadCall::predict, in, expectation.absent() ? -1 : window, 0, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &in.states},
                                        {"rows", &in.rows},
                                        {"row_scale", &in.row_scale},
                                        {"valid", &in.valid},
                                        {"norm_weight", &in.norm_weight},
                                        {"workspace", &workspace},
                                        {"best", &best},
                                        {"probability", &probability},
                                        {"logsumexp", &logsumexp},
                                        {"expectation", &expectation},
                                        {"probabilities", &probabilities}},
                                       &device));
  if (device == Device::cpu) {
    Isa isa;
    VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
    cpu::SlotHeadParams params = cpu_params(in, n);
    params.best = static_cast<std::int64_t*>(best.data);
    params.probability = static_cast<float*>(probability.data);
    params.logsumexp = static_cast<float*>(logsumexp.data);
    params.expectation = static_cast<float*>(expectation.data);
    params.probabilities = static_cast<float*>(probabilities.data);
    params.window = window, params.offset = static_cast<float>(offset);
    return slot_head_forward_on_cpu(VISIONLLM_KERNEL(isa, slot_head_predict_kernel), params, execution);
  }
  if (in.quantized) return cpu_only(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadPredictParams params{};
  params.inputs = make_inputs(workspace, in, n);
  params.best = static_cast<std::int64_t*>(best.data);
  params.probability = static_cast<float*>(probability.data);
  params.logsumexp = static_cast<float*>(logsumexp.data);
  params.expectation = static_cast<float*>(expectation.data);
  params.probabilities = static_cast<float*>(probabilities.data);
  params.window = static_cast<int>(window), params.offset = static_cast<float>(offset);
  return cuda::slot_head_predict(params, execution.stream);
#else
  return no_cuda_kernels(op);
#endif
}

Status cross_entropy(const char* op, const TensorView& loss, const TensorView& logsumexp,
                     const TensorView& target_logsumexp, const TensorView& workspace, const Inputs& in,
                     const TensorView& target, const TensorView& weight, double sigma,
                     const Execution& execution) {
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, in, &n));
  VISIONLLM_RETURN_IF_BAD(check_target(op, target, weight, sigma, n));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "loss", loss, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "target_logsumexp", target_logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_workspace(op, workspace, SlotHeadCall::cross_entropy, in, -1, 0, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &in.states},
                                        {"rows", &in.rows},
                                        {"row_scale", &in.row_scale},
                                        {"target", &target},
                                        {"weight", &weight},
                                        {"valid", &in.valid},
                                        {"norm_weight", &in.norm_weight},
                                        {"workspace", &workspace},
                                        {"loss", &loss},
                                        {"logsumexp", &logsumexp},
                                        {"target_logsumexp", &target_logsumexp}},
                                       &device));
  if (device == Device::cpu) {
    Isa isa;
    VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
    cpu::SlotHeadParams params = cpu_params(in, n);
    slot_head_target(target, weight, sigma, &params);
    params.loss = static_cast<float*>(loss.data);
    params.logsumexp = static_cast<float*>(logsumexp.data);
    params.target_logsumexp = static_cast<float*>(target_logsumexp.data);
    return slot_head_forward_on_cpu(VISIONLLM_KERNEL(isa, slot_head_cross_entropy_kernel), params, execution);
  }
  if (in.quantized) return cpu_only(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadCrossEntropyParams params{};
  params.inputs = make_inputs(workspace, in, n);
  params.target = make_target(target, weight, sigma);
  params.loss = static_cast<float*>(loss.data);
  params.logsumexp = static_cast<float*>(logsumexp.data);
  params.target_logsumexp = static_cast<float*>(target_logsumexp.data);
  return cuda::slot_head_cross_entropy(params, execution.stream);
#else
  return no_cuda_kernels(op);
#endif
}

// With `loss` it is the forward too: then grad_loss is absent, and stands for 1.
Status backward(const char* op, const TensorView& loss, const TensorView& grad_states,
                const TensorView& grad_rows, const TensorView& grad_norm_weight, const TensorView& workspace,
                const TensorView& grad_loss, const Inputs& in, const TensorView& target,
                const TensorView& weight, const TensorView& logsumexp, const TensorView& target_logsumexp,
                double sigma, std::int64_t slots_at_once, const Execution& execution) {
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, in, &n));
  VISIONLLM_RETURN_IF_BAD(check_target(op, target, weight, sigma, n));
  const bool fused = !loss.absent();
  const char* name = fused ? "loss" : "grad_loss";
  VISIONLLM_RETURN_IF_BAD(check_slots(op, name, fused ? loss : grad_loss, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "logsumexp", logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_slots(op, "target_logsumexp", target_logsumexp, n, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_states", grad_states, "[B, G, S, C]", {n.B, n.G, n.S, n.C}));
  if (!in.quantized)
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_rows", grad_rows, "[R, V, C]", {n.R, n.V, n.C}));
  if (grad_norm_weight.absent() != in.norm_weight.absent())
    return bad_argument(op, "grad_norm_weight must be there exactly when norm_weight is");
  if (!in.norm_weight.absent())
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_norm_weight", grad_norm_weight, "[C]", {n.C}));
  const NamedTensor grads[] = {
      {"grad_states", &grad_states}, {"grad_rows", &grad_rows}, {"grad_norm_weight", &grad_norm_weight}};
  for (const NamedTensor& grad : grads) {
    if (grad.tensor->absent()) continue;
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, grad.name, *grad.tensor, in.states.dtype));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, grad.name, *grad.tensor));
    VISIONLLM_RETURN_IF_BAD(check_vectors(op, grad.name, *grad.tensor));
  }
  VISIONLLM_RETURN_IF_BAD(check_workspace(op, workspace, SlotHeadCall::backward, in, -1, slots_at_once, n));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"states", &in.states},
                                        {"rows", &in.rows},
                                        {"row_scale", &in.row_scale},
                                        {"target", &target},
                                        {"weight", &weight},
                                        {"valid", &in.valid},
                                        {"norm_weight", &in.norm_weight},
                                        {"loss", &loss},
                                        {"grad_loss", &grad_loss},
                                        {"logsumexp", &logsumexp},
                                        {"target_logsumexp", &target_logsumexp},
                                        {"workspace", &workspace},
                                        {"grad_states", &grad_states},
                                        {"grad_rows", &grad_rows},
                                        {"grad_norm_weight", &grad_norm_weight}},
                                       &device));
  if (device == Device::cpu) {
    cpu::SlotHeadParams params = cpu_params(in, n);
    slot_head_target(target, weight, sigma, &params);
    params.loss = static_cast<float*>(loss.data);
    params.grad_loss = static_cast<const float*>(grad_loss.data);
    params.logsumexp = static_cast<float*>(logsumexp.data);
    params.target_logsumexp = static_cast<float*>(target_logsumexp.data);
    return slot_head_backward_on_cpu(grad_states, grad_rows, grad_norm_weight, slots_at_once, params,
                                     execution);
  }
  if (in.quantized || fused) return cpu_only(op);
#ifdef VISIONLLM_HAVE_CUDA
  cuda::SlotHeadBackwardParams params{};
  params.inputs = make_inputs(workspace, in, n);
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
  return no_cuda_kernels(op);
#endif
}

const TensorView kAbsent;

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
  const Inputs in{states, rows, kAbsent, valid, norm_weight, epsilon, scale, false};
  return predict("slot_head_predict", best, probability, logsumexp, expectation, probabilities, workspace, in,
                 window, offset, execution);
}

Status slot_head_predict_int8(const TensorView& best, const TensorView& probability,
                              const TensorView& logsumexp, const TensorView& expectation,
                              const TensorView& probabilities, const TensorView& states,
                              const TensorView& rows, const TensorView& row_scale, const TensorView& valid,
                              const TensorView& norm_weight, double epsilon, double scale,
                              std::int64_t window, double offset, const Execution& execution) {
  const Inputs in{states, rows, row_scale, valid, norm_weight, epsilon, scale, true};
  return predict("slot_head_predict_int8", best, probability, logsumexp, expectation, probabilities, kAbsent,
                 in, window, offset, execution);
}

Status slot_head_cross_entropy(const TensorView& loss, const TensorView& logsumexp,
                               const TensorView& target_logsumexp, const TensorView& workspace,
                               const TensorView& states, const TensorView& rows, const TensorView& target,
                               const TensorView& weight, const TensorView& valid,
                               const TensorView& norm_weight, double epsilon, double scale, double sigma,
                               const Execution& execution) {
  const Inputs in{states, rows, kAbsent, valid, norm_weight, epsilon, scale, false};
  return cross_entropy("slot_head_cross_entropy", loss, logsumexp, target_logsumexp, workspace, in, target,
                       weight, sigma, execution);
}

Status slot_head_cross_entropy_int8(const TensorView& loss, const TensorView& logsumexp,
                                    const TensorView& target_logsumexp, const TensorView& states,
                                    const TensorView& rows, const TensorView& row_scale,
                                    const TensorView& target, const TensorView& weight,
                                    const TensorView& valid, const TensorView& norm_weight, double epsilon,
                                    double scale, double sigma, const Execution& execution) {
  const Inputs in{states, rows, row_scale, valid, norm_weight, epsilon, scale, true};
  return cross_entropy("slot_head_cross_entropy_int8", loss, logsumexp, target_logsumexp, kAbsent, in, target,
                       weight, sigma, execution);
}

Status slot_head_cross_entropy_backward(
    const TensorView& grad_states, const TensorView& grad_rows, const TensorView& grad_norm_weight,
    const TensorView& workspace, const TensorView& grad_loss, const TensorView& states,
    const TensorView& rows, const TensorView& target, const TensorView& weight, const TensorView& valid,
    const TensorView& norm_weight, const TensorView& logsumexp, const TensorView& target_logsumexp,
    double epsilon, double scale, double sigma, std::int64_t slots_at_once, const Execution& execution) {
  const Inputs in{states, rows, kAbsent, valid, norm_weight, epsilon, scale, false};
  return backward("slot_head_cross_entropy_backward", kAbsent, grad_states, grad_rows, grad_norm_weight,
                  workspace, grad_loss, in, target, weight, logsumexp, target_logsumexp, sigma, slots_at_once,
                  execution);
}

Status slot_head_cross_entropy_int8_backward(
    const TensorView& grad_states, const TensorView& grad_norm_weight, const TensorView& grad_loss,
    const TensorView& states, const TensorView& rows, const TensorView& row_scale, const TensorView& target,
    const TensorView& weight, const TensorView& valid, const TensorView& norm_weight,
    const TensorView& logsumexp, const TensorView& target_logsumexp, double epsilon, double scale,
    double sigma, std::int64_t slots_at_once, const Execution& execution) {
  const Inputs in{states, rows, row_scale, valid, norm_weight, epsilon, scale, true};
  return backward("slot_head_cross_entropy_int8_backward", kAbsent, grad_states, kAbsent, grad_norm_weight,
                  kAbsent, grad_loss, in, target, weight, logsumexp, target_logsumexp, sigma, slots_at_once,
                  execution);
}

Status slot_head_cross_entropy_sum(const TensorView& loss, const TensorView& logsumexp,
                                   const TensorView& target_logsumexp, const TensorView& grad_states,
                                   const TensorView& grad_rows, const TensorView& grad_norm_weight,
                                   const TensorView& states, const TensorView& rows, const TensorView& target,
                                   const TensorView& weight, const TensorView& valid,
                                   const TensorView& norm_weight, double epsilon, double scale, double sigma,
                                   std::int64_t slots_at_once, const Execution& execution) {
  const Inputs in{states, rows, kAbsent, valid, norm_weight, epsilon, scale, false};
  return backward("slot_head_cross_entropy_sum", loss, grad_states, grad_rows, grad_norm_weight, kAbsent,
                  kAbsent, in, target, weight, logsumexp, target_logsumexp, sigma, slots_at_once, execution);
}

}  // namespace visionllm
