// Launch interface of slot_head on CUDA; the contract, with the meaning of the shape letters, is in
// visionllm/slot_head.h. Arguments have been checked by cpp/slot_head.cpp. The plan of tiles and workspace is
// plain C++ and a function of the sizes only: the workspace can be sized without a device, and sums have the
// same order on every device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "visionllm/slot_head.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::cuda {

// What one block leaves of a slot's logits of its tile of rows. Maxima may be infinite: sums are relative to
// the maximum where that is finite, else to 0.
struct SlotHeadPartial {
  float max, sum;    // of the logits: maximum, sum of exp(logit - max)
  float target_max;  // training: the same of the target's exponents
  float target_sum;
  float target_product;  // training: sum of exp(exponent - target_max) * logit
  std::int32_t best;     // prediction: first row with the maximum; -1: none
};

// Slots that meet the same allowed rows are one set: a picture's, or all where neither rows nor valid are the
// picture's own. A tile lies within a set. Sections of the workspace begin at
// these bytes; what a call has no use for is empty.
struct SlotHeadPlan {
  std::int64_t sets, set_slots;  // sets * set_slots == B * G * S
  std::int64_t tile_slots, tile_rows;
  std::int64_t slot_tiles, row_tiles;  // of a set
  std::int64_t normed;                 // [slots, C] of states' type
  std::int64_t partials;               // SlotHeadPartial [slots, row_tiles]
  std::int64_t near;                   // float32 [slots, row_tiles, 4 window + 1]: see slot_head.cu
  // Backward
  std::int64_t chunk;         // slots of each set at a time; a multiple of 128
  std::int64_t chunks;        // at least 1
  std::int64_t row_pitch;     // V rounded up to a multiple of 8
  std::int64_t weight_group;  // slots whose share of grad_norm_weight one block adds up
  std::int64_t weight_groups;
  std::int64_t inverse;          // float32 [slots]: 1 / sqrt(mean square + epsilon)
  std::int64_t factor;           // float32 [slots]: grad_loss * weight
  std::int64_t active;           // uint8 [slots]: 0 where ignored
  std::int64_t gradient;         // logits' gradient of a chunk, [sets, chunk, row_pitch] of states' type
  std::int64_t gradient_by_row;  // the same as [sets, V, chunk]
  std::int64_t row_sums;         // float32 [R, V, C], where there is more than one chunk
  std::int64_t weight_sums;      // float32 [weight_groups, C]
  std::int64_t bytes;
};

