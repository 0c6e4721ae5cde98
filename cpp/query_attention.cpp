// Argument checks and dispatch of batched query decoding; the contract is in
// include/visionllm/query_attention.h.
#include "visionllm/query_attention.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "cpu/query_attention.h"
#include "dispatch.h"
#include "element_of.h"
#include "parallel.h"
#include "scratch.h"
#ifdef VISIONLLM_HAVE_CUDA
#include "../cuda/query_attention.h"
#endif

namespace visionllm {
namespace {

constexpr std::int64_t kMostSlots = 64, kMostChannels = 128, kMostPrefix = 8192, kMostSplits = 64;

// Query rows of one CUDA block, and how many blocks keep a large GPU busy (an H100 has 132 multiprocessors).
constexpr std::int64_t kBlockRows = 128, kBusyBlocks = 128;
// Up to this prefix the keys are never divided; above it a part has at least kSplitKeys of them.
constexpr std::int64_t kUndividedPrefix = 2048, kSplitKeys = 1024;

struct Sizes {
  std::int64_t B, M, S, H, Hkv, D, P;
};

Status check_address(const char* op, const char* name, const TensorView& tensor) {
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0) return {};
  return bad_argument(op, std::string(name) + " must start at a multiple of 16 bytes");
}

// Rows can be read in pieces of 16 bytes.
Status check_aligned(const char* op, const char* name, const TensorView& tensor) {
  VISIONLLM_RETURN_IF_BAD(check_inner_contiguous(op, name, tensor, 1));
  if (tensor.size() == 0) return {};
  const std::int64_t piece = 16 / element_size(tensor.dtype);
  for (int i = 0; i < tensor.rank - 1; ++i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] % piece != 0) {
      return bad_argument(op, std::string(name) + " must have strides that are multiples of 16 bytes (" +
                                  std::to_string(piece) + " elements), got " +
                                  std::to_string(tensor.strides[i]) + " in dimension " + std::to_string(i));
    }
  }
  return check_address(op, name, tensor);
}

Status check_table(const char* op, const char* name, const TensorView& table, const Sizes& n) {
  if (table.rank != 2 || table.shape[0] < n.P + n.S || table.shape[1] != n.D / 2) {
    return bad_argument(op, std::string(name) + " must have shape [positions >= P + S, D / 2] = [>= " +
                                std::to_string(n.P + n.S) + ", " + std::to_string(n.D / 2) + "], got " +
                                shape_text(table));
  }
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, table, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_contiguous(op, name, table));
  return check_address(op, name, table);
}

