// Slots compared with the rows that they may take; the contract is in visionllm/slot_head.h, the backward in
// slot_head_backward.cu. Three kernels:
//
//   normalise  each state's RMS norm, rounded to the states' type                       states -> normed
//   logits     a block's tile of 64 or 128 slots x 64 or 128 rows: cp.async pipeline of three or four stages,
//              mma.sync, logits in shared memory; leaves a SlotHeadPartial per slot and tile
//   merge      a warp per slot joins the partials of its row tiles
//
// Logits do not leave shared memory but where probabilities are asked for. An expectation needs the logits
// around an argmax that is not known before all tiles are done: each tile leaves its logits around its own
// argmax (2 window + 1) and at its edges (window each), 25 numbers instead of 64 or 128 for a window of 6.
//
// A tile of 64 states of 4096 16-bit channels has 512 KiB, so normed states cannot stay in shared memory over
// the rows: they are written once and come back from the L2 cache.
//
// Counted in bfloat16 with 4096 channels, norm and a window of 6:
//                              500 slots x 1537 rows            4900 slots x 1025 rows
//   least possible             16.7 MB, 6.30 GFLOP              48.5 MB, 41.1 GFLOP
//   tiles                      8 x 13 of 64 x 128               39 x 9 of 128 x 128
//   multiplied                 6.58 GFLOP (1.04 x)              42.6 GFLOP (1.04 x): by half tiles of slots, 32 rows
//   states and rows, HBM       16.7 MB                          48.5 MB
//   normed, out and in, L2     8.2 MB                           80.3 MB
//   partials, near, out and in 1.6 MB (all logits: 6.1)         10.9 MB (all logits: 40.2)
//   L2 to multiprocessors      154 MB; the busiest of 132       689 MB; the busiest takes 3 tiles, 6 MiB
//                              takes 1 tile, 1.5 MiB
#include "slot_head.h"

#include <cmath>

#include "slot_head_tile.cuh"

namespace visionllm::cuda {
namespace slot_head_detail {
namespace {

constexpr int kNormThreads = 128;
constexpr int kMergeWarps = 8;

// Two warps share a tile's slots, and each warp has 32 of its rows.
template <int Rows>
constexpr int kLogitsThreads = 2 * kWarpSize * (Rows / kStepLines);
template <int Slots>
constexpr int kLogitsStages = Slots == 128 ? 3 : 4;
template <int Slots, int Rows>
constexpr int kLogitsSharedBytes = kLogitsStages<Slots> * (Slots + Rows) * kLineBytes;
// Of a multiprocessor: what the registers let in, and for 16-bit types the 227 KiB of shared memory too.
template <typename T, int Rows>
constexpr int kLogitsBlocks = sizeof(T) == 4 ? 1 : (Rows == 128 ? 2 : 3);

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }
__device__ __forceinline__ float finite_or_zero(float x) { return is_finite(x) ? x : 0.0f; }
// sum * exp(shift), where a sum of nothing stays nothing however large the shift.
__device__ __forceinline__ float rescaled(float sum, float shift) {
  return sum == 0.0f ? 0.0f : sum * expf(shift);
}

// ---- normalise ------------------------------------------------------------------------------------------

// One block per slot.
template <typename T>
__global__ __launch_bounds__(kNormThreads) void normalise_kernel(T* normed, float* inverse, Vectors states,
                                                                 std::int64_t set_slots, std::int64_t C,
                                                                 const T* weight, float epsilon) {
  VISIONLLM_SHARED_ARRAY(float, sums, kNormThreads / kWarpSize);
  constexpr int N = kVectorSize<T>;
  const std::int64_t slot = blockIdx.x;
  const std::int64_t set = slot / set_slots;
  const T* const x = states.at<T>(set, static_cast<std::uint32_t>(slot - set * set_slots));
  float square = 0.0f;
  for (std::int64_t c = threadIdx.x * N; c < C; c += kNormThreads * N) {
    float values[N];
    load_floats(values, x + c);
#pragma unroll
    for (int i = 0; i < N; ++i) square += values[i] * values[i];
  }
  square = warp_sum(square);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = square;
  __syncthreads();
  square = 0.0f;
#pragma unroll
  for (int w = 0; w < kNormThreads / kWarpSize; ++w) square += sums[w];
  const float scale = rsqrtf(square / static_cast<float>(C) + epsilon);
  if (inverse != nullptr && threadIdx.x == 0) inverse[slot] = scale;
  for (std::int64_t c = threadIdx.x * N; c < C; c += kNormThreads * N) {
    float values[N], weights[N];
    load_floats(values, x + c);
    load_floats(weights, weight + c);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = values[i] * scale * weights[i];
    store_floats(normed + slot * C + c, values);
  }
}

// ---- logits ---------------------------------------------------------------------------------------------

// A block's tile, after the product: logits of `slots` slots and `rows` rows in shared memory.
template <int Slots, int Rows>
struct LogitsTile {
  static constexpr int kColumns = Rows / kWarpSize;  // rows of a lane: lane, lane + 32, ...
  static constexpr int kPitch = Rows + 1;            // reading along slots meets all banks too
  float* logits;                                     // [Slots, kPitch]
  std::int64_t set, first_slot, first_row;           // the first slot counted in its set
  std::int64_t row_tile;
  int slots, rows;
  bool allowed[kColumns];  // this lane's rows

