// How the slot head runs on the CPU: what is shared out to threads, in which order. Included by slot_head.cpp
// only; arguments are checked already.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "check.h"
#include "cpu/slot_head.h"
#include "dispatch.h"
#include "element_of.h"
#include "parallel.h"
#include "scratch.h"
#include "visionllm/slot_head.h"

namespace visionllm {
namespace {

struct SlotHeadSizes {
  std::int64_t B, G, S, C, V, R;
};

// Multiplications and additions that are worth a thread: about 50 us of them.
constexpr double kSlotHeadWorkPerThread = 4e6;

// Bytes of a block's logits: they stay in the second-level cache, beside a tile of rows.
constexpr std::int64_t kSlotHeadLogitBytes = std::int64_t{1} << 20;

// Bytes of packed rows or slots in the backward's products; at least one panel in any case.
constexpr std::int64_t kSlotHeadPackedBytes = std::int64_t{4} << 20;

// Elements of the logits' gradient that are held at a time, in each of two layouts.
constexpr std::int64_t kSlotHeadGradientElements = std::int64_t{1} << 25;

inline cpu::SlotHeadParams slot_head_params(const TensorView& states, const TensorView& rows,
                                            const TensorView& row_scale, const TensorView& valid,
                                            const TensorView& norm_weight, double epsilon, double scale,
                                            const SlotHeadSizes& n) {
  cpu::SlotHeadParams p{};
  p.element = element_of(states.dtype), p.rows_element = element_of(rows.dtype);
  p.B = n.B, p.G = n.G, p.S = n.S, p.C = n.C, p.V = n.V;
  p.shared_rows = n.R == 1;
  p.sets = p.shared_rows && valid.absent() ? 1 : n.B;
  p.set_slots = p.sets == 0 ? 0 : n.B * n.G * n.S / p.sets;
  p.states = states.data;
  p.states_stride_b = states.strides[0], p.states_stride_g = states.strides[1];
  p.states_stride_s = states.strides[2];
  p.rows = rows.data, p.rows_stride_r = rows.strides[0], p.rows_stride_v = rows.strides[1];
  p.row_scale = static_cast<const float*>(row_scale.data);
  p.row_scale_stride = row_scale.absent() ? 0 : row_scale.strides[0];
  p.valid = static_cast<const std::uint8_t*>(valid.data);
  p.valid_stride_b = valid.absent() ? 0 : valid.strides[0];
  p.norm_weight = norm_weight.data;
  p.epsilon = static_cast<float>(epsilon), p.scale = static_cast<float>(scale);
  const std::int64_t fitting = kSlotHeadLogitBytes / (4 * n.V) / 64 * 64;
  const std::int64_t groups = (p.set_slots + cpu::kSlotGroup - 1) / cpu::kSlotGroup;
  p.block = std::min(std::clamp<std::int64_t>(fitting, 64, 256),
                     std::max<std::int64_t>(groups, 1) * cpu::kSlotGroup);
  return p;
}

inline void slot_head_target(const TensorView& target, const TensorView& weight, double sigma,
                             cpu::SlotHeadParams* p) {
  if (target.dtype == DType::float32) {
    p->target_centre = static_cast<const float*>(target.data);
    p->inverse_variance = static_cast<float>(1 / (2 * sigma * sigma));
  } else {
    p->target_row = static_cast<const std::int64_t*>(target.data);
  }
  p->weight = static_cast<const float*>(weight.data);
}

// Runs kernel on `items` items, with `bytes` of memory for each thread.
inline void slot_head_parallel(cpu::SlotHeadKernel kernel, const cpu::SlotHeadParams& p, std::int64_t items,
                               std::int64_t bytes, int threads) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, items));
  if (items == 0) return;
  const Scratch memory(bytes, threads);
  parallel_for(items, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    if (begin < end) kernel(p, begin, end, memory.part<void>(worker));
  });
}

inline int slot_head_threads(const cpu::SlotHeadParams& p, const Execution& execution) {
  const double work = 2.0 * static_cast<double>(p.sets * p.set_slots) * p.V * p.C;
  return static_cast<int>(
      std::clamp<double>(work / kSlotHeadWorkPerThread, 1.0, std::max(execution.threads, 1)));
}

// Prediction or cross-entropy, whichever kernel it is.
inline Status slot_head_forward_on_cpu(cpu::SlotHeadKernel kernel, const cpu::SlotHeadParams& p,
                                       const Execution& execution) {
  const std::int64_t groups = p.sets * ((p.set_slots + cpu::kSlotGroup - 1) / cpu::kSlotGroup);
  slot_head_parallel(kernel, p, groups, cpu::slot_head_block_memory(p).bytes,
                     slot_head_threads(p, execution));
  return {};
}