// Checks the inputs that forward and backward share.
Status check_inputs(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                    const TensorView& prefix_k, const TensorView& prefix_v, const TensorView& prefix_length,
                    const TensorView& cosine, const TensorView& sine, Sizes* sizes) {
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "q", q, "[B, M, S, H, D]", 5));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "k", k, "[B, M, S, Hkv, D]", 5));
  VISIONLLM_RETURN_IF_BAD(check_rank(op, "prefix_k", prefix_k, "[B, P, Hkv, D]", 4));
  Sizes& n = *sizes;
  n = {q.shape[0], q.shape[1], q.shape[2], q.shape[3], k.shape[3], q.shape[4], prefix_k.shape[1]};
  const auto own = {n.B, n.M, n.S, n.Hkv, n.D};
  const auto shared = {n.B, n.P, n.Hkv, n.D};
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "k", k, "[B, M, S, Hkv, D]", own));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "v", v, "[B, M, S, Hkv, D]", own));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "prefix_k", prefix_k, "[B, P, Hkv, D]", shared));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "prefix_v", prefix_v, "[B, P, Hkv, D]", shared));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "prefix_length", prefix_length, "[B]", {n.B}));
  if (n.Hkv == 0 || n.H % n.Hkv != 0) {
    return bad_argument(op, "q must have a multiple of k's heads, got H = " + std::to_string(n.H) +
                                " and Hkv = " + std::to_string(n.Hkv));
  }
  VISIONLLM_RETURN_IF_BAD(check_float(op, "q", q));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "k", k, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "v", v, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "prefix_k", prefix_k, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "prefix_v", prefix_v, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "prefix_length", prefix_length, DType::int64));
  if (n.D < 8 || n.D > kMostChannels || n.D % 8 != 0) {
    return bad_argument(op, "q must have D a multiple of 8 from 8 to 128, got D = " + std::to_string(n.D));
  }
  if (n.S > kMostSlots) {
    return bad_argument(op, "q must have at most 64 slots in a group, got S = " + std::to_string(n.S));
  }
  if (n.P > kMostPrefix) {
    return bad_argument(op, "prefix_k must have at most 8192 tokens, got P = " + std::to_string(n.P));
  }
  // Rows of a KV head, and blocks of a launch, are counted in 32 bits; the margin is a tile's.
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max() - 1024;
  if (n.B > kLargest || n.M > kLargest || n.H > kLargest || n.M * n.S > kLargest / (n.H / n.Hkv + 1) ||
      (n.M * n.S * (n.H / n.Hkv) / 64 + n.P / 64 + 2) > kLargest / kMostSplits / (n.Hkv * n.B + 1)) {
    return bad_argument(
        op, "q must have at most 2^31 rows for each KV head and 2^31 tiles of 64, got " + shape_text(q));
  }
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "q", q));
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "k", k));
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "v", v));
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "prefix_k", prefix_k));
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "prefix_v", prefix_v));
  VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "prefix_length", prefix_length));
  if (cosine.absent() != sine.absent()) {
    return bad_argument(op, "cosine and sine must be given together");
  }
  if (!cosine.absent()) {
    VISIONLLM_RETURN_IF_BAD(check_table(op, "cosine", cosine, n));
    VISIONLLM_RETURN_IF_BAD(check_table(op, "sine", sine, n));
  }
  return {};
}

// A result or gradient: contiguous, with the rows and type of an input.
Status check_result(const char* op, const char* name, const TensorView& tensor, const char* letters,
                    std::initializer_list<std::int64_t> shape, DType dtype) {
  VISIONLLM_RETURN_IF_BAD(check_shape(op, name, tensor, letters, shape));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, name, tensor, dtype));
  VISIONLLM_RETURN_IF_BAD(check_contiguous(op, name, tensor));
  return check_address(op, name, tensor);
}

// ---- CPU --------------------------------------------------------------------------------------------------

// A thread is worth starting for this many multiplications and additions, about 100 us of work.
constexpr double kFlopsPerThread = 6e6;
// Fewer heads than this are divided into parts by their groups.
constexpr std::int64_t kUndividedHeads = 8;

