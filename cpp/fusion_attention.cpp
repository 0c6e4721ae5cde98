// Argument checks and dispatch of language fusion; the contract is in include/visionllm/fusion_attention.h.
#include "visionllm/fusion_attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../cuda/fusion_attention.h"
#include "check.h"
#include "cpu/fusion_attention.h"
#include "dispatch.h"
#include "element_of.h"
#include "parallel.h"
#include "scratch.h"

namespace visionllm {
namespace {

struct Inputs {
  const TensorView& x;
  const TensorView& norm_weight;
  const TensorView& norm_bias;
  const TensorView& query_weight;
  const TensorView& query_bias;
  const TensorView& key;
  const TensorView& value;
  const TensorView& mask;
  const TensorView& output_weight;
  const TensorView& output_bias;
  const TensorView& gate;
};

struct Sizes {
  std::int64_t B, N, C, T, H, D;
};

// The CPU kernels take any address and stride.
Status check_address(const char* op, const char* name, const TensorView& tensor) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
  if (tensor.size() == 0 || address % 16 == 0 || tensor.device == Device::cpu) return {};
  return bad_argument(op, std::string(name) + " must be at a multiple of 16 bytes, got one that is " +
                              std::to_string(address % 16) + " bytes off");
}

Status check_layout(const char* op, const char* name, const TensorView& tensor, DType dtype) {
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, tensor, dtype));
  VISIONLLM_RETURN_IF_BAD(check_contiguous(op, name, tensor));
  return check_address(op, name, tensor);
}

// Key or value: on CUDA every row of D channels at a multiple of 16 bytes.
Status check_tokens(const char* op, const char* name, const TensorView& tensor, DType dtype) {
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, tensor, dtype));
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, name, tensor, 1));
  VISIONLLM_RETURN_IF_BAD(check_address(op, name, tensor));
  if (tensor.size() == 0 || tensor.device == Device::cpu) return {};
  for (int i = 0; i < 3; ++i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] * element_size(dtype) % 16 != 0) {
      return bad_argument(op, std::string(name) + " must have strides that are multiples of 16 bytes, got " +
                                  std::to_string(tensor.strides[i]) + " elements in dimension " +
                                  std::to_string(i));
    }
  }
  return {};
}

Status check_inputs(const char* op, const Inputs& in, Sizes* sizes) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "x", in.x, "[B, N, C]", 3));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "key", in.key, "[B, T, H, D]", 4));
  VISIONLLM_RETURN_IF_BAD(check_float(op, "x", in.x));
  Sizes& n = *sizes;
  n.B = in.x.shape[0], n.N = in.x.shape[1], n.C = in.x.shape[2];
  n.T = in.key.shape[1], n.H = in.key.shape[2], n.D = in.key.shape[3];
  if (n.H * n.D != n.C) {
    return bad_argument(op, "key must have H * D = C = " + std::to_string(n.C) + " channels, got " +
                                std::to_string(n.H) + " heads of " + std::to_string(n.D));
  }
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "key", in.key, "[B, T, H, D]", {n.B, n.T, n.H, n.D}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "value", in.value, "[B, T, H, D]", {n.B, n.T, n.H, n.D}));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "mask", in.mask, "[B, T]", {n.B, n.T}));
  const DType dtype = in.x.dtype;
  const struct {
    const char* name;
    const TensorView& tensor;
  } vectors[] = {{"norm_weight", in.norm_weight},
                 {"norm_bias", in.norm_bias},
                 {"query_bias", in.query_bias},
                 {"output_bias", in.output_bias},
                 {"gate", in.gate}},
    matrices[] = {{"query_weight", in.query_weight}, {"output_weight", in.output_weight}};
  for (const auto& entry : vectors) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, entry.name, entry.tensor, "[C]", {n.C}));
  }
  for (const auto& entry : matrices) {
    VISIONLLM_RETURN_IF_BAD(check_shape(op, entry.name, entry.tensor, "[C, C]", {n.C, n.C}));
  }
  VISIONLLM_RETURN_IF_BAD(check_layout(op, "x", in.x, dtype));
  VISIONLLM_RETURN_IF_BAD(check_tokens(op, "key", in.key, dtype));
  VISIONLLM_RETURN_IF_BAD(check_tokens(op, "value", in.value, dtype));
  for (const auto& entry : vectors) {
    VISIONLLM_RETURN_IF_BAD(check_layout(op, entry.name, entry.tensor, dtype));
  }
  for (const auto& entry : matrices) {
    VISIONLLM_RETURN_IF_BAD(check_layout(op, entry.name, entry.tensor, dtype));
  }
  if (in.mask.dtype != DType::uint8) {
    return bad_argument(op, std::string("mask must be uint8 or boolean, got ") + dtype_name(in.mask.dtype));
  }
  return check_contiguous(op, "mask", in.mask);
}

