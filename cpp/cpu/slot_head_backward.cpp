// CPU kernels of the gradients of the slot head's cross-entropy; compiled once per instruction set (simd.h).
//
//   gradient[slot, v] = scale * grad_loss * weight * (exp(logits - logsumexp) - wanted)   0 where not allowed
//   grad_normed       = gradient rows
//   grad_rows         = gradient^T normed
//   with u = state / rms:  grad_norm_weight = sum over slots of grad_normed * u
//                          grad_state = (grad_normed * norm_weight - u * mean(grad_normed * norm_weight * u)) / rms
//
// An ignored slot's normed state and gradient are 0, and the rows that a set may not take are 0 in its product,
// so that what they hold, NaN too, is not multiplied.
#include "cpu/slot_head_logits.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

template <typename T>
VISIONLLM_INLINE T* grad_state_of(const SlotHeadParams& p, int64_t slot) {
  return static_cast<T*>(p.grad_states) + slot * p.C;  // contiguous
}

// ---- the logits' gradient ---------------------------------------------------------------------------------

// Factors of one vector of slots.
struct Factors {
  float logsumexp[kWidth];
  float factor[kWidth];  // scale * grad_loss * weight; NaN where the target cannot be met
  float used[kWidth];    // 0 for ignored slots and beyond the last
};

VISIONLLM_INLINE void load_factors(const SlotHeadParams& p, int64_t slot, int lanes, Factors* f) {
  for (int lane = 0; lane < kWidth; ++lane) {
    f->logsumexp[lane] = f->factor[lane] = f->used[lane] = 0.0f;
    if (lane >= lanes || is_ignored(p, slot + lane)) continue;
    const int64_t i = slot + lane;
    f->used[lane] = 1.0f;
    f->logsumexp[lane] = p.logsumexp[i];
    f->factor[lane] = p.scale * (p.weight == nullptr ? 1.0f : p.weight[i]);
    if (p.grad_loss != nullptr) f->factor[lane] *= p.grad_loss[i];
    if (!__builtin_isfinite(p.target_logsumexp[i])) f->factor[lane] = NAN;
  }
}

// From the gradient of one slot what its Gaussian wants. The weights' sum is taken again: target_logsumexp has
// lost digits where the nearest allowed row is many sigma away.
VISIONLLM_INLINE void subtract_gaussian(const SlotHeadParams& p, const uint8_t* valid, int64_t slot,
                                        float factor, float* gradient) {
  const float centre = clamped_centre(p, slot), nearest = nearest_row(p, valid, centre);
  float sum = 0.0f;
  for_weights(p, valid, centre, nearest, [&](int64_t, int count, const float* weights) {
    for (int i = 0; i < count; ++i) sum += weights[i];
  });
  for_weights(p, valid, centre, nearest, [&](int64_t v, int count, const float* weights) {
    for (int i = 0; i < count; ++i)
      if (weights[i] != 0.0f) gradient[(v + i) * kWidth] -= factor * weights[i] / sum;
  });
}

// logits [V, kWidth] of one vector of slots become their gradient.
void logits_to_gradient(const SlotHeadParams& p, int64_t slot_set, float* logits, int64_t slot, int lanes) {
  Factors f;
  load_factors(p, slot, lanes, &f);
  const uint8_t* valid = valid_of(p, slot_set);
  const F logsumexp = load(f.logsumexp), factor = load(f.factor);
  const M used = greater(load(f.used), set(0.5f));
  for (int64_t v = 0; v < p.V; ++v) {
    const F probability = exp_below(load(logits + v * kWidth) - logsumexp);
    const bool allowed = valid == nullptr || valid[v] != 0;
    store(logits + v * kWidth, allowed ? where(used, probability * factor) : set(0.0f));
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (f.used[lane] == 0.0f || !__builtin_isfinite(p.target_logsumexp[slot + lane])) continue;
    if (p.target_row != nullptr) {
      const int64_t v = p.target_row[slot + lane];
      if (valid == nullptr || valid[v] != 0) logits[v * kWidth + lane] -= f.factor[lane];
    } else {
      subtract_gaussian(p, valid, slot + lane, f.factor[lane], logits + lane);
    }
  }
}

// One vector of slots' gradient [V, kWidth] to both layouts. `place` is the first slot's among the chunk's.
template <typename T>
void write_gradient(const SlotHeadParams& p, int64_t slot_set, const float* gradient, int64_t place,
                    int lanes) {
  if (p.gradient_by_row != nullptr) {
    const int64_t pitch = (p.shared_rows ? p.sets : 1) * p.chunk;
    T* by_row = static_cast<T*>(p.gradient_by_row) +
                (p.shared_rows ? slot_set * p.chunk : slot_set * p.V * p.chunk) + place;
    for (int64_t v = 0; v < p.V; ++v) store_up_to(by_row + v * pitch, load(gradient + v * kWidth), lanes);
  }
  T* by_slot = static_cast<T*>(p.gradient) + (slot_set * p.chunk + place) * p.V;
  const uint8_t* valid = valid_of(p, slot_set);
  const float* row_scale = row_scale_of(p, slot_set);
  for (int64_t v = 0; v < p.V; v += kWidth) {
    F tile[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      tile[i] = v + i < p.V ? load(gradient + (v + i) * kWidth) : set(0.0f);
      if (row_scale != nullptr && v + i < p.V && (valid == nullptr || valid[v + i] != 0))
        tile[i] = tile[i] * set(row_scale[v + i]);
    }
    transpose(tile);
    for (int lane = 0; lane < kWidth; ++lane) {
      if (lane < lanes) store_up_to(by_slot + lane * p.V + v, tile[lane], p.V - v);
    }
  }
}