cpu::SlotRows slot_rows(const TensorView& t) {
  return {t.data, t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
}

cpu::PrefixRows prefix_rows(const TensorView& t) {
  return {t.data, t.strides[0], t.strides[1], t.strides[2]};
}

// How many groups to take together: at least 128 rows, and as few as fill whole blocks best.
std::int64_t chunk_groups(const Sizes& n) {
  constexpr std::int64_t kBlock = cpu::kQueryAttentionRows, kFewestRows = 128;
  const std::int64_t rows = std::max<std::int64_t>(n.S * (n.H / n.Hkv), 1);
  std::int64_t best = 1;
  double best_padding = 2.0;
  for (std::int64_t groups = 1; groups <= n.M && groups <= std::max(kBlock, kFewestRows / rows + 1);
       ++groups) {
    const double padded = static_cast<double>((groups * rows + kBlock - 1) / kBlock * kBlock);
    const double padding = groups * rows < kFewestRows && groups < n.M ? 2.0 : padded / (groups * rows);
    if (padding < best_padding || groups == 1) best = groups, best_padding = padding;
    if (padding == 1.0) break;
  }
  return best;
}

cpu::QueryAttentionParams make_cpu_params(const TensorView& q, const TensorView& k, const TensorView& v,
                                          const TensorView& prefix_k, const TensorView& prefix_v,
                                          const TensorView& prefix_length, const TensorView& cosine,
                                          const TensorView& sine, const TensorView& output,
                                          const TensorView& logsumexp, const Sizes& n) {
  cpu::QueryAttentionParams params{};
  params.batch = n.B, params.groups = n.M, params.slots = n.S, params.heads = n.H, params.kv_heads = n.Hkv;
  params.channels = n.D, params.prefix = n.P;
  params.element = element_of(q.dtype);
  params.chunk = chunk_groups(n);
  params.q = slot_rows(q), params.k = slot_rows(k), params.v = slot_rows(v);
  params.prefix_k = prefix_rows(prefix_k), params.prefix_v = prefix_rows(prefix_v);
  params.prefix_length = static_cast<const std::int64_t*>(prefix_length.data);
  params.cosine = static_cast<const float*>(cosine.data), params.sine = static_cast<const float*>(sine.data);
  params.output = output.data, params.logsumexp = static_cast<float*>(logsumexp.data);
  return params;
}

// `products` matrix products over all pairs of rows and keys.
int useful_threads(const Sizes& n, double products, const Execution& execution) {
  const double pairs = static_cast<double>(n.B * n.M * n.S * n.H) * static_cast<double>(n.P + n.S);
  const double most = 2.0 * products * pairs * static_cast<double>(n.D) / kFlopsPerThread;
  return static_cast<int>(std::clamp<double>(most, 1.0, std::max(execution.threads, 1)));
}

Status run_on_cpu(const cpu::QueryAttentionParams& params, const Sizes& n, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  if (n.B * n.M * n.S * n.H == 0) return {};
  const auto kernel = VISIONLLM_KERNEL(isa, query_attention_kernel);
  const auto bytes = VISIONLLM_KERNEL(isa, query_attention_workspace_bytes);
  const int threads = useful_threads(n, 2, execution);
  const Scratch workspace(bytes(params), threads);
  const std::int64_t items = n.B * n.Hkv * cpu::query_attention_chunks(params);
  parallel_for(items, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernel(params, begin, end, workspace.part<void>(worker));
  });
  return {};
}

Status run_backward_on_cpu(cpu::QueryAttentionParams params, const Sizes& n, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  const auto kernel = VISIONLLM_KERNEL(isa, query_attention_backward_kernel);
  const auto sums = VISIONLLM_KERNEL(isa, query_attention_sums_kernel);
  const auto bytes = VISIONLLM_KERNEL(isa, query_attention_backward_workspace_bytes);
  const std::int64_t heads = n.B * n.Hkv;
  if (n.M * n.S * n.H > 0 && heads > 0) {
    const std::int64_t chunks = cpu::query_attention_chunks(params);
    const std::int64_t wanted = std::min(chunks, (kUndividedHeads + heads - 1) / heads);
    params.part = (chunks + wanted - 1) / wanted * params.chunk;
    params.parts = (n.M + params.part - 1) / params.part;
  }
  const std::int64_t sums_of_parts = params.parts > 1 ? heads * params.parts : 0;
  const std::int64_t plane = n.P * cpu::query_attention_padded(n.D);
  const Scratch partial_sums(sums_of_parts * 2 * plane * static_cast<std::int64_t>(sizeof(float)));
  params.partial_sums = partial_sums.part<float>();
  const int threads = useful_threads(n, 5, execution);
  if (params.parts > 0) {
    const Scratch workspace(bytes(params), threads);
    parallel_for(heads * params.parts, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
      kernel(params, begin, end, workspace.part<void>(worker));
    });
  }
  if (params.parts != 1) {  // without a part the gradients of the prefix become zero
    parallel_for(heads, threads,
                 [&](std::int64_t begin, std::int64_t end, int) { sums(params, begin, end, nullptr); });
  }
  return {};
}

// ---- CUDA -------------------------------------------------------------------------------------------------