// What the CUDA kernels are written for.
Status check_limits(const char* op, const Sizes& n) {
  const auto unsupported = [op](const std::string& what) {
    return Status::unsupported(std::string(op) + ": the CUDA kernels take " + what);
  };
  if (n.C > cuda::kFusionMaxChannels || n.C % 16 != 0 || n.C == 0) {
    return unsupported("C up to " + std::to_string(cuda::kFusionMaxChannels) +
                       " that is a multiple of 16, got " + std::to_string(n.C));
  }
  if (n.D > cuda::kFusionMaxHeadChannels || n.D % 8 != 0) {
    return unsupported("D up to " + std::to_string(cuda::kFusionMaxHeadChannels) +
                       " that is a multiple of 8, got " + std::to_string(n.D));
  }
  if (n.T > cuda::kFusionMaxTokens) {
    return unsupported("T up to " + std::to_string(cuda::kFusionMaxTokens) + ", got " + std::to_string(n.T));
  }
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (n.N > cuda::kFusionMaxPositions) {
    return unsupported("N up to " + std::to_string(cuda::kFusionMaxPositions) + ", got " +
                       std::to_string(n.N));
  }
  // A block takes at least 32 rows of x or 8 channels of a token; there are no more than 2^31 - 1 blocks.
  if (n.B > 0 && (n.N / 32 + 1 > kLargest / n.B || n.C * (n.T + 1) > kLargest / n.B)) {
    return unsupported("B * N up to 2^36 and B * T * C up to 2^31, got x of [" + std::to_string(n.B) + ", " +
                       std::to_string(n.N) + ", " + std::to_string(n.C) + "] and T = " + std::to_string(n.T));
  }
  return {};
}

// ---- CPU --------------------------------------------------------------------------------------------------

// Multiplications and additions that are worth a thread: about 50 us of them.
constexpr double kWorkPerThread = 4e6;

// Slices of the backward, and the fewest positions of one: each has sums as large as both weights.
constexpr std::int64_t kSlices = 16;
constexpr std::int64_t kSlicePositions = 256;

struct Texts {
  std::vector<std::int32_t> counts;  // [B]
  std::vector<std::int32_t> tokens;  // [B, T]

  Texts(const TensorView& mask, const Sizes& n)
      : counts(static_cast<std::size_t>(n.B)), tokens(static_cast<std::size_t>(n.B * n.T)) {
    const auto* const keep = static_cast<const std::uint8_t*>(mask.data);
    for (std::int64_t b = 0; b < n.B; ++b) {
      for (std::int64_t t = 0; t < n.T; ++t) {
        if (keep[b * n.T + t] != 0)
          tokens[static_cast<std::size_t>(b * n.T + counts[static_cast<std::size_t>(b)]++)] =
              static_cast<std::int32_t>(t);
      }
    }
  }
};

cpu::FusionAttentionParams make_cpu_params(const Inputs& in, const Sizes& n, double epsilon,
                                           const Texts& texts) {
  cpu::FusionAttentionParams params{};
  params.batch = n.B, params.positions = n.N, params.channels = n.C;
  params.tokens = n.T, params.heads = n.H, params.head_channels = n.D;
  params.element = element_of(in.x.dtype);
  params.epsilon = static_cast<float>(epsilon);
  params.x = in.x.data;
  params.norm_weight = in.norm_weight.data, params.norm_bias = in.norm_bias.data;
  params.query_weight = in.query_weight.data, params.query_bias = in.query_bias.data;
  params.key = in.key.data;
  params.key_stride_b = in.key.strides[0], params.key_stride_t = in.key.strides[1];
  params.key_stride_h = in.key.strides[2];
  params.value = in.value.data;
  params.value_stride_b = in.value.strides[0], params.value_stride_t = in.value.strides[1];
  params.value_stride_h = in.value.strides[2];
  params.output_weight = in.output_weight.data, params.output_bias = in.output_bias.data;
  params.gate = in.gate.data;
  params.counts = texts.counts.data(), params.texts = texts.tokens.data();
  params.most_tokens = *std::max_element(texts.counts.begin(), texts.counts.end());
  return params;
}