template <typename T, typename R>
void gradient(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  float* logits = reinterpret_cast<float*>(static_cast<char*>(memory) + slot_head_block_memory(p).logits);
  for_blocks(p, p.chunk_begin, p.chunk, begin, end, [&](const Block& block) {
    const int64_t place = block.begin - p.chunk_begin;
    T* normed = static_cast<T*>(p.normed) + (block.slot_set * p.chunk + place) * p.C;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t slot = block.slot + i;
      p.inverse_norm[slot] = 0.0f;
      if (is_ignored(p, slot)) {
        memset(normed + i * p.C, 0, static_cast<size_t>(p.C) * sizeof(T));
      } else {
        p.inverse_norm[slot] = normalise(p, state_of<T>(p, slot), normed + i * p.C);
      }
    }
    compute_logits<T, R>(p, block.slot_set, normed, block.count, memory);
    for (int64_t i = 0; i < block.count; i += kWidth) {
      const int lanes = static_cast<int>(at_most(kWidth, block.count - i));
      if (p.loss != nullptr) cross_entropy_vector(p, block.slot_set, logits + i * p.V, block.slot + i, lanes);
      logits_to_gradient(p, block.slot_set, logits + i * p.V, block.slot + i, lanes);
      write_gradient<T>(p, block.slot_set, logits + i * p.V, place + i, lanes);
    }
  });
}

// ---- products ---------------------------------------------------------------------------------------------

// Runs body(matrix, first column, columns) on blocks that make up the items [begin, end): ceil(C /
// kSlotColumns) of them for each matrix.
template <typename Body>
VISIONLLM_INLINE void for_columns(const SlotHeadParams& p, int64_t begin, int64_t end, const Body& body) {
  const int64_t items = (p.C + kSlotColumns - 1) / kSlotColumns;
  for (int64_t item = begin; item < end;) {
    const int64_t from = item % items;
    const int64_t to = at_most(at_most(items, from + end - item), from + p.columns / kSlotColumns);
    body(item / items, from * kSlotColumns, at_most(to * kSlotColumns, p.C) - from * kSlotColumns);
    item += to - from;
  }
}

template <typename T, typename R>
void grad_states(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  R* allowed_rows = reinterpret_cast<R*>(static_cast<char*>(memory) + packed_bytes(p.columns, p.V));
  for_columns(p, begin, end, [&](int64_t slot_set, int64_t first, int64_t columns) {
    const R* rows = rows_of<R>(p, slot_set) + first;
    int64_t stride = p.rows_stride_v;
    if (p.valid != nullptr && !kSame<R, int8_t>) {  // 0 * NaN; int8 has none
      const size_t bytes = static_cast<size_t>(columns) * sizeof(R);
      for (int64_t v = 0; v < p.V; ++v) {
        if (valid_of(p, slot_set)[v] != 0) {
          memcpy(allowed_rows + v * columns, rows + v * stride, bytes);
        } else {
          memset(allowed_rows + v * columns, 0, bytes);
        }
      }
      rows = allowed_rows, stride = columns;
    }
    pack_b_transposed<T>(memory, rows, stride, columns, p.V);
    const T* from = static_cast<const T*>(p.gradient) + slot_set * p.chunk * p.V;
    const int64_t slot = slot_set * p.set_slots + p.chunk_begin;
    matmul(from, p.V, p.chunk, memory, columns, p.V, [&](int64_t m, int64_t n, F value, int lanes) {
      store_up_to(grad_state_of<T>(p, slot + m) + first + n, value, lanes);
    });
  });
}

template <typename T>
void grad_rows(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  const int64_t slots = (p.shared_rows ? p.sets : 1) * p.chunk;
  for_columns(p, begin, end, [&](int64_t matrix, int64_t first, int64_t columns) {
    pack_b_transposed<T>(memory, static_cast<const T*>(p.normed) + matrix * slots * p.C + first, p.C, columns,
                         slots);
    const T* from = static_cast<const T*>(p.gradient_by_row) + matrix * p.V * slots;
    const int64_t start = matrix * p.V * p.C + first;
    T* output = static_cast<T*>(p.grad_rows) + start;
    float* sums = p.row_sums == nullptr ? nullptr : p.row_sums + start;
    matmul(from, slots, p.V, memory, columns, slots, [&](int64_t m, int64_t n, F value, int lanes) {
      const int64_t i = m * p.C + n;
      if (sums == nullptr) {
        if (!p.first_chunk) value = value + load_up_to(output + i, lanes);
        store_up_to(output + i, value, lanes);
        return;
      }
      if (!p.first_chunk) value = value + load_up_to(sums + i, lanes);
      if (p.last_chunk) {
        store_up_to(output + i, value, lanes);
      } else {
        store_up_to(sums + i, value, lanes);
      }
    });
  });
}

