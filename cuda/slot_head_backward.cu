// Gradients of slot_head's cross-entropy; the contract is in visionllm/slot_head.h. With D the gradient of the
// products normed . row, which logits_kernel makes again tile by tile from the saved logsumexp:
//
//   grad_normed = D rows                          grad_rows = D^T normed
//   grad_norm_weight = sum over slots of grad_normed * unit,   unit = states * inverse
//   grad_states = inverse * (g - unit * mean(g * unit)),       g = grad_normed * norm_weight
//
// D is needed whole in two directions, and a state's gradient has more channels than a state has rows, so D is
// not made once for each of the C / 128 column tiles of the products: it is held in the workspace, in the
// states' type and in both layouts, for a bounded number of slots at a time (2^25 elements each). Kernels:
//
//   factor        grad_loss * weight of each slot, and which slots are ignored
//   normalise, logits    as in the forward; the latter writes D and D^T
//   product       128 x 128 tiles of D rows into grad_states and of D^T normed into grad_rows; chunks after
//                 the first add to float32 sums
//   norm_weight, norm_weight_sum    two stages of the sum over slots, in a fixed order
//   norm_states   grad_normed to grad_states, in place
//
// Every element has one writer and sums have one order: the gradients are deterministic.
//
// Counted at 4900 slots x 4096 channels x 1025 rows, bfloat16, with norm: 3 products of 41.1 GFLOP, the least
// without the forward's logits: one to make D again, two to use it. States and rows in and their gradients out
// are 97 MB. Counting what each kernel reads and writes once: normalise 80, logits 69, products 59 and 59,
// norm_weight 80, norm_states 120, together 467 MB, of which what the L2 cache holds does not reach memory.
#include "slot_head.h"
#include "slot_head_tile.cuh"

