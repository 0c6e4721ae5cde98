// Argument checks and dispatch of multi-scale deformable attention; the contract is in
// include/visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <vector>

#include "check.h"
#include "cpu/ms_deform_attn.h"
#include "dispatch.h"
#include "ms_deform_attn_cuda.h"
#include "parallel.h"

namespace visionllm {
namespace {

// Copying a head's rows together costs about as much as this many gathered rows per row copied.
constexpr std::int64_t kGathersPerCopy = 2;

// One thread per this many corner rows at least: about 100 us of work, five times what starting a thread
// costs.
constexpr std::int64_t kRowsPerThread = 100000;

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

// Per point: its level's size and first pixel, padded to whole chunks with a 1 x 1 level at 0.
struct LevelTable {
  std::vector<float> width, height;
  std::vector<std::int32_t> width_int, height_int, start;

  Status fill(const char* op, const TensorView& spatial_shapes, const TensorView& level_start_index,
              const Sizes& n) {
    const std::int64_t points = n.L * n.P;
    const std::int64_t padded = (points + cpu::kPointChunk - 1) / cpu::kPointChunk * cpu::kPointChunk;
    width.assign(padded, 1.0f), height.assign(padded, 1.0f);
    width_int.assign(padded, 1), height_int.assign(padded, 1), start.assign(padded, 0);
    const auto* shapes = static_cast<const std::int64_t*>(spatial_shapes.data);
    const auto* starts = static_cast<const std::int64_t*>(level_start_index.data);
    for (std::int64_t l = 0; l < n.L; ++l) {
      const std::int64_t h = shapes[2 * l], w = shapes[2 * l + 1], first = starts[l];
      if (!level_fits(h, w, first, n.S)) return bad_level(op, l, h, w, first, n.S);
      for (std::int64_t p = l * n.P; p < (l + 1) * n.P; ++p) {
        width[p] = static_cast<float>(w), height[p] = static_cast<float>(h);
        width_int[p] = static_cast<std::int32_t>(w), height_int[p] = static_cast<std::int32_t>(h);
        start[p] = static_cast<std::int32_t>(first);
      }
    }
    return {};
  }
};

cpu::Element element(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return cpu::Element::bfloat16;
    case DType::float16: return cpu::Element::float16;
    default: return cpu::Element::float32;
  }
}

cpu::MsDeformAttnParams make_params(const TensorView& value, const TensorView& locations,
                                    const TensorView& attention, const LevelTable& levels, const Sizes& n) {
  cpu::MsDeformAttnParams params{};
  params.batch = n.B, params.queries = n.Q, params.heads = n.H, params.channels = n.D, params.pixels = n.S;
  params.points = static_cast<std::int32_t>(n.L * n.P);
  params.padded_points = static_cast<std::int32_t>(levels.width.size());
  params.level_width = levels.width.data(), params.level_height = levels.height.data();
  params.level_width_int = levels.width_int.data(), params.level_height_int = levels.height_int.data();
  params.level_start = levels.start.data();
  params.element = element(value.dtype);
  params.value = value.data;
  params.value_stride_b = value.strides[0], params.value_stride_s = value.strides[1];
  params.value_stride_h = value.strides[2];
  params.locations = static_cast<const float*>(locations.data);
  params.locations_stride_b = locations.strides[0], params.locations_stride_q = locations.strides[1];
  params.locations_stride_h = locations.strides[2];
  params.attention_element = element(attention.dtype);
  params.attention = attention.data;
  params.attention_stride_b = attention.strides[0], params.attention_stride_q = attention.strides[1];
  params.attention_stride_h = attention.strides[2];
  return params;
}

struct Kernels {
  cpu::MsDeformAttnForward forward;
  cpu::MsDeformAttnBackward backward;
};

Status choose_kernels(Kernels* kernels) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  kernels->forward = VISIONLLM_KERNEL(isa, ms_deform_attn_kernel);
  kernels->backward = VISIONLLM_KERNEL(isa, ms_deform_attn_backward_kernel);
  return {};
}

void fill_zero(const TensorView& tensor) {  // contiguous
  if (tensor.size() > 0)
    std::memset(tensor.data, 0, static_cast<std::size_t>(tensor.size() * element_size(tensor.dtype)));
}

// Uninitialised memory, aligned to a cache line; parts(i) are `bytes` long each.
class Scratch {
 public:
  Scratch(std::int64_t bytes, int count) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ > 0)
      memory_ = ::operator new[](static_cast<std::size_t>(bytes_ * count), std::align_val_t{64});
  }
  ~Scratch() {
    if (memory_ != nullptr) ::operator delete[](memory_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* part(int i) const {
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<char*>(memory_) + i * bytes_);
  }

 private:
  std::int64_t bytes_;
  void* memory_ = nullptr;
};

bool copying_pays(const Sizes& n) { return n.H > 1 && 4 * n.Q * n.L * n.P >= kGathersPerCopy * n.S; }