int useful_threads(const Sizes& n, const Execution& execution, double passes) {
  const double work =
      passes * static_cast<double>(n.B) * static_cast<double>(n.N) * static_cast<double>(n.C * (n.C + n.T));
  return static_cast<int>(std::clamp<double>(work / kWorkPerThread, 1.0, std::max(execution.threads, 1)));
}

Status run_on_cpu(const Inputs& in, const Sizes& n, double epsilon, const TensorView& output,
                  const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  if (output.size() == 0) return {};
  const Texts texts(in.mask, n);
  cpu::FusionAttentionParams params = make_cpu_params(in, n, epsilon, texts);
  params.output = output.data;
  cpu::FusionAttentionLayout layout{};
  VISIONLLM_KERNEL(isa, fusion_attention_layout)(params, &layout);
  const int threads = useful_threads(n, execution, 2);
  const Scratch shared(layout.shared), entries(layout.entry * n.B), workspace(layout.workspace, threads);
  params.shared = shared.part<char>(), params.entries = entries.part<char>();
  params.entry_bytes = layout.entry;
  VISIONLLM_KERNEL(isa, fusion_attention_prepare)(params);
  const auto prepare_tokens = VISIONLLM_KERNEL(isa, fusion_attention_prepare_tokens);
  parallel_for(n.B, threads,
               [&](std::int64_t begin, std::int64_t end, int) { prepare_tokens(params, begin, end); });
  const auto kernel = VISIONLLM_KERNEL(isa, fusion_attention_kernel);
  const std::int64_t blocks = (n.N + layout.block_rows - 1) / layout.block_rows;
  parallel_for(n.B * blocks, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernel(params, begin, end, workspace.part<void>(worker));
  });
  return {};
}

void fill_zero(const TensorView& tensor) {  // contiguous
  if (tensor.size() > 0)
    std::memset(tensor.data, 0, static_cast<std::size_t>(tensor.size() * element_size(tensor.dtype)));
}

Status run_backward_on_cpu(cpu::FusionAttentionParams params, const Sizes& n, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  params.backward = true;
  cpu::FusionAttentionLayout layout{};
  VISIONLLM_KERNEL(isa, fusion_attention_layout)(params, &layout);
  const std::int64_t blocks = (n.N + layout.block_rows - 1) / layout.block_rows;
  const std::int64_t most = std::min(blocks, (n.N + kSlicePositions - 1) / kSlicePositions);
  params.slices = std::clamp<std::int64_t>((kSlices + n.B - 1) / n.B, 1, most);
  const std::int64_t slices = n.B * params.slices;
  const int threads = useful_threads(n, execution, 7);
  const Scratch shared(layout.shared), entries(layout.entry * n.B), workspace(layout.workspace, threads);
  const Scratch sums(slices * layout.slice + n.H * layout.head);
  params.shared = shared.part<char>(), params.entries = entries.part<char>(), params.sums = sums.part<char>();
  params.entry_bytes = layout.entry, params.slice_bytes = layout.slice, params.head_bytes = layout.head;
  VISIONLLM_KERNEL(isa, fusion_attention_prepare)(params);
  const auto prepare_tokens = VISIONLLM_KERNEL(isa, fusion_attention_prepare_tokens);
  parallel_for(n.B, threads,
               [&](std::int64_t begin, std::int64_t end, int) { prepare_tokens(params, begin, end); });
  const auto share_out = [&](std::int64_t items, auto kernel) {
    parallel_for(items, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
      kernel(params, begin, end, workspace.part<void>(worker));
    });
  };
  share_out(slices, VISIONLLM_KERNEL(isa, fusion_attention_backward_kernel));
  share_out(n.B, VISIONLLM_KERNEL(isa, fusion_attention_sum_tokens));
  share_out(n.H, VISIONLLM_KERNEL(isa, fusion_attention_sum_head));
  VISIONLLM_KERNEL(isa, fusion_attention_sum_vectors)(params);
  return {};
}

// ---- CUDA -------------------------------------------------------------------------------------------------