namespace visionllm::cuda {
namespace slot_head_detail {
namespace {

constexpr int kTile = 128;     // of the product, both ways
constexpr int kThreads = 256;  // 2 x 4 warps of 64 x 32
constexpr int kStages = 3;
constexpr int kRightBytes =
    128;  // lines of depth 128 / sizeof(T), each of kTile elements: kTile * kLineBytes
constexpr int kStageBytes = kTile * (kLineBytes + kRightBytes);
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kElementwiseThreads = 256;
constexpr int kNormThreads = 128;
constexpr int kNormColumns = 64;  // of a block that adds up norm_weight's gradient: two for each lane

// ---- factor ---------------------------------------------------------------------------------------------

__global__ void factor_kernel(float* factor, std::uint8_t* active, const float* grad_loss,
                              SlotHeadTarget target, std::int64_t slots) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  if (slot >= slots) return;
  const float weight = target.weight == nullptr ? 1.0f : target.weight[slot];
  const bool ignored = weight == 0.0f || (target.row != nullptr && target.row[slot] < 0);
  factor[slot] = ignored ? 0.0f : grad_loss[slot] * weight;
  active[slot] = ignored ? 0 : 1;
}

// ---- product --------------------------------------------------------------------------------------------

// out[set] = sum over segments q of left[set, q] right[set, q], where one of sets and segments is 1 or the
// right-hand side is the same for all: both are counted by set * segments + q.
struct ProductParams {
  const void* left;  // [sets * segments, rows, left_pitch]
  std::int64_t left_stride, left_pitch;
  Vectors right;             // depth vectors of C elements
  std::int64_t right_first;  // the first vector's number in its set
  const std::uint8_t*
      there;  // [sets * segments, depth]: 0 where the right-hand vector counts as zeros; or null
  std::int64_t there_stride;
  std::int64_t rows, depth, C;
  std::int64_t row_tiles, column_tiles;
  int segments;
  Vectors out;  // `rows` vectors of C elements
  std::int64_t out_first;
  float* sums;     // [sets, rows, C]: partial results of chunks, or null
  bool add, last;  // sums are to be added; this is the result: written to out, else to sums
};

// 16-byte chunk of a line of the right-hand tile, whose lines run along C. 16-bit types are read by
// ldmatrix, eight lines at one chunk; float32 by lanes at four lines and eight neighbouring elements.
template <typename T>
__device__ __forceinline__ unsigned char* right_chunk(unsigned char* lines, int line, int chunk) {
  const int move = sizeof(T) == 2 ? line & 7 : (line & 3) << 1;
  return lines + line * kTile * static_cast<int>(sizeof(T)) + ((chunk ^ move) << 4);
}

// Right-hand fragments where a line is a row of the product: columns first, ..., first + 31.
template <typename T>
__device__ __forceinline__ void load_right_by_row(std::uint32_t (&b)[4][2], unsigned char* lines, int first,
                                                  int step) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      std::uint32_t r[4];
      ldmatrix_x4_trans(r, right_chunk<T>(lines, 16 * step + lane % 16, (first + 8 * j) / 8 + lane / 16));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first + 8 * j + lane / 4;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned char* const chunk = right_chunk<T>(lines, 8 * step + lane % 4 + 4 * k, column / 4);
        b[j][k] = *reinterpret_cast<const std::uint32_t*>(chunk + column % 4 * 4);
      }
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) void product_kernel(ProductParams p) {
  constexpr int kDepth = kLineElements<T>, kChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kRightChunks = kTile / kChunk;          // of a line
  constexpr int kRightLines = kThreads / kRightChunks;  // of a pass
  constexpr int kPasses = 4, kAtOnce = kStepsAtOnce<T>;
  static_assert(kPasses * kRightLines == kDepth && kPasses * (kThreads / 8) == kTile,
                "the passes cover both tiles");
  VISIONLLM_DYNAMIC_SHARED(shared);
  const std::int64_t column_tile = blockIdx.x % p.column_tiles;
  const std::int64_t rest = blockIdx.x / p.column_tiles;
  const std::int64_t first_row = rest % p.row_tiles * kTile, first_column = column_tile * kTile;
  const std::int64_t set = rest / p.row_tiles;

  const int chunk = threadIdx.x % 8, line = threadIdx.x / 8;
  const int right_place = threadIdx.x % kRightChunks, right_line = threadIdx.x / kRightChunks;
  const std::int64_t right_column = first_column + right_place * kChunk;
  const bool right_inside = right_column < p.C;
  const auto stages = static_cast<int>((p.depth + kDepth - 1) / kDepth);  // of a segment
  const int count = stages * p.segments;
  // Which right-hand vectors of the next stage there are: asked for a stage ahead, so that no copy waits for it.
  bool there[kPasses];
  const auto look_ahead = [&](int stage) {
    const int segment = stage / (stages > 0 ? stages : 1);
    const std::int64_t first = static_cast<std::int64_t>(stage - segment * stages) * kDepth;
    const std::int64_t part = set * p.segments + segment;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const std::int64_t vector = first + right_line + i * kRightLines;
      there[i] = stage < count && right_inside && vector < p.depth &&
                 (p.there == nullptr || p.there[part * p.there_stride + vector] != 0);
    }
  };
  look_ahead(0);
  // Stages are fetched in order.
  const auto fetch = [&](int slot, int stage) {
    unsigned char* const lines = shared + slot * kStageBytes;
    const int segment = stage / stages;
    const std::int64_t first = static_cast<std::int64_t>(stage - segment * stages) * kDepth;
    const std::int64_t part = set * p.segments + segment;
    const T* const left = static_cast<const T*>(p.left) + part * p.left_stride;
    const std::int64_t k = first + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int l = line + i * (kThreads / 8);
      const bool inside = first_row + l < p.rows && k < p.depth;
      copy_async_16(line_chunk(lines, l, chunk), left + (inside ? (first_row + l) * p.left_pitch + k : 0),
                    inside);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int l = right_line + i * kRightLines;
      const auto index = static_cast<std::uint32_t>(p.right_first + (there[i] ? first + l : 0));
      copy_async_16(right_chunk<T>(lines + kTile * kLineBytes, l, right_place),
                    p.right.at<T>(part, index) + (there[i] ? right_column : 0), there[i]);
    }
    look_ahead(stage + 1);
  };

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = warp % 2 * (kTile / 2), warp_column = warp / 2 * kStepLines;
  const bool multiplies = first_row + warp_row < p.rows && first_column + warp_column < p.C;
  float sums[4][4][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) fetch(s, s);
    copy_async_commit();
  }
  for (int k = 0; k < count; ++k) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (k + kStages - 1 < count) fetch((k + kStages - 1) % kStages, k + kStages - 1);
    copy_async_commit();
    if (multiplies) {
      unsigned char* const lines = shared + k % kStages * kStageBytes;
#pragma unroll kAtOnce
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t a[4][4], b[4][2];
        load_left(a, lines, warp_row, step);
        load_right_by_row<T>(b, lines + kTile * kLineBytes, warp_column, step);
        multiply<T>(sums, a, b);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = first_row + warp_row + 16 * i + lane / 4 + 8 * half;
      if (row >= p.rows) continue;
      float* const partial = p.sums == nullptr ? nullptr : p.sums + (set * p.rows + row) * p.C;
      T* const out = const_cast<T*>(p.out.at<T>(set, static_cast<std::uint32_t>(p.out_first + row)));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t column = first_column + warp_column + 8 * j + lane % 4 * 2;
        if (column >= p.C) continue;  // C is even
        float values[2] = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
        if (p.add) values[0] += partial[column], values[1] += partial[column + 1];
        if (p.last) {
          store_floats(out + column, values);
        } else {
          store_floats(partial + column, values);
        }
      }
    }
  }
}

