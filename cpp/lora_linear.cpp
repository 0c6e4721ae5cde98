// Argument checks and dispatch of the linear layer with low-rank adapters; the contract is in
// include/visionllm/lora_linear.h.
#include "visionllm/lora_linear.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../cuda/lora_linear.h"
#include "../cuda/lora_linear_plan.h"
#include "check.h"
#include "cpu/lora_linear.h"
#include "dispatch.h"
#include "element_of.h"
#include "parallel.h"
#include "scratch.h"

namespace visionllm {
namespace {

struct Sizes {
  std::int64_t T, K, N, E, R;
};

std::string text_of(const TensorView& tensor) {
  return tensor.absent() ? "none" : std::string(dtype_name(tensor.dtype)) + " " + shape_text(tensor);
}

// Checks the inputs that forward and backward share. x is the forward's x or, where the backward goes without
// it, absent.
Status check_inputs(const char* op, DType dtype, std::int64_t T, std::int64_t K, const TensorView& weight,
                    const TensorView& weight_scale, const TensorView& lora_a, const TensorView& lora_b,
                    const TensorView& scale, const TensorView& adapter_index, Sizes* sizes) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "weight", weight, "[N, K]", 2));
  Sizes& n = *sizes;
  n.T = T, n.K = K, n.N = weight.shape[0];
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "weight", weight, "[N, K]", {n.N, n.K}));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "weight", weight, 1));
  if (weight.dtype == DType::int8) {
    if (weight_scale.absent()) {
      return bad_argument(op, "weight_scale must be given with an int8 weight, got none");
    }
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "weight_scale", weight_scale, "[N]", {n.N}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "weight_scale", weight_scale, DType::float32));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "weight_scale", weight_scale));
  } else if (!weight_scale.absent()) {
    return bad_argument(
        op, std::string("weight_scale must be absent unless weight is int8, got weight of type ") +
                dtype_name(weight.dtype));
  } else {
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "weight", weight, dtype));
  }
  if (lora_a.absent() != lora_b.absent()) {
    return bad_argument(op, "lora_a and lora_b must be given together, got one of them");
  }
  if (lora_a.absent()) {
    n.E = n.R = 0;
    for (const auto& [name, tensor] :
         {NamedTensor{"scale", &scale}, NamedTensor{"adapter_index", &adapter_index}}) {
      if (!tensor->absent()) {
        return bad_argument(
            op, std::string(name) + " must be absent without adapters, got " + shape_text(*tensor));
      }
    }
  } else {
    VISIONLLM_RETURN_IF_BAD(check_rank(op, "lora_a", lora_a, "[E, R, K]", 3));
    n.E = lora_a.shape[0], n.R = lora_a.shape[1];
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "lora_a", lora_a, "[E, R, K]", {n.E, n.R, n.K}));
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "lora_b", lora_b, "[E, N, R]", {n.E, n.N, n.R}));
    for (const auto& [name, tensor] : {NamedTensor{"lora_a", &lora_a}, NamedTensor{"lora_b", &lora_b}}) {
      VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, *tensor, dtype));
      VISIONLLM_RETURN_IF_BAD(check_contiguous(op, name, *tensor));
    }
    if (n.R < 1 || n.R > kLoraLinearMaxRank) {
      return bad_argument(op, "the rank R must be 1 to " + std::to_string(kLoraLinearMaxRank) + ", got " +
                                  std::to_string(n.R));
    }
    if (!scale.absent()) {
      VISIONLLM_RETURN_IF_BAD(check_shape(op, "scale", scale, "[E]", {n.E}));
      VISIONLLM_RETURN_IF_BAD(check_dtype(op, "scale", scale, DType::float32));
      VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "scale", scale));
    }
    if (!adapter_index.absent()) {
      VISIONLLM_RETURN_IF_BAD(check_shape(op, "adapter_index", adapter_index, "[T]", {n.T}));
      VISIONLLM_RETURN_IF_BAD(check_dtype(op, "adapter_index", adapter_index, DType::int64));
      VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "adapter_index", adapter_index));
    } else if (n.E == 0) {
      return bad_argument(op, "lora_a must have at least one adapter without adapter_index, got none");
    }
    // One of the grid's small dimensions.
    if (n.E > 65535) return bad_argument(op, "at most 65535 adapters, got " + std::to_string(n.E));
  }
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (n.T > kLargest || n.K > kLargest || n.N > kLargest) {
    return bad_argument(op, "T, K and N must be at most 2^31 - 1, got " + list_text({n.T, n.K, n.N}));
  }
  return {};
}