// ---- the norm ---------------------------------------------------------------------------------------------

template <typename T>
void grad_norm_weight(const SlotHeadParams& p, int64_t begin, int64_t end, float* sums) {
  const int64_t first = begin * kSlotColumns, columns = at_most(end * kSlotColumns, p.C) - first;
  for (int64_t c = 0; c < columns; ++c) sums[c] = 0.0f;
  for (int64_t slot = 0; slot < p.sets * p.set_slots; ++slot) {
    if (is_ignored(p, slot)) continue;
    const T* state = state_of<T>(p, slot) + first;
    const T* grad = grad_state_of<T>(p, slot) + first;
    const F inverse = set(p.inverse_norm[slot]);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const F unit = load_up_to(state + c, columns - c) * inverse;
      store(sums + c, mul_add(load_up_to(grad + c, columns - c), unit, load(sums + c)));
    }
  }
  T* output = static_cast<T*>(p.grad_norm_weight) + first;
  for (int64_t c = 0; c < columns; c += kWidth) store_up_to(output + c, load(sums + c), columns - c);
}

template <typename T>
void norm_backward(const SlotHeadParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.norm_weight);
  for (int64_t slot = begin; slot < end; ++slot) {
    if (is_ignored(p, slot)) continue;  // its gradient is 0 already, whatever its state
    const T* state = state_of<T>(p, slot);
    T* grad = grad_state_of<T>(p, slot);
    const F inverse = set(p.inverse_norm[slot]);
    F products = set(0.0f);
    for (int64_t c = 0; c < p.C; c += kWidth) {
      const int64_t n = p.C - c;
      const F grad_unit = load_up_to(grad + c, n) * load_up_to(weight + c, n);
      products = mul_add(grad_unit, load_up_to(state + c, n) * inverse, products);
    }
    const F mean = set(lane_sum(products) / static_cast<float>(p.C));
    for (int64_t c = 0; c < p.C; c += kWidth) {
      const int64_t n = p.C - c;
      const F grad_unit = load_up_to(grad + c, n) * load_up_to(weight + c, n);
      const F unit = load_up_to(state + c, n) * inverse;
      store_up_to(grad + c, inverse * (grad_unit - unit * mean), n);
    }
  }
}

}  // namespace

// Calls function<T, R>(...) for the types of states and rows.
#define VISIONLLM_SLOT_HEAD_TYPES(p, function, ...)                                                         \
  const bool quantized = (p).rows_element == Element::int8;                                                 \
  switch ((p).element) {                                                                                    \
    case Element::bfloat16:                                                                                 \
      return quantized ? function<bfloat16, int8_t>(__VA_ARGS__)                                            \
                       : function<bfloat16, bfloat16>(__VA_ARGS__);                                         \
    case Element::float16:                                                                                  \
      return quantized ? function<float16, int8_t>(__VA_ARGS__) : function<float16, float16>(__VA_ARGS__);  \
    default: return quantized ? function<float, int8_t>(__VA_ARGS__) : function<float, float>(__VA_ARGS__); \
  }

void slot_head_gradient_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  VISIONLLM_SLOT_HEAD_TYPES(p, gradient, p, begin, end, memory)
}

void slot_head_grad_states_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  VISIONLLM_SLOT_HEAD_TYPES(p, grad_states, p, begin, end, memory)
}

void slot_head_grad_rows_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  switch (p.element) {
    case Element::bfloat16: return grad_rows<bfloat16>(p, begin, end, memory);
    case Element::float16: return grad_rows<float16>(p, begin, end, memory);
    default: return grad_rows<float>(p, begin, end, memory);
  }
}

void slot_head_grad_norm_weight_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void* memory) {
  float* sums = static_cast<float*>(memory);
  switch (p.element) {
    case Element::bfloat16: return grad_norm_weight<bfloat16>(p, begin, end, sums);
    case Element::float16: return grad_norm_weight<float16>(p, begin, end, sums);
    default: return grad_norm_weight<float>(p, begin, end, sums);
  }
}

void slot_head_norm_backward_kernel(const SlotHeadParams& p, int64_t begin, int64_t end, void*) {
  switch (p.element) {
    case Element::bfloat16: return norm_backward<bfloat16>(p, begin, end);
    case Element::float16: return norm_backward<float16>(p, begin, end);
    default: return norm_backward<float>(p, begin, end);
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