inline SlotHeadPlan slot_head_plan(SlotHeadCall call, std::int64_t B, std::int64_t G, std::int64_t S,
                                   std::int64_t C, std::int64_t V, std::int64_t element_bytes, bool shared,
                                   bool masked, bool normed, std::int64_t window,
                                   std::int64_t slots_at_once) {
  const auto up = [](std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple; };
  // A multiprocessor takes its tiles in turn, each at the pace at which the lines of its slots and rows come
  // from L2: the tile with the fewest lines on the busiest of 132 multiprocessors, an H100's.
  constexpr std::int64_t kMultiprocessors = 132;
  constexpr std::int64_t kTiles[][2] = {{64, 64}, {64, 128}, {128, 128}};
  // Elements of the logits' gradient that are held at a time, in each of two layouts.
  constexpr std::int64_t kGradientElements = std::int64_t{1} << 25;
  SlotHeadPlan plan{};
  const std::int64_t slots = B * G * S;
  plan.sets = shared && !masked ? 1 : B;
  plan.set_slots = plan.sets == 0 ? 0 : slots / plan.sets;
  plan.row_pitch = up(V, 8) * 8;
  std::int64_t least = 0;
  for (const auto& tile : kTiles) {
    const std::int64_t tiles = plan.sets * up(plan.set_slots, tile[0]) * up(V, tile[1]);
    const std::int64_t lines = up(tiles, kMultiprocessors) * (tile[0] + tile[1]);
    if (plan.tile_slots != 0 && lines >= least) continue;
    least = lines, plan.tile_slots = tile[0], plan.tile_rows = tile[1];
  }
  plan.slot_tiles = up(plan.set_slots, plan.tile_slots);
  plan.row_tiles = up(V, plan.tile_rows);
  const auto section = [&plan](std::int64_t* begin, std::int64_t bytes) {
    *begin = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
  };
  section(&plan.normed, normed ? slots * C * element_bytes : 0);
  if (call != SlotHeadCall::backward) {
    section(&plan.partials, slots * plan.row_tiles * static_cast<std::int64_t>(sizeof(SlotHeadPartial)));
    section(&plan.near, window >= 0 ? slots * plan.row_tiles * (4 * window + 1) * 4 : 0);
    return plan;
  }
  const std::int64_t fitting = kGradientElements / (std::max<std::int64_t>(plan.sets, 1) * plan.row_pitch);
  plan.chunk =
      slots_at_once > 0 ? up(slots_at_once, 128) * 128 : std::max<std::int64_t>(fitting / 128, 1) * 128;
  plan.chunk = std::min(plan.chunk, up(std::max<std::int64_t>(plan.set_slots, 1), 128) * 128);
  plan.chunks = std::max<std::int64_t>(up(plan.set_slots, plan.chunk), 1);
  plan.weight_group = std::max<std::int64_t>(64, up(slots, 128));
  plan.weight_groups = up(slots, plan.weight_group);
  section(&plan.inverse, normed ? slots * 4 : 0);
  section(&plan.factor, slots * 4);
  section(&plan.active, slots);
  section(&plan.gradient, plan.sets * plan.chunk * plan.row_pitch * element_bytes);
  section(&plan.gradient_by_row, plan.sets * plan.chunk * V * element_bytes);
  section(&plan.row_sums, plan.chunks > 1 ? (shared ? 1 : B) * V * C * 4 : 0);
  section(&plan.weight_sums, normed ? plan.weight_groups * C * 4 : 0);
  return plan;
}

// What all calls share. Strides are in elements; pointers of absent tensors are null.
struct SlotHeadInputs {
  DType dtype;  // of states, rows, norm_weight and their gradients
  std::int64_t B, G, S, C, V;
  bool shared_rows;    // R is 1
  const void* states;  // [B, G, S, C]
  std::int64_t states_stride_b, states_stride_g, states_stride_s;
  const void* rows;  // [R, V, C]
  std::int64_t rows_stride_r, rows_stride_v;
  const std::uint8_t* valid;  // [B, V]
  std::int64_t valid_stride_b;
  const void* norm_weight;  // [C]
  float epsilon, scale;
  unsigned char* workspace;  // plan.bytes of them
};

struct SlotHeadTarget {
  const std::int64_t* row;  // [B, G, S]: one of these two is there
  const float* centre;
  const float* weight;     // [B, G, S] or null
  float inverse_variance;  // 1 / (2 sigma^2)
};

struct SlotHeadPredictParams {
  SlotHeadInputs inputs;
  std::int64_t* best;  // [B, G, S], as the next three
  float* probability;
  float* logsumexp;
  float* expectation;    // or null
  float* probabilities;  // [B, G, S, V] or null
  int window;
  float offset;
};

struct SlotHeadCrossEntropyParams {
  SlotHeadInputs inputs;
  SlotHeadTarget target;
  float* loss;  // [B, G, S], as the next two
  float* logsumexp;
  float* target_logsumexp;
};

struct SlotHeadBackwardParams {
  SlotHeadInputs inputs;
  SlotHeadTarget target;
  const float* grad_loss;  // [B, G, S], as the next two
  const float* logsumexp;
  const float* target_logsumexp;
  void* grad_states;       // [B, G, S, C], contiguous
  void* grad_rows;         // [R, V, C], contiguous
  void* grad_norm_weight;  // [C] or null
  std::int64_t slots_at_once;
};

// stream: a cudaStream_t. Any of B, G and S may be 0.
Status slot_head_predict(const SlotHeadPredictParams& params, void* stream);
Status slot_head_cross_entropy(const SlotHeadCrossEntropyParams& params, void* stream);
Status slot_head_cross_entropy_backward(const SlotHeadBackwardParams& params, void* stream);

}  // namespace visionllm::cuda