Status check_workspace(const char* op, const TensorView& workspace, std::int64_t bytes) {
  if (bytes == 0) return {};
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "workspace", workspace, DType::uint8));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[bytes]", 1));
  VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "workspace", workspace));
  if (workspace.shape[0] < bytes || reinterpret_cast<std::uintptr_t>(workspace.data) % 16 != 0) {
    return bad_argument(op, "workspace must have at least " + std::to_string(bytes) +
                                " bytes, aligned to 16, got " + std::to_string(workspace.shape[0]));
  }
  return {};
}

Status check_rows(const char* op, const char* name, const TensorView& tensor, const char* letters,
                  std::initializer_list<std::int64_t> shape, DType dtype) {
  VISIONLLM_RETURN_IF_BAD(check_shape(op, name, tensor, letters, shape));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, tensor, dtype));
  return check_inner_contiguous(op, name, tensor, 1);
}

Status check_low_rank(const char* op, const TensorView& low_rank, const Sizes& n) {
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "low_rank", low_rank, "[T, R]", {n.T, n.R}));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "low_rank", low_rank, DType::float32));
  return check_contiguous(op, "low_rank", low_rank);
}

// ---- on the CPU -------------------------------------------------------------------------------------------

// Products of two numbers that are worth a thread: about 40 us of them.
constexpr double kProductsPerThread = 2e6;

// Columns are shared out to threads in groups: a vector of every instruction set.
constexpr std::int64_t kColumnGroup = 16;

// The positions of rows in the order of their adapters.
class RowOrder {
 public:
  RowOrder(const std::int64_t* index, const Sizes& n) : segments_(static_cast<std::size_t>(n.E) + 1) {
    if (index == nullptr) {
      std::fill(segments_.begin() + 1, segments_.end(), n.T);  // all take adapter 0
      return;
    }
    const auto adapter = [&](std::int64_t row) {
      return index[row] >= 0 && index[row] < n.E ? index[row] : n.E;
    };
    std::vector<std::int64_t> next(static_cast<std::size_t>(n.E) + 2);
    for (std::int64_t row = 0; row < n.T; ++row) ++next[adapter(row) + 1];
    for (std::int64_t e = 0; e <= n.E; ++e) next[e + 1] += next[e];
    std::copy(next.begin(), next.end() - 1, segments_.begin());
    order_.resize(static_cast<std::size_t>(n.T));
    bool sorted = true;
    for (std::int64_t row = 0; row < n.T; ++row) {
      const std::int64_t position = next[adapter(row)]++;
      order_[position] = row;
      sorted = sorted && position == row;
    }
    if (sorted) order_.clear();
  }

  cpu::LoraRows rows() const { return {order_.empty() ? nullptr : order_.data(), segments_.data()}; }

 private:
  std::vector<std::int64_t> order_;     // empty: as they are
  std::vector<std::int64_t> segments_;  // [E + 1] first position of each adapter and of the rows without
};

// What forward and backward share; `factors` [E] is filled.
cpu::LoraLinearParams cpu_params(const TensorView& weight, const TensorView& weight_scale,
                                 const TensorView& lora_a, const TensorView& lora_b, const TensorView& scale,
                                 const TensorView& adapter_index, double scaling, DType dtype, const Sizes& n,
                                 std::vector<float>* factors) {
  cpu::LoraLinearParams p{};
  p.T = n.T, p.K = n.K, p.N = n.N, p.E = n.E, p.R = n.R;
  p.element = element_of(dtype), p.int8 = weight.dtype == DType::int8;
  p.weight = weight.data, p.weight_stride = weight.strides[0];
  p.weight_scale = static_cast<const float*>(weight_scale.data);
  p.a = lora_a.data, p.b = lora_b.data;
  p.index = static_cast<const std::int64_t*>(adapter_index.data);
  const auto* scales = static_cast<const float*>(scale.data);
  factors->assign(static_cast<std::size_t>(n.E), static_cast<float>(scaling));
  for (std::int64_t e = 0; scales != nullptr && e < n.E; ++e) (*factors)[e] *= scales[e];
  p.factor = factors->data();
  return p;
}