  __device__ __forceinline__ float logit(int slot, int j, int lane) const {
    return allowed[j] ? logits[slot * kPitch + lane + j * kWarpSize] : -INFINITY;
  }
};

// The target's exponent at a row: see the contract.
__device__ __forceinline__ float target_exponent(const SlotHeadTarget& target, std::int64_t slot, int row,
                                                 int V, bool allowed) {
  if (target.row != nullptr) return target.row[slot] == row ? 0.0f : -INFINITY;
  const float last = static_cast<float>(V - 1);
  float centre = target.centre[slot];
  centre = centre < 0.0f ? 0.0f : centre > last ? last : centre;  // NaN stays
  const float distance = static_cast<float>(row) - centre;
  return allowed ? -distance * distance * target.inverse_variance : -INFINITY;
}

// Prediction and cross-entropy: one warp per slot writes its partial.
template <int Slots, int Rows>
__device__ void reduce_slot(const LogitsParams& p, const LogitsTile<Slots, Rows>& t, int local, int lane) {
  constexpr int kColumns = LogitsTile<Slots, Rows>::kColumns;
  const std::int64_t slot = t.set * p.set_slots + t.first_slot + local;
  const std::int64_t place = slot * p.row_tiles + t.row_tile;
  SlotHeadPartial partial{-INFINITY, 0.0f, -INFINITY, 0.0f, 0.0f, -1};
  int best = Rows;  // beyond all
  float x[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    x[j] = t.logit(local, j, lane);
    if (x[j] > partial.max) partial.max = x[j], best = lane + j * kWarpSize;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, partial.max, offset);
    const int other_best = __shfl_xor_sync(kFullWarp, best, offset);
    if (other > partial.max || (other == partial.max && other_best < best))
      partial.max = other, best = other_best;
  }
  const float shift = finite_or_zero(partial.max);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) partial.sum += expf(x[j] - shift);  // NaN stays
  partial.sum = warp_sum(partial.sum);
  if (best < Rows) partial.best = static_cast<int>(t.first_row) + best;

  if (p.mode == LogitsMode::cross_entropy) {
    float e[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int row = lane + j * kWarpSize;
      e[j] = row < t.rows
                 ? target_exponent(p.target, slot, static_cast<int>(t.first_row) + row, p.V, t.allowed[j])
                 : -INFINITY;
      partial.target_max = fmaxf(partial.target_max, e[j]);
    }
    partial.target_max = warp_max(partial.target_max);
    const float target_shift = finite_or_zero(partial.target_max);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float weight = expf(e[j] - target_shift);
      partial.target_sum += weight;
      // A weight of nothing on a logit of minus infinity is nothing.
      partial.target_product += weight == 0.0f ? 0.0f : weight * x[j];
    }
    partial.target_sum = warp_sum(partial.target_sum);
    partial.target_product = warp_sum(partial.target_product);
  }
  if (lane == 0) p.partials[place] = partial;

  if (p.near != nullptr) {
    const int w = p.window, count = 4 * w + 1;
    for (int i = lane; i < count; i += kWarpSize) {
      // The first w rows of the tile, its last w, and those around its best.
      const int row = i < w ? i : i < 2 * w ? Rows - 2 * w + i : best - 3 * w + i;
      const bool there = row >= 0 && row < t.rows && (i < 2 * w || best < Rows) &&
                         (p.valid == nullptr || p.valid[t.set * p.valid_stride + t.first_row + row] != 0);
      p.near[place * count + i] = there ? t.logits[local * LogitsTile<Slots, Rows>::kPitch + row] : -INFINITY;
    }
  }
  if (p.probabilities != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int row = lane + j * kWarpSize;
      if (row < t.rows) p.probabilities[slot * p.V + t.first_row + row] = x[j];
    }
  }
}