inline std::int64_t slot_head_columns(std::int64_t depth) {
  const std::int64_t fitting = kSlotHeadPackedBytes / (4 * std::max<std::int64_t>(depth, 1));
  return std::clamp<std::int64_t>(fitting / cpu::kSlotColumns, 1, 4) * cpu::kSlotColumns;
}

inline void slot_head_fill_zero(const TensorView& tensor) {  // contiguous
  if (!tensor.absent() && tensor.size() > 0)
    std::memset(tensor.data, 0, static_cast<std::size_t>(tensor.size() * element_size(tensor.dtype)));
}

// Chunk by chunk of slots: the logits' gradient, then its two products; at the end the norm.
inline Status slot_head_backward_on_cpu(const TensorView& grad_states, const TensorView& grad_rows,
                                        const TensorView& grad_norm_weight, std::int64_t slots_at_once,
                                        cpu::SlotHeadParams p, const Execution& execution) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  const std::int64_t slots = p.sets * p.set_slots;
  if (slots == 0) {
    slot_head_fill_zero(grad_rows);
    slot_head_fill_zero(grad_norm_weight);
    return {};
  }
  const int threads = slot_head_threads(p, execution);
  const std::int64_t element = cpu::element_bytes(p.element);
  const std::int64_t fitting = kSlotHeadGradientElements / (p.sets * p.V);
  const std::int64_t wanted = std::max<std::int64_t>(slots_at_once > 0 ? slots_at_once : fitting, 1);
  const std::int64_t chunk = std::min((wanted + 127) / 128 * 128, p.set_slots);
  const bool with_rows = !grad_rows.absent();
  const Scratch normed(p.sets * chunk * p.C * element), inverse_norm(slots * 4);
  const Scratch gradient(p.sets * chunk * p.V * element);
  const Scratch gradient_by_row(with_rows ? p.sets * chunk * p.V * element : 0);
  const bool summing = with_rows && chunk < p.set_slots && p.element != cpu::Element::float32;
  const Scratch row_sums(summing ? grad_rows.size() * 4 : 0);
  p.grad_states = grad_states.data, p.grad_rows = grad_rows.data;
  p.grad_norm_weight = grad_norm_weight.data;
  p.normed = normed.part<void>(), p.inverse_norm = inverse_norm.part<float>();
  p.gradient = gradient.part<void>(), p.gradient_by_row = gradient_by_row.part<void>();
  p.row_sums = row_sums.part<float>();

  const std::int64_t panels = (p.C + cpu::kSlotColumns - 1) / cpu::kSlotColumns;
  for (p.chunk_begin = 0; p.chunk_begin < p.set_slots; p.chunk_begin += p.chunk) {
    p.chunk = std::min(chunk, p.set_slots - p.chunk_begin);
    p.first_chunk = p.chunk_begin == 0, p.last_chunk = p.chunk_begin + p.chunk == p.set_slots;
    const std::int64_t groups = p.sets * ((p.chunk + cpu::kSlotGroup - 1) / cpu::kSlotGroup);
    slot_head_parallel(VISIONLLM_KERNEL(isa, slot_head_gradient_kernel), p, groups,
                       cpu::slot_head_block_memory(p).bytes, threads);
    p.columns = slot_head_columns(p.V);
    slot_head_parallel(VISIONLLM_KERNEL(isa, slot_head_grad_states_kernel), p, p.sets * panels,
                       cpu::slot_head_grad_states_memory(p), threads);
    if (!with_rows) continue;
    p.columns = slot_head_columns(p.shared_rows ? p.sets * p.chunk : p.chunk);
    slot_head_parallel(VISIONLLM_KERNEL(isa, slot_head_grad_rows_kernel), p,
                       (p.shared_rows ? 1 : p.sets) * panels, cpu::slot_head_grad_rows_memory(p), threads);
  }
  if (p.norm_weight == nullptr) return {};
  slot_head_parallel(VISIONLLM_KERNEL(isa, slot_head_grad_norm_weight_kernel), p, panels,
                     (p.C + cpu::kSlotGroup) * 4, threads);
  slot_head_parallel(VISIONLLM_KERNEL(isa, slot_head_norm_backward_kernel), p, slots, 0, threads);
  return {};
}

}  // namespace
}  // namespace visionllm