// ---- the norm -------------------------------------------------------------------------------------------

struct NormParams {
  Vectors states;
  const float* inverse;        // [slots]
  const std::uint8_t* active;  // [slots]
  const void* weight;          // [C]
  void* grad_states;           // [slots, C]: gradient of the normed states before, of the states after
  float* weight_sums;          // [groups, C]
  std::int64_t slots, set_slots, C, group;
};

// Block (x, y): 64 columns of the slots of group y; warps take the group's slots in turn.
template <typename T>
__global__ __launch_bounds__(kElementwiseThreads) void norm_weight_kernel(NormParams p) {
  constexpr int kWarps = kElementwiseThreads / kWarpSize;
  VISIONLLM_SHARED_ARRAY(float, parts, kWarps* kNormColumns);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kNormColumns + 2 * lane;
  const std::int64_t first = blockIdx.y * p.group;
  const std::int64_t end = first + p.group < p.slots ? first + p.group : p.slots;
  float sum[2] = {0.0f, 0.0f};
  if (column < p.C) {
    for (std::int64_t slot = first + warp; slot < end; slot += kWarps) {
      if (p.active[slot] == 0) continue;
      const std::int64_t set = slot / p.set_slots;
      float gradient[2], state[2];
      load_floats(gradient, static_cast<const T*>(p.grad_states) + slot * p.C + column);
      load_floats(state, p.states.at<T>(set, static_cast<std::uint32_t>(slot - set * p.set_slots)) + column);
      sum[0] += gradient[0] * state[0] * p.inverse[slot];
      sum[1] += gradient[1] * state[1] * p.inverse[slot];
    }
  }
  parts[warp * kNormColumns + 2 * lane] = sum[0];
  parts[warp * kNormColumns + 2 * lane + 1] = sum[1];
  __syncthreads();
  const std::int64_t mine = static_cast<std::int64_t>(blockIdx.x) * kNormColumns + threadIdx.x;
  if (threadIdx.x < kNormColumns && mine < p.C) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += parts[w * kNormColumns + threadIdx.x];
    p.weight_sums[blockIdx.y * p.C + mine] = total;
  }
}

template <typename T>
__global__ __launch_bounds__(kElementwiseThreads) void norm_weight_sum_kernel(T* grad_weight,
                                                                              const float* weight_sums,
                                                                              std::int64_t groups,
                                                                              std::int64_t C) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  if (column >= C) return;
  float total = 0.0f;
  for (std::int64_t g = 0; g < groups; ++g) total += weight_sums[g * C + column];
  grad_weight[column] = from_float<T>(total);
}