// Gradient of the loss with respect to normed . row: factor * (probability - target) * scale. Lines beyond
// the end of slots and of rows become zeros, which the products read up to a multiple of 16 bytes.
template <typename T, int Slots, int Rows>
__device__ void gradient_tile(const LogitsParams& p, const LogitsTile<Slots, Rows>& t, int warp, int lane) {
  constexpr int kColumns = LogitsTile<Slots, Rows>::kColumns, kPitch = LogitsTile<Slots, Rows>::kPitch;
  constexpr int kWarps = kLogitsThreads<Rows> / kWarpSize;
  const std::int64_t first_in_chunk = t.first_slot - p.first;
  for (int local = warp; local < Slots; local += kWarps) {
    const std::int64_t slot = t.set * p.set_slots + t.first_slot + local;
    const bool active = local < t.slots && p.active[slot] != 0;
    T* const line =
        static_cast<T*>(p.gradient) + (t.set * p.chunk + first_in_chunk + local) * p.row_pitch + t.first_row;
    const float factor = active ? p.factor[slot] * p.scale : 0.0f;
    const float logsumexp = active ? p.logsumexp[slot] : 0.0f;
    const float target_logsumexp = active ? p.target_logsumexp[slot] : 0.0f;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int row = lane + j * kWarpSize;
      float gradient = 0.0f;
      if (active && t.allowed[j]) {
        const float e = target_exponent(p.target, slot, static_cast<int>(t.first_row) + row, p.V, true);
        gradient = factor * (expf(t.logit(local, j, lane) - logsumexp) - expf(e - target_logsumexp));
      }
      t.logits[local * kPitch + row] = gradient;
      if (t.first_row + row < p.row_pitch) line[row] = from_float<T>(gradient);
    }
  }
  __syncthreads();
  for (int row = warp; row < t.rows; row += kWarps) {
    T* const line =
        static_cast<T*>(p.gradient_by_row) + (t.set * p.V + t.first_row + row) * p.chunk + first_in_chunk;
#pragma unroll
    for (int j = 0; j < Slots / kWarpSize; ++j) {
      const int local = lane + j * kWarpSize;
      line[local] = from_float<T>(t.logits[local * kPitch + row]);
    }
  }
}

