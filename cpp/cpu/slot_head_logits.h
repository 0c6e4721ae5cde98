// What the kernels of the slot head share: the norm, the logits of a block of slots, the weights of a target
// that is spread over the rows, softmax and loss. Included by the kernel sources only, once per instruction set (simd.h).
#pragma once

#include "cpu/exp2.h"
#include "cpu/matmul.h"
#include "cpu/slot_head.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

VISIONLLM_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

VISIONLLM_INLINE float lane_sum(F a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

template <typename T>
VISIONLLM_INLINE F load_up_to(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_partial(p, static_cast<int>(n));
}

template <typename T>
VISIONLLM_INLINE void store_up_to(T* p, F v, int64_t n) {
  if (n >= kWidth) {
    store(p, v);
  } else {
    store_partial(p, v, static_cast<int>(n));
  }
}

// exp(x) for x <= 0
VISIONLLM_INLINE F exp_below(F x) { return exp2(x * set(kLog2E)); }

// ---- slots ------------------------------------------------------------------------------------------------

// Slots that lie one after the other in a set.
struct Block {
  int64_t slot_set, begin, count;  // begin: of the set's slots
  int64_t slot;                    // number of the first among all
};

// Runs body(block) on blocks that make up the groups [begin, end), of `slots` slots of each set from
// `first` on.
template <typename Body>
VISIONLLM_INLINE void for_blocks(const SlotHeadParams& p, int64_t first, int64_t slots, int64_t begin,
                                 int64_t end, const Body& body) {
  const int64_t groups = (slots + kSlotGroup - 1) / kSlotGroup;  // of a set
  for (int64_t group = begin; group < end;) {
    const int64_t slot_set = group / groups, from = group % groups;
    const int64_t to = at_most(at_most(groups, from + end - group), from + p.block / kSlotGroup);
    const int64_t in_set = first + from * kSlotGroup;
    body(Block{slot_set, in_set, at_most(to * kSlotGroup, slots) - from * kSlotGroup,
               slot_set * p.set_slots + in_set});
    group += to - from;
  }
}

template <typename T>
VISIONLLM_INLINE const T* state_of(const SlotHeadParams& p, int64_t slot) {
  const int64_t s = slot % p.S, g = slot / p.S % p.G, b = slot / p.S / p.G;
  return static_cast<const T*>(p.states) + b * p.states_stride_b + g * p.states_stride_g +
         s * p.states_stride_s;
}

VISIONLLM_INLINE bool is_ignored(const SlotHeadParams& p, int64_t slot) {
  return (p.target_row != nullptr && p.target_row[slot] < 0) ||
         (p.weight != nullptr && p.weight[slot] == 0.0f);
}

VISIONLLM_INLINE const uint8_t* valid_of(const SlotHeadParams& p, int64_t slot_set) {
  return p.valid == nullptr ? nullptr : p.valid + slot_set * p.valid_stride_b;
}

// R and the set's own number in rows and row_scale: sets are pictures unless all rows are shared.
template <typename R>
VISIONLLM_INLINE const R* rows_of(const SlotHeadParams& p, int64_t slot_set) {
  return static_cast<const R*>(p.rows) + (p.shared_rows ? 0 : slot_set) * p.rows_stride_r;
}
VISIONLLM_INLINE const float* row_scale_of(const SlotHeadParams& p, int64_t slot_set) {
  return p.row_scale == nullptr ? nullptr : p.row_scale + (p.shared_rows ? 0 : slot_set) * p.row_scale_stride;
}

// Writes the normed state; returns 1 / sqrt(mean square + epsilon).
template <typename T>
VISIONLLM_INLINE float normalise(const SlotHeadParams& p, const T* state, T* normed) {
  if (p.norm_weight == nullptr) {
    memcpy(normed, state, static_cast<size_t>(p.C) * sizeof(T));
    return 1.0f;
  }
  F squares[2] = {set(0.0f), set(0.0f)};
  for (int64_t c = 0; c < p.C; c += 2 * kWidth) {
    const F x = load_up_to(state + c, p.C - c);
    squares[0] = mul_add(x, x, squares[0]);
    if (c + kWidth < p.C) {
      const F y = load_up_to(state + c + kWidth, p.C - c - kWidth);
      squares[1] = mul_add(y, y, squares[1]);
    }
  }
  const float mean = lane_sum(squares[0] + squares[1]) / static_cast<float>(p.C);
  const float inverse = 1.0f / sqrtf(mean + p.epsilon);
  const T* weight = static_cast<const T*>(p.norm_weight);
  for (int64_t c = 0; c < p.C; c += kWidth) {
    const F x = load_up_to(state + c, p.C - c) * set(inverse);
    store_up_to(normed + c, x * load_up_to(weight + c, p.C - c), p.C - c);
  }
  return inverse;
}

// ---- logits -----------------------------------------------------------------------------------------------

// Of the slots normed [count, C]: logits [ceil(count / kWidth), V, kWidth], -inf where a row is not allowed.
// Lanes beyond count hold logits of zeros.
template <typename T, typename R>
void compute_logits(const SlotHeadParams& p, int64_t slot_set, const T* normed, int64_t count, void* memory) {
  const SlotHeadBlockMemory sections = slot_head_block_memory(p);
  char* bytes = static_cast<char*>(memory);
  void* packed = bytes + sections.packed;
  T* converted = reinterpret_cast<T*>(bytes + sections.converted);
  float* logits = reinterpret_cast<float*>(bytes + sections.logits);
  const uint8_t* valid = valid_of(p, slot_set);
  const float* row_scale = row_scale_of(p, slot_set);
  const R* rows = rows_of<R>(p, slot_set);

  pack_b<T>(packed, normed, p.C, count, p.C);
  const auto product = [&](const T* from, int64_t stride, int64_t first, int64_t n) {
    matmul(from, stride, n, packed, count, p.C, [&](int64_t m, int64_t slot, F value, int) {
      const int64_t v = first + m;
      const float factor = row_scale == nullptr ? p.scale : p.scale * row_scale[v];
      const bool allowed = valid == nullptr || valid[v] != 0;
      store(logits + (slot / kWidth * p.V + v) * kWidth, allowed ? value * set(factor) : set(-INFINITY));
    });
  };
  if constexpr (kSame<T, R>) {
    product(rows, p.rows_stride_v, 0, p.V);
  } else {
    for (int64_t v = 0; v < p.V; v += kConvertedRows) {
      const int64_t n = at_most(kConvertedRows, p.V - v);
      for (int64_t i = 0; i < n; ++i) {
        const R* row = rows + (v + i) * p.rows_stride_v;
        for (int64_t c = 0; c < p.C; c += kWidth)
          store_up_to(converted + i * p.C + c, load_up_to(row + c, p.C - c), p.C - c);
      }
      product(converted, p.C, v, n);
    }
  }
}

// ---- targets ----------------------------------------------------------------------------------------------

VISIONLLM_INLINE float clamped_centre(const SlotHeadParams& p, int64_t slot) {
  const float centre = p.target_centre[slot], last = static_cast<float>(p.V - 1);
  return centre < 0.0f ? 0.0f : centre > last ? last : centre;  // NaN stays
}

// How far the nearest allowed row is from the centre; infinity where none is allowed.
VISIONLLM_INLINE float nearest_row(const SlotHeadParams& p, const uint8_t* valid, float centre) {
  if (valid == nullptr) return fabsf(centre - floorf(centre + 0.5f));
  float nearest = INFINITY;
  for (int64_t v = 0; v < p.V; ++v) {
    const float distance = fabsf(static_cast<float>(v) - centre);
    if (valid[v] != 0 && !(distance >= nearest)) nearest = distance;
  }
  return nearest;
}

// Calls body(v, count, weights) for rows v ... v + count - 1 of those that a Gaussian around `centre` weighs:
// exp((nearest^2 - (v - centre)^2) / (2 sigma^2)), 1 at the nearest allowed row, 0 where a row is not allowed.
// What is left out weighs less than e^-88.
template <typename Body>
VISIONLLM_INLINE void for_weights(const SlotHeadParams& p, const uint8_t* valid, float centre, float nearest,
                                  const Body& body) {
  float numbers[kWidth];
  for (int i = 0; i < kWidth; ++i) numbers[i] = static_cast<float>(i);
  const float radius = sqrtf(88.0f / p.inverse_variance + nearest * nearest) + 1.0f;
  const float low = centre - radius, high = centre + radius + 1.0f;
  const int64_t begin = low > 0.0f ? static_cast<int64_t>(low) : 0;
  const int64_t end = high < static_cast<float>(p.V) ? static_cast<int64_t>(high) : p.V;
  for (int64_t v = begin; v < end; v += kWidth) {
    const int count = static_cast<int>(at_most(kWidth, end - v));
    float weights[kWidth];
    const F distance = load(numbers) + set(static_cast<float>(v) - centre);
    // A difference of squares as a product: the squares may be much larger than their difference.
    const F exponent = (set(nearest) - distance) * (set(nearest) + distance) * set(p.inverse_variance);
    store(weights, exp_below(exponent));
    for (int i = 0; i < count; ++i) {
      if (valid != nullptr && valid[v + i] == 0) weights[i] = 0.0f;  // it may be nearer than the nearest
    }
    body(v, count, weights);
  }
}

// ---- softmax ----------------------------------------------------------------------------------------------

// Of one vector of slots; the sum is that of exp(logit - offset).
struct Softmax {
  float offset[kWidth];  // the largest logit where that is finite, else 0
  float total[kWidth];
  int32_t best[kWidth];

  float logsumexp(int lane) const { return offset[lane] + logf(total[lane]); }
};

// logits [V, kWidth]; with kKeep they become the exponentials.
template <bool kKeep>
VISIONLLM_INLINE void softmax(float* logits, int64_t V, Softmax* result) {
  F top = set(-INFINITY);
  I best = set(0), number = set(0);
  for (int64_t v = 0; v < V; ++v) {
    const F logit = load(logits + v * kWidth);
    best = where(greater(logit, top), number, best);
    top = max(logit, top);
    number = add(number, set(1));
  }
  const F finite_top = where(both(greater(top, set(-INFINITY)), greater(set(INFINITY), top)), top);
  // Infinity among numbers makes an infinite sum, not the NaN that infinity - infinity would make.
  float tops[kWidth];
  bool infinite[kWidth];
  store(tops, top);
  for (int lane = 0; lane < kWidth; ++lane) {
    infinite[lane] = tops[lane] == INFINITY;
    for (int64_t v = 0; v < V && infinite[lane]; ++v)
      infinite[lane] = logits[v * kWidth + lane] == logits[v * kWidth + lane];
  }
  // Four sums: a quarter of the roundings, and of the waiting for the one before.
  F sums[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  const auto add_row = [&](int64_t v, F& sum) {
    const F power = exp_below(load(logits + v * kWidth) - finite_top);
    if (kKeep) store(logits + v * kWidth, power);
    sum = sum + power;
  };
  int64_t v = 0;
  for (; v + 4 <= V; v += 4) {
    for (int i = 0; i < 4; ++i) add_row(v + i, sums[i]);
  }
  for (; v < V; ++v) add_row(v, sums[0]);
  store(result->offset, finite_top);
  store(result->total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  store(result->best, best);
  for (int lane = 0; lane < kWidth; ++lane) {
    if (infinite[lane]) result->total[lane] = INFINITY;
  }
}

// ---- cross-entropy ----------------------------------------------------------------------------------------

// Loss without its weight, and *target_logsumexp, of one slot with these logits.
VISIONLLM_INLINE float slot_loss(const SlotHeadParams& p, const uint8_t* valid, const float* logits,
                                 float offset, float total, int64_t slot, float* target_logsumexp) {
  const float log_total = logf(total);
  if (p.target_row != nullptr) {
    const int64_t target = p.target_row[slot];
    *target_logsumexp = target >= 0 && target < p.V ? 0.0f : -INFINITY;
    if (target < 0 || target >= p.V) return NAN;
    // Differences first: a certain and right slot's loss is small beside its logits.
    return log_total + (offset - logits[target * kWidth]);
  }
  const float centre = clamped_centre(p, slot), nearest = nearest_row(p, valid, centre);
  *target_logsumexp = -nearest;  // -inf where no row is allowed, NaN where the centre is
  if (!__builtin_isfinite(nearest)) return NAN;
  float sum = 0.0f, product = 0.0f;
  for_weights(p, valid, centre, nearest, [&](int64_t v, int count, const float* weights) {
    for (int i = 0; i < count; ++i) {
      if (weights[i] == 0.0f) continue;  // 0 times an infinite logit would be NaN
      sum += weights[i];
      product += weights[i] * (offset - logits[(v + i) * kWidth]);
    }
  });
  *target_logsumexp = logf(sum) - nearest * nearest * p.inverse_variance;
  return log_total + product / sum;
}

VISIONLLM_INLINE void cross_entropy_vector(const SlotHeadParams& p, int64_t slot_set, float* logits,
                                           int64_t slot, int lanes) {
  Softmax found;
  softmax<false>(logits, p.V, &found);
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t i = slot + lane;
    p.logsumexp[i] = found.logsumexp(lane);
    const float loss = slot_loss(p, valid_of(p, slot_set), logits + lane, found.offset[lane],
                                 found.total[lane], i, p.target_logsumexp + i);
    const float weight = p.weight == nullptr ? 1.0f : p.weight[i];
    p.loss[i] = is_ignored(p, i) ? 0.0f : weight * loss;
  }
}

}  // namespace
}  // namespace visionllm::cpu::VISIONLLM_ISA