[[maybe_unused]] cuda::FusionAttentionParams make_params(const Inputs& in, const Sizes& n, double epsilon) {
  cuda::FusionAttentionParams params{};
  params.batch = n.B;
  params.positions = static_cast<int>(n.N);
  params.channels = static_cast<int>(n.C);
  params.tokens = static_cast<int>(n.T);
  params.heads = static_cast<int>(n.H);
  params.head_channels = static_cast<int>(n.D);
  params.dtype = in.x.dtype;
  params.epsilon = static_cast<float>(epsilon);
  params.x = in.x.data;
  params.norm_weight = in.norm_weight.data, params.norm_bias = in.norm_bias.data;
  params.query_weight = in.query_weight.data, params.query_bias = in.query_bias.data;
  params.key = in.key.data;
  params.key_stride_b = in.key.strides[0], params.key_stride_t = in.key.strides[1];
  params.key_stride_h = in.key.strides[2];
  params.value = in.value.data;
  params.value_stride_b = in.value.strides[0], params.value_stride_t = in.value.strides[1];
  params.value_stride_h = in.value.strides[2];
  params.mask = static_cast<const std::uint8_t*>(in.mask.data);
  params.output_weight = in.output_weight.data, params.output_bias = in.output_bias.data;
  params.gate = in.gate.data;
  return params;
}

}  // namespace

Status fusion_attention(const TensorView& output, const TensorView& x, const TensorView& norm_weight,
                        const TensorView& norm_bias, const TensorView& query_weight,
                        const TensorView& query_bias, const TensorView& key, const TensorView& value,
                        const TensorView& mask, const TensorView& output_weight,
                        const TensorView& output_bias, const TensorView& gate, double epsilon,
                        const Execution& execution) {
  constexpr const char* op = "fusion_attention";
  const Inputs in{x,     norm_weight, norm_bias,     query_weight, query_bias, key,
                  value, mask,        output_weight, output_bias,  gate};
  Sizes n;
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, in, &n));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "output", output, "[B, N, C]", {n.B, n.N, n.C}));
  VISIONLLM_RETURN_IF_BAD(check_layout(op, "output", output, x.dtype));
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"x", &x},
                                        {"norm_weight", &norm_weight},
                                        {"norm_bias", &norm_bias},
                                        {"query_weight", &query_weight},
                                        {"query_bias", &query_bias},
                                        {"key", &key},
                                        {"value", &value},
                                        {"mask", &mask},
                                        {"output_weight", &output_weight},
                                        {"output_bias", &output_bias},
                                        {"gate", &gate},
                                        {"output", &output}},
                                       &device));
  if (device == Device::cpu) return run_on_cpu(in, n, epsilon, output, execution);
  VISIONLLM_RETURN_IF_BAD(check_limits(op, n));
#ifdef VISIONLLM_HAVE_CUDA
  if (n.B * n.N == 0) return {};
  cuda::FusionAttentionParams params = make_params(in, n, epsilon);
  params.output = output.data;
  return cuda::fusion_attention(params, execution.stream);
#else
  (void)epsilon, (void)execution;
  return no_cuda_kernels(op);
#endif
}

std::int64_t fusion_attention_backward_workspace_bytes(std::int64_t B, std::int64_t N, std::int64_t C,
                                                       std::int64_t T, std::int64_t H,
                                                       std::int64_t element_bytes) {
  return cuda::FusionAttentionWorkspace(B, N, C, T, H, element_bytes).bytes;
}