template <typename T, int Slots, int Rows>
__global__ __launch_bounds__(kLogitsThreads<Rows>,
                             kLogitsBlocks<T, Rows>) void logits_kernel(LogitsParams p) {
  constexpr int kThreads = kLogitsThreads<Rows>, kStages = kLogitsStages<Slots>;
  constexpr int kElements = kLineElements<T>, kChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kLinesPerPass = kThreads / 8;
  constexpr int kLeftPasses = Slots / kLinesPerPass, kRightPasses = Rows / kLinesPerPass;
  constexpr int kLeftBytes = Slots * kLineBytes, kStageBytes = kLeftBytes + Rows * kLineBytes;
  constexpr int M = Slots / 32;  // mma above each other in a warp
  constexpr int kAtOnce = kStepsAtOnce<T>;
  static_assert(Slots * (Rows + 1) * 4 <= kLogitsSharedBytes<Slots, Rows>,
                "logits take the pipeline's memory");
  VISIONLLM_DYNAMIC_SHARED(shared);

  LogitsTile<Slots, Rows> tile;
  tile.row_tile = blockIdx.x % p.row_tiles;  // neighbours in time share slots, and all rows stay in L2
  const std::int64_t rest = blockIdx.x / p.row_tiles;
  const std::int64_t slot_tile = rest % p.slot_tiles;
  tile.set = rest / p.slot_tiles;
  tile.first_slot = p.first + slot_tile * Slots;
  tile.first_row = tile.row_tile * Rows;
  const std::int64_t slots_left = p.first + p.count - tile.first_slot, rows_left = p.V - tile.first_row;
  tile.slots = static_cast<int>(slots_left < Slots ? slots_left : Slots);
  tile.rows = static_cast<int>(rows_left < Rows ? rows_left : Rows);

  // Thread i copies chunk i % 8 of lines i / 8, i / 8 + kLinesPerPass, ... of slots and of rows.
  const int chunk = threadIdx.x % 8, line = threadIdx.x / 8;
  const std::uint8_t* const valid =
      p.valid == nullptr ? nullptr : p.valid + tile.set * p.valid_stride + tile.first_row;
  const T* left[kLeftPasses];
  const T* right[kRightPasses];
  bool left_there[kLeftPasses], right_there[kRightPasses];
#pragma unroll
  for (int i = 0; i < kLeftPasses; ++i) {
    const int l = line + i * kLinesPerPass;
    left_there[i] = l < tile.slots;
    left[i] = p.states.at<T>(tile.set, static_cast<std::uint32_t>(tile.first_slot + (left_there[i] ? l : 0)));
  }
#pragma unroll
  for (int i = 0; i < kRightPasses; ++i) {
    const int l = line + i * kLinesPerPass;
    right_there[i] = l < tile.rows && (valid == nullptr || valid[l] != 0);
    right[i] = p.rows.at<T>(tile.set, static_cast<std::uint32_t>(tile.first_row + (right_there[i] ? l : 0)));
  }
  const auto fetch = [&](int stage, std::int64_t first) {
    unsigned char* const lines = shared + stage * kStageBytes;
    const std::int64_t c = first + chunk * kChunk;
    const bool inside = c < p.C;
#pragma unroll
    for (int i = 0; i < kLeftPasses; ++i) {
      copy_async_16(line_chunk(lines, line + i * kLinesPerPass, chunk), left[i] + (inside ? c : 0),
                    inside && left_there[i]);
    }
#pragma unroll
    for (int i = 0; i < kRightPasses; ++i) {
      copy_async_16(line_chunk(lines + kLeftBytes, line + i * kLinesPerPass, chunk),
                    right[i] + (inside ? c : 0), inside && right_there[i]);
    }
  };

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_slot = warp % 2 * (Slots / 2), warp_row = warp / 2 * kStepLines;
  const bool multiplies = warp_slot < tile.slots && warp_row < tile.rows;
  float sums[M][4][4] = {};
  const int count = static_cast<int>((p.C + kElements - 1) / kElements);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) fetch(s, static_cast<std::int64_t>(s) * kElements);
    copy_async_commit();
  }
  for (int k = 0; k < count; ++k) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const int next = k + kStages - 1;
    if (next < count) fetch(next % kStages, static_cast<std::int64_t>(next) * kElements);
    copy_async_commit();
    if (multiplies) {
      unsigned char* const lines = shared + k % kStages * kStageBytes;
#pragma unroll kAtOnce
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t a[M][4], b[4][2];
        load_left(a, lines, warp_slot, step);
        load_right(b, lines + kLeftBytes, warp_row, step);
        multiply<T>(sums, a, b);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  tile.logits = reinterpret_cast<float*>(shared);
  constexpr int kPitch = LogitsTile<Slots, Rows>::kPitch;
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int slot = warp_slot + 16 * i + lane / 4 + k / 2 * 8;
        const int row = warp_row + 8 * j + lane % 4 * 2 + k % 2;
        tile.logits[slot * kPitch + row] = sums[i][j][k] * p.scale;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < LogitsTile<Slots, Rows>::kColumns; ++j) {
    const int row = lane + j * kWarpSize;
    tile.allowed[j] = row < tile.rows && (valid == nullptr || valid[row] != 0);
  }
  __syncthreads();
  if (p.mode == LogitsMode::gradient) {
    gradient_tile<T, Slots, Rows>(p, tile, warp, lane);
  } else {
    for (int local = warp; local < tile.slots; local += kThreads / kWarpSize)
      reduce_slot<Slots, Rows>(p, tile, local, lane);
  }
}