// Runs kernels of one call, each over its items on as many threads as its products are worth.
class Runner {
 public:
  Runner(const cpu::LoraLinearParams& params, const Execution& execution)
      : params_(params),
        most_(std::max(execution.threads, 1)),
        workspace_(cpu::lora_linear_workspace(params),
                   threads(static_cast<double>(params.N) * static_cast<double>(params.K))) {}

  // One item is `group` of `count` positions or columns.
  void operator()(cpu::LoraLinearKernel kernel, std::int64_t count, std::int64_t group,
                  double products) const {
    const std::int64_t items = (count + group - 1) / group;
    parallel_for(items, threads(products), [&](std::int64_t begin, std::int64_t end, int worker) {
      kernel(params_, begin * group, std::min(end * group, count), workspace_.part<void>(worker));
    });
  }

 private:
  // A product of one row costs more than one of many, for which the weights are read once.
  int threads(double products_per_row) const {
    const double products = products_per_row * static_cast<double>(std::max<std::int64_t>(params_.T, 8));
    return static_cast<int>(std::clamp(products / kProductsPerThread, 1.0, static_cast<double>(most_)));
  }

  const cpu::LoraLinearParams& params_;
  int most_;
  Scratch workspace_;
};

Status run_on_cpu(cpu::LoraLinearParams& p, const Sizes& n, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  if (n.T == 0) return {};
  const bool blocks = n.T > cpu::kLoraStreamRows;
  const RowOrder order(blocks ? p.index : nullptr, n);
  p.rows = order.rows();
  const Runner run(p, execution);
  const double R = static_cast<double>(n.R), K = static_cast<double>(n.K), N = static_cast<double>(n.N);
  if (n.R > 0) run(VISIONLLM_KERNEL(isa, lora_low_rank_kernel), n.T, 1, R * K);
  run(VISIONLLM_KERNEL(isa, lora_columns_kernel), n.N, kColumnGroup, K * N);
  return {};
}

Status run_backward_on_cpu(cpu::LoraLinearParams& p, const Sizes& n, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  const RowOrder order(p.index, n);
  p.rows = order.rows();
  const Scratch grad_low_rank(n.T * n.R * 4);
  p.grad_low_rank = grad_low_rank.part<float>();
  const Runner run(p, execution);
  const double R = static_cast<double>(n.R), K = static_cast<double>(n.K), N = static_cast<double>(n.N);
  if (n.R > 0 && n.T > 0 && (p.grad_x != nullptr || p.grad_a != nullptr))
    run(VISIONLLM_KERNEL(isa, lora_grad_low_rank_kernel), n.T, 1, R * N);
  if (p.grad_x != nullptr && n.T > 0)
    run(VISIONLLM_KERNEL(isa, lora_grad_x_kernel), n.K, kColumnGroup, K * N);
  if (p.grad_a != nullptr) run(VISIONLLM_KERNEL(isa, lora_grad_a_kernel), n.K, kColumnGroup, R * K);
  if (p.grad_b != nullptr) run(VISIONLLM_KERNEL(isa, lora_grad_b_kernel), n.N, kColumnGroup, R * N);
  return {};
}

#ifdef VISIONLLM_HAVE_CUDA
cuda::LoraAdapters adapters_of(const TensorView& lora_a, const TensorView& lora_b, const TensorView& scale,
                               const TensorView& adapter_index, double scaling, const Sizes& n) {
  cuda::LoraAdapters adapters{};
  adapters.a = lora_a.data, adapters.b = lora_b.data;
  adapters.scale = static_cast<const float*>(scale.data);
  adapters.index = static_cast<const std::int64_t*>(adapter_index.data);
  adapters.scaling = static_cast<float>(scaling);
  adapters.count = static_cast<int>(n.E), adapters.rank = static_cast<int>(n.R);
  return adapters;
}
#endif

}  // namespace

