// CPU kernels of the slot head's prediction and cross-entropy; compiled once per instruction set (simd.h).
//
// A block of slots: norm, product with all rows, then per vector of slots two passes over its logits, the
// largest and the sum of exponentials. What only few rows of a slot take part in (the window around the best,
// the target) is done slot by slot.
#include "cpu/slot_head_logits.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// ---- prediction -------------------------------------------------------------------------------------------

// Mean of row - offset near the best, from the exponentials of one slot.
VISIONLLM_INLINE float mean_near(const SlotHeadParams& p, const float* powers, int64_t best) {
  const int64_t begin = best > p.window ? best - p.window : 0;
  const int64_t end = p.window < p.V - best ? best + p.window + 1 : p.V;
  float total = 0.0f, product = 0.0f;
  for (int64_t v = begin; v < at_most(end, p.V); ++v) {
    const float power = powers[v * kWidth];
    total += power;
    product += power * static_cast<float>(v - best);
  }
  return static_cast<float>(best) - p.offset + product / total;
}

// Rows of exponentials to slots of probabilities.
void write_probabilities(const SlotHeadParams& p, const float* powers, const Softmax& found, int64_t slot,
                         int lanes) {
  float factor[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {
    factor[lane] = __builtin_isfinite(found.logsumexp(lane)) ? 1.0f / found.total[lane] : NAN;
  }
  for (int64_t v = 0; v < p.V; v += kWidth) {
    F tile[kWidth];
    for (int i = 0; i < kWidth; ++i)
      tile[i] = v + i < p.V ? load(powers + (v + i) * kWidth) * load(factor) : set(0.0f);
    transpose(tile);
    for (int lane = 0; lane < kWidth; ++lane) {
      if (lane < lanes) store_up_to(p.probabilities + (slot + lane) * p.V + v, tile[lane], p.V - v);
    }
  }
}

void predict_vector(const SlotHeadParams& p, float* logits, int64_t slot, int lanes) {
  Softmax found;
  const bool keep = p.expectation != nullptr || p.probabilities != nullptr;
  if (keep) {
    softmax<true>(logits, p.V, &found);
  } else {
    softmax<false>(logits, p.V, &found);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    const float logsumexp = found.logsumexp(lane);
    const bool finite = __builtin_isfinite(logsumexp);
    const int64_t best = found.best[lane];
    p.best[slot + lane] = finite ? best : -1;
    p.logsumexp[slot + lane] = logsumexp;
    p.probability[slot + lane] = finite ? 1.0f / found.total[lane] : NAN;
    if (p.expectation != nullptr)
      p.expectation[slot + lane] = finite ? mean_near(p, logits + lane, best) : NAN;
  }
  if (p.probabilities != nullptr) write_probabilities(p, logits, found, slot, lanes);
}

// ---- both -------------------------------------------------------------------------------------------------

// finish(set, logits, slot, lanes) for each vector of slots of the groups [begin, end).
template <typename T, typename R, typename Finish>
VISIONLLM_INLINE void run(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory,
                          const Finish& finish) {
  const SlotHeadBlockMemory sections = slot_head_block_memory(p);
  T* normed = reinterpret_cast<T*>(static_cast<char*>(memory) + sections.normed);
  float* logits = reinterpret_cast<float*>(static_cast<char*>(memory) + sections.logits);
  for_blocks(p, 0, p.set_slots, begin, end, [&](const Block& block) {
    for (int64_t i = 0; i < block.count; ++i) normalise(p, state_of<T>(p, block.slot + i), normed + i * p.C);
    compute_logits<T, R>(p, block.slot_set, normed, block.count, memory);
    for (int64_t i = 0; i < block.count; i += kWidth) {
      finish(block.slot_set, logits + i * p.V, block.slot + i,
             static_cast<int>(at_most(kWidth, block.count - i)));
    }
  });
}

template <typename T, typename Finish>
VISIONLLM_INLINE void run_rows(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory,
                               const Finish& finish) {
  if (p.rows_element == Element::int8) {
    run<T, int8_t>(p, begin, end, memory, finish);
  } else {
    run<T, T>(p, begin, end, memory, finish);
  }
}

template <typename Finish>
void run_elements(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory, const Finish& finish) {
  switch (p.element) {
    case Element::bfloat16: return run_rows<bfloat16>(p, begin, end, memory, finish);
    case Element::float16: return run_rows<float16>(p, begin, end, memory, finish);
    default: return run_rows<float>(p, begin, end, memory, finish);
  }
}

}  // namespace

void slot_head_predict_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  run_elements(p, begin, end, memory, [&](int64_t, float* logits, int64_t slot, int lanes) {
    predict_vector(p, logits, slot, lanes);
  });
}

void slot_head_cross_entropy_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  run_elements(p, begin, end, memory, [&](int64_t slot_set, float* logits, int64_t slot, int lanes) {
    cross_entropy_vector(p, slot_set, logits, slot, lanes);
  });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