// ---- merge ----------------------------------------------------------------------------------------------

struct MergeParams {
  std::int64_t slots, row_tiles;
  int V, tile_rows;
  const SlotHeadPartial* partials;  // [slots, row_tiles]
  float* logsumexp;                 // [slots], as the other outputs
  // prediction
  std::int64_t* best;
  float* probability;
  float* expectation;  // or null
  const float* near;   // [slots, row_tiles, 4 window + 1]
  int window;
  float offset;
  float* probabilities;  // [slots, V] or null: logits before
  // cross-entropy
  SlotHeadTarget target;
  float* loss;  // null in prediction
  float* target_logsumexp;
};

// One warp per slot.
__global__ __launch_bounds__(kMergeWarps* kWarpSize) void merge_kernel(MergeParams p) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (slot >= p.slots) return;
  const SlotHeadPartial* const partials = p.partials + slot * p.row_tiles;
  float max = -INFINITY, target_max = -INFINITY;
  int best = p.V;  // beyond all
  for (std::int64_t t = lane; t < p.row_tiles; t += kWarpSize) {
    if (partials[t].max > max) max = partials[t].max, best = partials[t].best;
    target_max = fmaxf(target_max, partials[t].target_max);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, max, offset);
    const int other_best = __shfl_xor_sync(kFullWarp, best, offset);
    if (other > max || (other == max && other_best < best)) max = other, best = other_best;
  }
  target_max = warp_max(target_max);
  const float shift = finite_or_zero(max), target_shift = finite_or_zero(target_max);
  float sum = 0.0f, target_sum = 0.0f, target_product = 0.0f;
  for (std::int64_t t = lane; t < p.row_tiles; t += kWarpSize) {
    const SlotHeadPartial partial = partials[t];
    sum += rescaled(partial.sum, finite_or_zero(partial.max) - shift);
    const float target_move = finite_or_zero(partial.target_max) - target_shift;
    target_sum += rescaled(partial.target_sum, target_move);
    target_product += rescaled(partial.target_product, target_move);
  }
  sum = warp_sum(sum);
  const float logsumexp = logf(sum) + shift;
  const bool finite = is_finite(logsumexp);
  if (lane == 0) p.logsumexp[slot] = logsumexp;

  if (p.loss != nullptr) {
    target_sum = warp_sum(target_sum), target_product = warp_sum(target_product);
    if (lane == 0) {
      const float weight = p.target.weight == nullptr ? 1.0f : p.target.weight[slot];
      const bool ignored = weight == 0.0f || (p.target.row != nullptr && p.target.row[slot] < 0);
      // Both relative to the maximum: a certain and right slot's loss keeps its digits.
      const float loss = logf(sum) - (target_product / target_sum - shift);
      p.loss[slot] = ignored ? 0.0f : weight * loss;
      p.target_logsumexp[slot] = logf(target_sum) + target_shift;
    }
    return;
  }

  if (lane == 0) {
    p.best[slot] = finite ? best : -1;
    p.probability[slot] = finite ? 1.0f / sum : NAN;
  }
  if (p.expectation != nullptr) {
    const int w = p.window, count = 4 * w + 1;
    const std::int64_t own = best / p.tile_rows;
    const float* const near = p.near + slot * p.row_tiles * count;
    float total = 0.0f, moment = 0.0f;
    for (int i = lane; finite && i < 2 * w + 1; i += kWarpSize) {
      const int row = best - w + i;
      if (row < 0 || row >= p.V) continue;
      const std::int64_t t = row / p.tile_rows;
      const int place = t == own  ? 2 * w + i
                        : t > own ? row - static_cast<int>(t * p.tile_rows)
                                  : row - static_cast<int>((t + 1) * p.tile_rows) + 2 * w;
      const float weight = expf(near[t * count + place] - max);
      total += weight;
      moment += weight * static_cast<float>(i - w);
    }
    total = warp_sum(total), moment = warp_sum(moment);
    if (lane == 0)
      p.expectation[slot] = finite ? moment / total + (static_cast<float>(best) - p.offset) : NAN;
  }
  if (p.probabilities != nullptr) {
    float* const every = p.probabilities + slot * p.V;
    for (int v = lane; v < p.V; v += kWarpSize) every[v] = finite ? expf(every[v] - max) / sum : NAN;
  }
}