std::int64_t lora_linear_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R,
                                         DType x) {
  return cuda::forward_workspace(T, K, N, R, x == DType::float32).bytes;
}

std::int64_t lora_linear_backward_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t N,
                                                  std::int64_t R, DType x) {
  return cuda::backward_workspace(T, K, N, R, x == DType::float32).bytes;
}

Status lora_linear(const TensorView& output, const TensorView& low_rank, const TensorView& workspace,
                   const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
                   const TensorView& bias, const TensorView& lora_a, const TensorView& lora_b,
                   const TensorView& scale, const TensorView& adapter_index, double scaling,
                   const Execution& execution) {
  constexpr const char* op = "lora_linear";
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "x", x, "[T, K]", 2));
  VISIONLLM_RETURN_IF_BAD(check_float(op, "x", x));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, "x", x, 1));
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, x.dtype, x.shape[0], x.shape[1], weight, weight_scale, lora_a,
                                       lora_b, scale, adapter_index, &n));
  VISIONLLM_RETURN_IF_BAD(check_rows(op, "output", output, "[T, N]", {n.T, n.N}, x.dtype));
  if (!bias.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "bias", bias, "[N]", {n.N}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "bias", bias, x.dtype));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "bias", bias));
  }
  if (n.R > 0) {
    VISIONLLM_RETURN_IF_BAD(check_low_rank(op, low_rank, n));
  } else if (!low_rank.absent()) {
    return bad_argument(op, "low_rank must be absent without adapters, got " + text_of(low_rank));
  }
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"x", &x},
                                        {"output", &output},
                                        {"low_rank", &low_rank},
                                        {"workspace", &workspace},
                                        {"weight", &weight},
                                        {"weight_scale", &weight_scale},
                                        {"bias", &bias},
                                        {"lora_a", &lora_a},
                                        {"lora_b", &lora_b},
                                        {"scale", &scale},
                                        {"adapter_index", &adapter_index}},
                                       &device));
  if (device == Device::cpu) {
    std::vector<float> factors;
    cpu::LoraLinearParams params =
        cpu_params(weight, weight_scale, lora_a, lora_b, scale, adapter_index, scaling, x.dtype, n, &factors);
    params.x = x.data, params.x_stride = x.strides[0];
    params.bias = bias.data;
    params.low_rank = static_cast<float*>(low_rank.data);
    params.output = output.data, params.output_stride = output.strides[0];
    return run_on_cpu(params, n, execution);
  }
  VISIONLLM_RETURN_IF_BAD(
      check_workspace(op, workspace, lora_linear_workspace_bytes(n.T, n.K, n.N, n.R, x.dtype)));
#ifdef VISIONLLM_HAVE_CUDA
  cuda::LoraLinearParams params{};
  params.dtype = x.dtype, params.int8 = weight.dtype == DType::int8;
  params.T = n.T, params.K = n.K, params.N = n.N;
  params.output = output.data, params.output_stride = output.strides[0];
  params.low_rank = static_cast<float*>(low_rank.data);
  params.workspace = workspace.data;
  params.x = x.data, params.x_stride = x.strides[0];
  params.weight = weight.data, params.weight_stride = weight.strides[0];
  params.weight_scale = static_cast<const float*>(weight_scale.data);
  params.bias = bias.data;
  params.adapters = adapters_of(lora_a, lora_b, scale, adapter_index, scaling, n);
  return cuda::lora_linear(params, execution.stream);
#else
  (void)execution;
  return no_cuda_kernels(op);
#endif
}