#ifdef VISIONLLM_HAVE_CUDA
cuda::SlotTensor slot_tensor(const TensorView& t) {
  return {t.data, t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
}

cuda::PrefixTensor prefix_tensor(const TensorView& t) {
  return {t.data, t.strides[0], t.strides[1], t.strides[2]};
}

cuda::QueryAttentionParams make_params(const TensorView& q, const TensorView& k, const TensorView& v,
                                       const TensorView& prefix_k, const TensorView& prefix_v,
                                       const TensorView& prefix_length, const TensorView& cosine,
                                       const TensorView& sine, const TensorView& output,
                                       const TensorView& logsumexp, const Sizes& n) {
  cuda::QueryAttentionParams params{};
  params.batch = static_cast<int>(n.B), params.groups = static_cast<int>(n.M);
  params.slots = static_cast<int>(n.S), params.heads = static_cast<int>(n.H);
  params.kv_heads = static_cast<int>(n.Hkv), params.channels = static_cast<int>(n.D);
  params.prefix = static_cast<int>(n.P);
  params.dtype = q.dtype;
  params.q = slot_tensor(q), params.k = slot_tensor(k), params.v = slot_tensor(v);
  params.prefix_k = prefix_tensor(prefix_k), params.prefix_v = prefix_tensor(prefix_v);
  params.prefix_length = static_cast<const std::int64_t*>(prefix_length.data);
  params.cosine = static_cast<const float*>(cosine.data), params.sine = static_cast<const float*>(sine.data);
  params.output = output.data, params.logsumexp = static_cast<float*>(logsumexp.data);
  params.splits = 1;
  return params;
}
#endif

}  // namespace

int query_attention_splits(std::int64_t B, std::int64_t M, std::int64_t S, std::int64_t H, std::int64_t Hkv,
                           std::int64_t P) {
  if (P <= kUndividedPrefix || B * M * S * H * Hkv == 0) return 1;
  const std::int64_t blocks = B * Hkv * ((M * S * (H / Hkv) + kBlockRows - 1) / kBlockRows);
  return static_cast<int>(std::max<std::int64_t>(
      1, std::min((kBusyBlocks + blocks - 1) / blocks, (P + kSplitKeys - 1) / kSplitKeys)));
}

Status query_attention(const TensorView& output, const TensorView& logsumexp, const TensorView& workspace,
                       const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& prefix_k, const TensorView& prefix_v,
                       const TensorView& prefix_length, const TensorView& cosine, const TensorView& sine,
                       const Execution& execution) {
  constexpr const char* op = "query_attention";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, &n));
  VISIONLLM_RETURN_IF_BAD(
      check_result(op, "output", output, "[B, M, S, H, D]", {n.B, n.M, n.S, n.H, n.D}, q.dtype));
  VISIONLLM_RETURN_IF_BAD(
      check_result(op, "logsumexp", logsumexp, "[B, M, S, H]", {n.B, n.M, n.S, n.H}, DType::float32));
  const bool split = !workspace.absent();
  if (split) {
    VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[splits, B * M * S * H * (D + 1)]", 2));
    const std::int64_t splits = workspace.shape[0];
    VISIONLLM_RETURN_IF_BAD(check_result(op, "workspace", workspace, "[splits, B * M * S * H * (D + 1)]",
                                         {splits, n.B * n.M * n.S * n.H * (n.D + 1)}, DType::float32));
    if (splits < 1 || splits > kMostSplits) {
      return bad_argument(op, "workspace must be for 1 to 64 splits, got " + std::to_string(splits));
    }
  }
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"output", &output},
                                        {"logsumexp", &logsumexp},
                                        {"workspace", &workspace},
                                        {"q", &q},
                                        {"k", &k},
                                        {"v", &v},
                                        {"prefix_k", &prefix_k},
                                        {"prefix_v", &prefix_v},
                                        {"prefix_length", &prefix_length},
                                        {"cosine", &cosine},
                                        {"sine", &sine}},
                                       &device));
  if (device == Device::cpu) {
    return run_on_cpu(
        make_cpu_params(q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, output, logsumexp, n), n,
        execution);
  }
#ifdef VISIONLLM_HAVE_CUDA
  if (output.size() == 0) return {};
  cuda::QueryAttentionParams params =
      make_params(q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, output, logsumexp, n);
  if (split) {
    params.splits = static_cast<int>(workspace.shape[0]);
    params.workspace = static_cast<float*>(workspace.data);
  }
  return cuda::query_attention(params, execution.stream);
#else
  return no_cuda_kernels(op);
#endif
}