// ---- launches -------------------------------------------------------------------------------------------

template <typename T>
Status normalise(const SlotHeadInputs& in, const SlotHeadPlan& plan, float* inverse, cudaStream_t stream) {
  const std::int64_t slots = in.B * in.G * in.S;
  if (slots == 0) return {};
  return launch("slot_head normalise", normalise_kernel<T>, dim3(static_cast<unsigned>(slots)),
                dim3(kNormThreads), 0, stream, reinterpret_cast<T*>(in.workspace + plan.normed), inverse,
                state_vectors(in, plan), plan.set_slots, in.C, static_cast<const T*>(in.norm_weight),
                in.epsilon);
}

template <typename T, int Slots, int Rows>
Status logits(const LogitsParams& params, dim3 grid, cudaStream_t stream) {
  return launch("slot_head logits", logits_kernel<T, Slots, Rows>, grid, dim3(kLogitsThreads<Rows>),
                kLogitsSharedBytes<Slots, Rows>, stream, params);
}

template <typename T>
Status logits(const LogitsParams& params, const SlotHeadPlan& plan, cudaStream_t stream) {
  const std::int64_t blocks = plan.sets * params.slot_tiles * params.row_tiles;
  if (blocks == 0) return {};
  const dim3 grid(static_cast<unsigned>(blocks));
  if (plan.tile_slots == 128) return logits<T, 128, 128>(params, grid, stream);
  if (plan.tile_rows == 128) return logits<T, 64, 128>(params, grid, stream);
  return logits<T, 64, 64>(params, grid, stream);
}

LogitsParams logits_params(const SlotHeadInputs& in, const SlotHeadPlan& plan, LogitsMode mode) {
  LogitsParams params{};
  params.mode = mode;
  params.states = in.norm_weight == nullptr ? state_vectors(in, plan) : normed_vectors(in, plan);
  params.rows = row_vectors(in, plan);
  params.set_slots = plan.set_slots, params.count = plan.set_slots;
  params.slot_tiles = plan.slot_tiles, params.row_tiles = plan.row_tiles;
  params.C = in.C, params.V = static_cast<int>(in.V), params.scale = in.scale;
  params.valid = in.valid, params.valid_stride = in.valid_stride_b;
  params.partials = reinterpret_cast<SlotHeadPartial*>(in.workspace + plan.partials);
  return params;
}

MergeParams merge_params(const SlotHeadInputs& in, const SlotHeadPlan& plan) {
  MergeParams params{};
  params.slots = in.B * in.G * in.S, params.row_tiles = plan.row_tiles;
  params.V = static_cast<int>(in.V), params.tile_rows = static_cast<int>(plan.tile_rows);
  params.partials = reinterpret_cast<const SlotHeadPartial*>(in.workspace + plan.partials);
  return params;
}

Status merge(const MergeParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.slots + kMergeWarps - 1) / kMergeWarps);
  return launch("slot_head merge", merge_kernel, dim3(blocks), dim3(kMergeWarps * kWarpSize), 0, stream,
                params);
}

SlotHeadPlan plan_of(SlotHeadCall call, const SlotHeadInputs& in, std::int64_t window) {
  return slot_head_plan(call, in.B, in.G, in.S, in.C, in.V, in.dtype == DType::float32 ? 4 : 2,
                        in.shared_rows, in.valid != nullptr, in.norm_weight != nullptr, window, 0);
}

}  // namespace