Status lora_linear_backward(const TensorView& grad_x, const TensorView& grad_a, const TensorView& grad_b,
                            const TensorView& workspace, const TensorView& grad_output, const TensorView& x,
                            const TensorView& weight, const TensorView& weight_scale,
                            const TensorView& lora_a, const TensorView& lora_b, const TensorView& scale,
                            const TensorView& adapter_index, const TensorView& low_rank, double scaling,
                            const Execution& execution) {
  constexpr const char* op = "lora_linear_backward";
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "grad_output", grad_output, "[T, N]", 2));
  VISIONLLM_RETURN_IF_BAD(check_float(op, "grad_output", grad_output));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "weight", weight, "[N, K]", 2));
  const DType dtype = grad_output.dtype;
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, dtype, grad_output.shape[0], weight.shape[1], weight, weight_scale,
                                       lora_a, lora_b, scale, adapter_index, &n));
  VISIONLLM_RETURN_IF_BAD(check_rows(op, "grad_output", grad_output, "[T, N]", {n.T, n.N}, dtype));
  if (!grad_x.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_rows(op, "grad_x", grad_x, "[T, K]", {n.T, n.K}, dtype));
  }
  for (const auto& [name, tensor] : {NamedTensor{"grad_a", &grad_a}, NamedTensor{"grad_b", &grad_b}}) {
    if (n.R == 0 && !tensor->absent()) {
      return bad_argument(op,
                          std::string(name) + " must be absent without adapters, got " + text_of(*tensor));
    }
  }
  if (!grad_a.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_a", grad_a, "[E, R, K]", {n.E, n.R, n.K}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_a", grad_a, dtype));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "grad_a", grad_a));
    VISIONLLM_RETURN_IF_BAD(check_rows(op, "x", x, "[T, K]", {n.T, n.K}, dtype));
  }
  if (!grad_b.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_b", grad_b, "[E, N, R]", {n.E, n.N, n.R}));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_b", grad_b, dtype));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "grad_b", grad_b));
    VISIONLLM_RETURN_IF_BAD(check_low_rank(op, low_rank, n));
  }
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"grad_output", &grad_output},
                                        {"grad_x", &grad_x},
                                        {"grad_a", &grad_a},
                                        {"grad_b", &grad_b},
                                        {"workspace", &workspace},
                                        {"x", &x},
                                        {"weight", &weight},
                                        {"weight_scale", &weight_scale},
                                        {"lora_a", &lora_a},
                                        {"lora_b", &lora_b},
                                        {"scale", &scale},
                                        {"adapter_index", &adapter_index},
                                        {"low_rank", &low_rank}},
                                       &device));
  if (device == Device::cpu) {
    std::vector<float> factors;
    cpu::LoraLinearParams params =
        cpu_params(weight, weight_scale, lora_a, lora_b, scale, adapter_index, scaling, dtype, n, &factors);
    params.grad_x = grad_x.data, params.grad_x_stride = grad_x.absent() ? 0 : grad_x.strides[0];
    params.grad_a = grad_a.data, params.grad_b = grad_b.data;
    params.grad_output = grad_output.data, params.grad_output_stride = grad_output.strides[0];
    params.x = x.data, params.x_stride = x.absent() ? 0 : x.strides[0];
    params.low_rank = static_cast<float*>(low_rank.data);
    return run_backward_on_cpu(params, n, execution);
  }
  VISIONLLM_RETURN_IF_BAD(
      check_workspace(op, workspace, lora_linear_backward_workspace_bytes(n.T, n.K, n.N, n.R, dtype)));
#ifdef VISIONLLM_HAVE_CUDA
  cuda::LoraLinearBackwardParams params{};
  params.dtype = dtype, params.int8 = weight.dtype == DType::int8;
  params.T = n.T, params.K = n.K, params.N = n.N;
  params.grad_x = grad_x.data, params.grad_x_stride = grad_x.strides[0];
  params.grad_a = grad_a.data, params.grad_b = grad_b.data;
  params.workspace = workspace.data;
  params.grad_output = grad_output.data, params.grad_output_stride = grad_output.strides[0];
  params.x = x.data, params.x_stride = x.strides[0];
  params.weight = weight.data, params.weight_stride = weight.strides[0];
  params.weight_scale = static_cast<const float*>(weight_scale.data);
  params.low_rank = static_cast<const float*>(low_rank.data);
  params.adapters = adapters_of(lora_a, lora_b, scale, adapter_index, scaling, n);
  return cuda::lora_linear_backward(params, execution.stream);
#else
  (void)execution;
  return no_cuda_kernels(op);
#endif
}

}  // namespace visionllm