Status query_attention_backward(const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v,
                                const TensorView& grad_prefix_k, const TensorView& grad_prefix_v,
                                const TensorView& workspace, const TensorView& grad_output,
                                const TensorView& output, const TensorView& logsumexp, const TensorView& q,
                                const TensorView& k, const TensorView& v, const TensorView& prefix_k,
                                const TensorView& prefix_v, const TensorView& prefix_length,
                                const TensorView& cosine, const TensorView& sine,
                                const Execution& execution) {
  constexpr const char* op = "query_attention_backward";
  Sizes n;
  VISIONLLM_RETURN_IF_BAD(check_inputs(op, q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, &n));
  const auto rows = {n.B, n.M, n.S, n.H, n.D};
  const auto own = {n.B, n.M, n.S, n.Hkv, n.D};
  const auto shared = {n.B, n.P, n.Hkv, n.D};
  const auto scalars = {n.B, n.M, n.S, n.H};
  VISIONLLM_RETURN_IF_BAD(check_result(op, "grad_q", grad_q, "[B, M, S, H, D]", rows, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_result(op, "grad_k", grad_k, "[B, M, S, Hkv, D]", own, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_result(op, "grad_v", grad_v, "[B, M, S, Hkv, D]", own, q.dtype));
  VISIONLLM_RETURN_IF_BAD(
      check_result(op, "grad_prefix_k", grad_prefix_k, "[B, P, Hkv, D]", shared, q.dtype));
  VISIONLLM_RETURN_IF_BAD(
      check_result(op, "grad_prefix_v", grad_prefix_v, "[B, P, Hkv, D]", shared, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_result(op, "workspace", workspace, "[B, M, S, H]", scalars, DType::float32));
  VISIONLLM_RETURN_IF_BAD(check_shape(op, "grad_output", grad_output, "[B, M, S, H, D]", rows));
  VISIONLLM_RETURN_IF_BAD(check_dtype(op, "grad_output", grad_output, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_aligned(op, "grad_output", grad_output));
  VISIONLLM_RETURN_IF_BAD(check_result(op, "output", output, "[B, M, S, H, D]", rows, q.dtype));
  VISIONLLM_RETURN_IF_BAD(check_result(op, "logsumexp", logsumexp, "[B, M, S, H]", scalars, DType::float32));
  Device device;
  VISIONLLM_RETURN_IF_BAD(check_device(op,
                                       {{"grad_q", &grad_q},
                                        {"grad_k", &grad_k},
                                        {"grad_v", &grad_v},
                                        {"grad_prefix_k", &grad_prefix_k},
                                        {"grad_prefix_v", &grad_prefix_v},
                                        {"workspace", &workspace},
                                        {"grad_output", &grad_output},
                                        {"output", &output},
                                        {"logsumexp", &logsumexp},
                                        {"q", &q},
                                        {"k", &k},
                                        {"v", &v},
                                        {"prefix_k", &prefix_k},
                                        {"prefix_v", &prefix_v},
                                        {"prefix_length", &prefix_length},
                                        {"cosine", &cosine},
                                        {"sine", &sine}},
                                       &device));
  if (device == Device::cpu) {
    cpu::QueryAttentionParams params =
        make_cpu_params(q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, output, logsumexp, n);
    params.grad_output = slot_rows(grad_output);
    params.grad_q = grad_q.data, params.grad_k = grad_k.data, params.grad_v = grad_v.data;
    params.grad_prefix_k = grad_prefix_k.data, params.grad_prefix_v = grad_prefix_v.data;
    return run_backward_on_cpu(params, n, execution);
  }
#ifdef VISIONLLM_HAVE_CUDA
  if (output.size() == 0 && grad_prefix_k.size() == 0) return {};
  cuda::QueryAttentionBackwardParams params{};
  params.forward =
      make_params(q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine, output, logsumexp, n);
  params.grad_output = slot_tensor(grad_output);
  params.mean = static_cast<float*>(workspace.data);
  params.grad_q = grad_q.data, params.grad_k = grad_k.data, params.grad_v = grad_v.data;
  params.grad_prefix_k = grad_prefix_k.data, params.grad_prefix_v = grad_prefix_v.data;
  return cuda::query_attention_backward(params, execution.stream);
#else
  return no_cuda_kernels(op);
#endif
}

}  // namespace visionllm