Vectors state_vectors(const SlotHeadInputs& in, const SlotHeadPlan& plan) {
  Vectors v{};
  v.data = in.states;
  v.set_stride = plan.sets == in.B ? in.states_stride_b : 0;
  const bool slots_join = in.S == 1 || in.G == 1 || in.states_stride_g == in.S * in.states_stride_s;
  v.stride = in.S == 1 ? in.states_stride_g : in.states_stride_s;
  const bool pictures_join = plan.sets == in.B || in.states_stride_b == in.G * in.S * v.stride;
  if (slots_join && pictures_join) return v;
  v.picture_stride = in.states_stride_b, v.group_stride = in.states_stride_g;
  v.slot_stride = in.states_stride_s;
  v.per_picture = static_cast<std::uint32_t>(in.G * in.S), v.per_group = static_cast<std::uint32_t>(in.S);
  return v;
}

Vectors normed_vectors(const SlotHeadInputs& in, const SlotHeadPlan& plan) {
  Vectors v{};
  v.data = in.workspace + plan.normed;
  v.set_stride = plan.set_slots * in.C;
  v.stride = in.C;
  return v;
}

Vectors row_vectors(const SlotHeadInputs& in, const SlotHeadPlan&) {
  Vectors v{};
  v.data = in.rows;
  v.set_stride = in.shared_rows ? 0 : in.rows_stride_r;
  v.stride = in.rows_stride_v;
  return v;
}

Status launch_normalise(const SlotHeadInputs& in, const SlotHeadPlan& plan, float* inverse,
                        cudaStream_t stream) {
  switch (in.dtype) {
    case DType::bfloat16: return normalise<__nv_bfloat16>(in, plan, inverse, stream);
    case DType::float16: return normalise<__half>(in, plan, inverse, stream);
    default: return normalise<float>(in, plan, inverse, stream);
  }
}

Status launch_logits(const LogitsParams& params, DType dtype, const SlotHeadPlan& plan, cudaStream_t stream) {
  switch (dtype) {
    case DType::bfloat16: return logits<__nv_bfloat16>(params, plan, stream);
    case DType::float16: return logits<__half>(params, plan, stream);
    default: return logits<float>(params, plan, stream);
  }
}

}  // namespace slot_head_detail

Status slot_head_predict(const SlotHeadPredictParams& params, void* stream_pointer) {
  using namespace slot_head_detail;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const SlotHeadInputs& in = params.inputs;
  if (in.B * in.G * in.S == 0) return {};
  const bool expects = params.expectation != nullptr;
  const SlotHeadPlan plan = plan_of(SlotHeadCall::predict, in, expects ? params.window : -1);
  if (in.norm_weight != nullptr) {
    if (Status status = launch_normalise(in, plan, nullptr, stream); !status.ok()) return status;
  }
  LogitsParams logits = logits_params(in, plan, LogitsMode::predict);
  logits.window = params.window;
  logits.near = expects ? reinterpret_cast<float*>(in.workspace + plan.near) : nullptr;
  logits.probabilities = params.probabilities;
  if (Status status = launch_logits(logits, in.dtype, plan, stream); !status.ok()) return status;
  MergeParams merged = merge_params(in, plan);
  merged.logsumexp = params.logsumexp, merged.best = params.best, merged.probability = params.probability;
  merged.expectation = params.expectation, merged.near = logits.near, merged.window = params.window;
  merged.offset = params.offset, merged.probabilities = params.probabilities;
  return merge(merged, stream);
}

Status slot_head_cross_entropy(const SlotHeadCrossEntropyParams& params, void* stream_pointer) {
  using namespace slot_head_detail;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const SlotHeadInputs& in = params.inputs;
  if (in.B * in.G * in.S == 0) return {};
  const SlotHeadPlan plan = plan_of(SlotHeadCall::cross_entropy, in, -1);
  if (in.norm_weight != nullptr) {
    if (Status status = launch_normalise(in, plan, nullptr, stream); !status.ok()) return status;
  }
  LogitsParams logits = logits_params(in, plan, LogitsMode::cross_entropy);
  logits.target = params.target;
  if (Status status = launch_logits(logits, in.dtype, plan, stream); !status.ok()) return status;
  MergeParams merged = merge_params(in, plan);
  merged.logsumexp = params.logsumexp, merged.loss = params.loss;
  merged.target_logsumexp = params.target_logsumexp, merged.target = params.target;
  return merge(merged, stream);
}

}  // namespace visionllm::cuda