int useful_threads(const Sizes& n, const Execution& execution) {
  const double rows = 4.0 * static_cast<double>(n.B) * n.Q * n.H * n.L * n.P * (n.D + 15) / 16;
  return static_cast<int>(std::clamp<double>(rows / kRowsPerThread, 1.0, std::max(execution.threads, 1)));
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

Status run_on_cpu(const char* op, const TensorView& output, const TensorView& value,
                  const TensorView& spatial_shapes, const TensorView& level_start_index,
                  const TensorView& sampling_locations, const TensorView& attention_weights, const Sizes& n,
                  const Execution& execution) {
  LevelTable levels;
  VISIONLLM_RETURN_IF_BAD(levels.fill(op, spatial_shapes, level_start_index, n));
  Kernels kernels;
  VISIONLLM_RETURN_IF_BAD(choose_kernels(&kernels));
  if (output.size() == 0) return {};
  if (n.L * n.P == 0) {
    fill_zero(output);
    return {};
  }

  cpu::MsDeformAttnParams params = make_params(value, sampling_locations, attention_weights, levels, n);
  params.output = output.data;
  params.output_stride_b = n.Q * n.H * n.D, params.output_stride_q = n.H * n.D;
  const int threads = useful_threads(n, execution);
  const Scratch workspace(cpu::ms_deform_attn_workspace_bytes(params), threads);
  const Scratch value_rows(copying_pays(n) ? (n.S + 1) * n.D * 4 : 0, threads);
  parallel_for(n.B * n.H * n.Q, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernels.forward(params, begin, end, workspace.part<void>(worker), value_rows.part<float>(worker));
  });
  return {};
}

Status run_backward_on_cpu(const char* op, const TensorView& grad_value,
                           const TensorView& grad_sampling_locations,
                           const TensorView& grad_attention_weights, const TensorView& grad_output,
                           const TensorView& value, const TensorView& spatial_shapes,
                           const TensorView& level_start_index, const TensorView& sampling_locations,
                           const TensorView& attention_weights, const Sizes& n, const Execution& execution) {
  LevelTable levels;
  VISIONLLM_RETURN_IF_BAD(levels.fill(op, spatial_shapes, level_start_index, n));
  Kernels kernels;
  VISIONLLM_RETURN_IF_BAD(choose_kernels(&kernels));
  if (grad_output.size() == 0 || n.L * n.P == 0) {
    fill_zero(grad_value);
    fill_zero(grad_sampling_locations);
    fill_zero(grad_attention_weights);
    return {};
  }

  cpu::MsDeformAttnParams params = make_params(value, sampling_locations, attention_weights, levels, n);
  params.grad_output = grad_output.data;
  params.grad_output_stride_b = grad_output.strides[0], params.grad_output_stride_q = grad_output.strides[1];
  params.grad_value = grad_value.data;
  params.grad_locations = static_cast<float*>(grad_sampling_locations.data);
  params.grad_attention = grad_attention_weights.data;
  // Low precision sums in float32, so it needs rows of its own in any case.
  const bool copying = copying_pays(n) || value.dtype != DType::float32;
  const int threads = static_cast<int>(std::min<std::int64_t>(useful_threads(n, execution), n.B * n.H));
  const Scratch workspace(cpu::ms_deform_attn_workspace_bytes(params), threads);
  const Scratch value_rows(copying ? (n.S + 1) * n.D * 4 : 0, threads);
  const Scratch grad_rows(copying ? (n.S + 1) * n.D * 4 : 0, threads);
  if (!copying) fill_zero(grad_value);  // all of it at once: four times as fast as head by head
  parallel_for(n.B * n.H, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernels.backward(params, begin, end, workspace.part<void>(worker), value_rows.part<float>(worker),
                     grad_rows.part<float>(worker));
  });
  return {};
}

// ---- CUDA -------------------------------------------------------------------------------------------------

Status check_reference(const char* op, const char* name, const TensorView& reference, const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, name, reference, "[B, Q, L, 2 or 4]", 4));
  const std::int64_t size = reference.shape[3] == 4 ? 4 : 2;
  VISIONLLM_RETURN_IF_BAD(check_shape(op, name, reference, "[B, Q, L, 2 or 4]", {n.B, n.Q, n.L, size}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, reference, DType::float32));
  return check_inner_contiguous(op, name, reference, 1);
}

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
  return run_on_cpu(op, output, value, spatial_shapes, level_start_index, sampling_locations,
                    attention_weights, n, execution);
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
  return run_backward_on_cpu(op, grad_value, grad_sampling_locations, grad_attention_weights, grad_output,
                             value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                             n, execution);
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
  if (device == Device::cpu) return no_cpu_kernel(op);
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
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
  if (device == Device::cpu) return no_cpu_kernel(op);
  VISIONLLM_RETURN_IF_BAD(check_level_device(op, spatial_shapes, level_start_index, device));
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