// One block per slot.
template <typename T>
__global__ __launch_bounds__(kNormThreads) void norm_states_kernel(NormParams p) {
  VISIONLLM_SHARED_ARRAY(float, parts, kNormThreads / kWarpSize);
  constexpr int N = kVectorSize<T>;
  const std::int64_t slot = blockIdx.x;
  const std::int64_t set = slot / p.set_slots;
  const T* const x = p.states.at<T>(set, static_cast<std::uint32_t>(slot - set * p.set_slots));
  const T* const weight = static_cast<const T*>(p.weight);
  T* const gradient = static_cast<T*>(p.grad_states) + slot * p.C;
  const bool active = p.active[slot] != 0;
  const float inverse = p.inverse[slot];
  float dot = 0.0f;
  for (std::int64_t c = threadIdx.x * N; c < p.C; c += kNormThreads * N) {
    float states[N], weights[N], gradients[N];
    load_floats(states, x + c);
    load_floats(weights, weight + c);
    load_floats(gradients, gradient + c);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += gradients[i] * weights[i] * (states[i] * inverse);
  }
  dot = warp_sum(dot);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = dot;
  __syncthreads();
  dot = 0.0f;
#pragma unroll
  for (int w = 0; w < kNormThreads / kWarpSize; ++w) dot += parts[w];
  const float mean = dot / static_cast<float>(p.C);
  for (std::int64_t c = threadIdx.x * N; c < p.C; c += kNormThreads * N) {
    float states[N], weights[N], gradients[N];
    load_floats(states, x + c);
    load_floats(weights, weight + c);
    load_floats(gradients, gradient + c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float change = inverse * (gradients[i] * weights[i] - states[i] * inverse * mean);
      gradients[i] = active ? change : 0.0f;
    }
    store_floats(gradient + c, gradients);
  }
}

// ---- launches -------------------------------------------------------------------------------------------