Status fusion_attention_backward(
    const TensorView& grad_x, const TensorView& grad_norm_weight, const TensorView& grad_norm_bias,
    const TensorView& grad_query_weight, const TensorView& grad_query_bias, const TensorView& grad_key,
    const TensorView& grad_value, const TensorView& grad_output_weight, const TensorView& grad_output_bias,
    const TensorView& grad_gate, const TensorView& workspace, const TensorView& grad_output,
    const TensorView& x, const TensorView& norm_weight, const TensorView& norm_bias,
    const TensorView& query_weight, const TensorView& query_bias, const TensorView& key,
    const TensorView& value, const TensorView& mask, const TensorView& output_weight,
    const TensorView& output_bias, const TensorView& gate, double epsilon, const Execution& execution) {
  constexpr const char* op = "fusion_attention_backward";
  const Inputs in{x,     norm_weight, norm_bias,     query_weight, query_bias, key,
                  value, mask,        output_weight, output_bias,  gate};
  Sizes n;
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, in, &n));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_output", grad_output, "[B, N, C]", {n.B, n.N, n.C}));
  VISIONLLM_RETURN_IF_BAD(check_layout(op, "grad_output", grad_output, x.dtype));
  const struct {
    const char* name;
    const TensorView& tensor;
    const TensorView& like;
  } gradients[] = {{"grad_x", grad_x, x},
                   {"grad_norm_weight", grad_norm_weight, norm_weight},
                   {"grad_norm_bias", grad_norm_bias, norm_bias},
                   {"grad_query_weight", grad_query_weight, query_weight},
                   {"grad_query_bias", grad_query_bias, query_bias},
                   {"grad_key", grad_key, key},
                   {"grad_value", grad_value, value},
                   {"grad_output_weight", grad_output_weight, output_weight},
                   {"grad_output_bias", grad_output_bias, output_bias},
                   {"grad_gate", grad_gate, gate}};
  for (const auto& entry : gradients) {
    bool equal = entry.tensor.rank == entry.like.rank;
    for (int i = 0; equal && i < entry.like.rank; ++i) equal = entry.tensor.shape[i] == entry.like.shape[i];
    if (!equal) {
      return bad_argument(op, std::string(entry.name) + " must have shape " + shape_text(entry.like) +
                                  ", got " + shape_text(entry.tensor));
    }
    VISIONLLM_RETURN_IF_BAD(check_layout(op, entry.name, entry.tensor, x.dtype));
  }
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"x", &x},
                                        {"norm_weight", &norm_weight},
                                        {"norm_bias", &norm_bias},
                                        {"query_weight", &query_weight},
                                        {"query_bias", &query_bias},
                                        {"key", &key},
                                        {"value", &value},
                                        {"mask", &mask},
                                        {"output_weight", &output_weight},
                                        {"output_bias", &output_bias},
                                        {"gate", &gate},
                                        {"grad_output", &grad_output},
                                        {"workspace", &workspace},
                                        {"grad_x", &grad_x},
                                        {"grad_norm_weight", &grad_norm_weight},
                                        {"grad_norm_bias", &grad_norm_bias},
                                        {"grad_query_weight", &grad_query_weight},
                                        {"grad_query_bias", &grad_query_bias},
                                        {"grad_key", &grad_key},
                                        {"grad_value", &grad_value},
                                        {"grad_output_weight", &grad_output_weight},
                                        {"grad_output_bias", &grad_output_bias},
                                        {"grad_gate", &grad_gate}},
                                       &device));
  if (device == Device::cpu) {
    if (grad_output.size() == 0) {
      for (const auto& entry : gradients) fill_zero(entry.tensor);
      return {};
    }
    const Texts texts(in.mask, n);
    cpu::FusionAttentionParams params = make_cpu_params(in, n, epsilon, texts);
    params.grad_output = grad_output.data;
    params.grad_x = grad_x.data;
    params.grad_norm_weight = grad_norm_weight.data, params.grad_norm_bias = grad_norm_bias.data;
    params.grad_query_weight = grad_query_weight.data, params.grad_query_bias = grad_query_bias.data;
    params.grad_key = grad_key.data, params.grad_value = grad_value.data;
    params.grad_output_weight = grad_output_weight.data, params.grad_output_bias = grad_output_bias.data;
    params.grad_gate = grad_gate.data;
    return run_backward_on_cpu(params, n, execution);
  }
  VISIONLLM_RETURN_IF_BAD(check_limits(op, n));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[W]", 1));
  VISIONLLM_RETURN_IF_BAD(check_layout(op, "workspace", workspace, DType::float32));
  const std::int64_t needed =
      fusion_attention_backward_workspace_bytes(n.B, n.N, n.C, n.T, n.H, element_size(x.dtype));
  if (workspace.size() * 4 < needed) {
    return bad_argument(op, "workspace must have at least " + std::to_string(needed) + " bytes, got " +
                                std::to_string(workspace.size() * 4));
  }
#ifdef VISIONLLM_HAVE_CUDA
  cuda::FusionAttentionBackwardParams params{};
  params.forward = make_params(in, n, epsilon);
  params.grad_output = grad_output.data;
  params.grad_x = grad_x.data;
  params.grad_norm_weight = grad_norm_weight.data, params.grad_norm_bias = grad_norm_bias.data;
  params.grad_query_weight = grad_query_weight.data, params.grad_query_bias = grad_query_bias.data;
  params.grad_key = grad_key.data, params.grad_value = grad_value.data;
  params.grad_output_weight = grad_output_weight.data, params.grad_output_bias = grad_output_bias.data;
  params.grad_gate = grad_gate.data;
  params.workspace = static_cast<unsigned char*>(workspace.data);
  return cuda::fusion_attention_backward(params, execution.stream);
#else
  (void)epsilon, (void)execution;
  return no_cuda_kernels(op);
#endif
}

}  // namespace visionllm