std::int64_t tiles(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

template <typename T>
Status product(ProductParams params, std::int64_t sets, cudaStream_t stream) {
  params.row_tiles = tiles(params.rows, kTile), params.column_tiles = tiles(params.C, kTile);
  const std::int64_t blocks = sets * params.row_tiles * params.column_tiles;
  if (blocks == 0) return {};
  return launch("slot_head product", product_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                kSharedBytes, stream, params);
}

template <typename T>
Status norm_backward(const SlotHeadBackwardParams& params, const SlotHeadPlan& plan, NormParams norm,
                     cudaStream_t stream) {
  if (norm.slots > 0) {
    const dim3 grid(static_cast<unsigned>(tiles(norm.C, kNormColumns)),
                    static_cast<unsigned>(plan.weight_groups));
    const Status status = launch("slot_head norm_weight", norm_weight_kernel<T>, grid,
                                 dim3(kElementwiseThreads), 0, stream, norm);
    if (!status.ok()) return status;
  }
  const Status status =
      launch("slot_head norm_weight_sum", norm_weight_sum_kernel<T>,
             dim3(static_cast<unsigned>(tiles(norm.C, kElementwiseThreads))), dim3(kElementwiseThreads), 0,
             stream, static_cast<T*>(params.grad_norm_weight), norm.weight_sums, plan.weight_groups, norm.C);
  if (!status.ok() || norm.slots == 0) return status;
  return launch("slot_head norm_states", norm_states_kernel<T>, dim3(static_cast<unsigned>(norm.slots)),
                dim3(kNormThreads), 0, stream, norm);
}

template <typename T>
Status backward(const SlotHeadBackwardParams& params, cudaStream_t stream) {
  const SlotHeadInputs& in = params.inputs;
  const bool normed = in.norm_weight != nullptr;
  const SlotHeadPlan plan =
      slot_head_plan(SlotHeadCall::backward, in.B, in.G, in.S, in.C, in.V, sizeof(T), in.shared_rows,
                     in.valid != nullptr, normed, -1, params.slots_at_once);
  const std::int64_t slots = in.B * in.G * in.S;
  float* const inverse = normed ? reinterpret_cast<float*>(in.workspace + plan.inverse) : nullptr;
  auto* const factor = reinterpret_cast<float*>(in.workspace + plan.factor);
  std::uint8_t* const active = in.workspace + plan.active;
  if (slots > 0) {
    const dim3 grid(static_cast<unsigned>(tiles(slots, kElementwiseThreads)));
    const Status status = launch("slot_head factor", factor_kernel, grid, dim3(kElementwiseThreads), 0,
                                 stream, factor, active, params.grad_loss, params.target, slots);
    if (!status.ok()) return status;
  }
  if (normed) {
    if (Status status = launch_normalise(in, plan, inverse, stream); !status.ok()) return status;
  }

  LogitsParams logits{};
  logits.mode = LogitsMode::gradient;
  logits.states = normed ? normed_vectors(in, plan) : state_vectors(in, plan);
  logits.rows = row_vectors(in, plan);
  logits.set_slots = plan.set_slots;
  logits.row_tiles = plan.row_tiles;
  logits.C = in.C, logits.V = static_cast<int>(in.V), logits.scale = in.scale;
  logits.valid = in.valid, logits.valid_stride = in.valid_stride_b;
  logits.target = params.target;
  logits.logsumexp = params.logsumexp, logits.target_logsumexp = params.target_logsumexp;
  logits.factor = factor, logits.active = active;
  logits.gradient = in.workspace + plan.gradient;
  logits.gradient_by_row = in.workspace + plan.gradient_by_row;
  logits.chunk = plan.chunk, logits.row_pitch = plan.row_pitch;

  ProductParams by_slot{};  // grad_normed = D rows
  by_slot.left = logits.gradient;
  by_slot.left_stride = plan.chunk * plan.row_pitch, by_slot.left_pitch = plan.row_pitch;
  by_slot.right = logits.rows;
  by_slot.there = in.valid, by_slot.there_stride = in.valid_stride_b;
  by_slot.depth = in.V, by_slot.C = in.C, by_slot.segments = 1;
  by_slot.out.data = params.grad_states, by_slot.out.set_stride = plan.set_slots * in.C;
  by_slot.out.stride = in.C;
  by_slot.last = true;

  ProductParams by_row{};  // grad_rows = D^T normed
  const std::int64_t row_sets = in.shared_rows ? 1 : in.B;
  by_row.left = logits.gradient_by_row;
  by_row.left_stride = in.V * plan.chunk, by_row.left_pitch = plan.chunk;
  by_row.right = logits.states;
  by_row.there_stride = plan.set_slots;
  by_row.rows = in.V, by_row.C = in.C;
  by_row.segments = static_cast<int>(in.shared_rows ? plan.sets : 1);
  by_row.out.data = params.grad_rows, by_row.out.set_stride = in.V * in.C, by_row.out.stride = in.C;
  if (plan.chunks > 1) by_row.sums = reinterpret_cast<float*>(in.workspace + plan.row_sums);

  for (std::int64_t c = 0; c < plan.chunks; ++c) {
    logits.first = c * plan.chunk;
    logits.count = std::min(plan.chunk, plan.set_slots - logits.first);
    logits.slot_tiles = tiles(logits.count, plan.tile_slots);
    if (Status status = launch_logits(logits, in.dtype, plan, stream); !status.ok()) return status;
    by_slot.rows = logits.count, by_slot.out_first = logits.first;
    if (Status status = product<T>(by_slot, plan.sets, stream); !status.ok()) return status;
    by_row.depth = logits.count, by_row.right_first = logits.first;
    by_row.there = active + logits.first;
    by_row.add = c > 0, by_row.last = c + 1 == plan.chunks;
    if (Status status = product<T>(by_row, row_sets, stream); !status.ok()) return status;
  }
  if (!normed) return {};
  NormParams norm{};
  norm.states = state_vectors(in, plan);
  norm.inverse = inverse, norm.active = active, norm.weight = in.norm_weight;
  norm.grad_states = params.grad_states;
  norm.weight_sums = reinterpret_cast<float*>(in.workspace + plan.weight_sums);
  norm.slots = slots, norm.set_slots = plan.set_slots, norm.C = in.C, norm.group = plan.weight_group;
  return norm_backward<T>(params, plan, norm, stream);
}

}  // namespace
}  // namespace slot_head_detail

Status slot_head_cross_entropy_backward(const SlotHeadBackwardParams& params, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (params.inputs.dtype) {
    case DType::bfloat16: return slot_head_detail::backward<__nv_bfloat16>(params, stream);
    case DType::float16: return slot_head_detail::backward<__half>(params, stream);
    default: return slot_head_detail::backward<float>(params, stream);
  }
}

}  // namespace visionllm::cuda
