// What cpp/slot_head_cpu.h hands to the CPU kernels of the slot head; the contract, with the meaning of the
// shape letters, is in visionllm/slot_head.h. Arguments are checked already.
//
// Slots that meet the same allowed rows are one set: a picture's, or all where neither rows nor valid are the
// picture's own. Slot i of set s is number s * set_slots + i of all B * G * S.
//
// In the product of rows and slots the slots are the packed operand: they are fewer, they pass through the norm
// anyway, and the lanes of a vector are slots then, so that softmax needs no sums across lanes. Logits of one
// block of slots at a time are held, as [block / lanes, V, lanes].
#pragma once

#include <stdint.h>

#include "element.h"
#include "every_isa.h"
#include "packed_matrix.h"

namespace visionllm::cpu {

constexpr int64_t kSlotGroup = 16;    // slots that stay together: the most lanes of any instruction set
constexpr int64_t kSlotColumns = 64;  // columns of grad_states and grad_rows that stay together

// Strides are in elements; pointers of absent tensors are null.
struct SlotHeadParams {
  Element element, rows_element;  // of states, norm_weight and their gradients; of rows and grad_rows
  int64_t B, G, S, C, V;
  int64_t sets, set_slots;  // sets * set_slots == B * G * S
  bool shared_rows;         // R is 1
  const void* states;       // [B, G, S, C]
  int64_t states_stride_b, states_stride_g, states_stride_s;
  const void* rows;  // [R, V, C]
  int64_t rows_stride_r, rows_stride_v;
  const float* row_scale;  // [R, V]: of int8 rows, else null
  int64_t row_scale_stride;
  const uint8_t* valid;  // [B, V] or null
  int64_t valid_stride_b;
  const void* norm_weight;  // [C] or null
  float epsilon, scale;
  int64_t block;  // slots whose logits are held at a time: a multiple of kSlotGroup

  // Prediction: [B, G, S], and probabilities [B, G, S, V]; the last two may be null.
  int64_t* best;
  float* probability;
  float* expectation;
  float* probabilities;
  int64_t window;
  float offset;

  // Cross-entropy: one of target_row and centre is there.
  const int64_t* target_row;
  const float* target_centre;
  float inverse_variance;  // 1 / (2 sigma^2)
  const float* weight;     // [B, G, S] or null
  float* loss;             // where the backward has it, it computes the forward's outputs too

  // Outputs of the forwards, inputs of a backward without loss
  float* logsumexp;
  float* target_logsumexp;

  // Backward, of the slots chunk_begin ... chunk_begin + chunk - 1 of every set
  int64_t chunk_begin, chunk;
  bool first_chunk, last_chunk;
  const float* grad_loss;  // [B, G, S], or null: 1
  void* grad_states;       // [B, G, S, C], contiguous
  void* grad_rows;         // [R, V, C], contiguous, or null
  void* grad_norm_weight;  // [C] or null
  int64_t columns;         // of a product at a time: a multiple of kSlotColumns
  void* normed;            // [sets, chunk, C] of states' type, 0 for ignored slots
  float* inverse_norm;     // [sets * set_slots], 0 for ignored slots
  void* gradient;          // of the logits, [sets, chunk, V] of states' type; times row_scale
  void* gradient_by_row;   // the same without row_scale, [R, V, sets / R * chunk]; null without grad_rows
  float* row_sums;         // [R, V, C] where several chunks add up in more than grad_rows' type, else null
};

// Kernels run the items [begin, end) on the calling thread, in `memory` of the size that is said here, aligned
// to 64, which one call alone uses. Items are written by one call each, and how they are shared out changes no
// bit of a result.
//
//   predict, cross_entropy   groups of kSlotGroup slots, sets * ceil(set_slots / kSlotGroup)
//   gradient                 the same of chunk instead of set_slots: fills normed, inverse_norm, gradient and
//                            gradient_by_row
//   grad_states              sets * ceil(C / kSlotColumns); without the norm's own gradient
//   grad_rows                R * ceil(C / kSlotColumns)
//   grad_norm_weight         ceil(C / kSlotColumns), from what grad_states left, after the last chunk
//   norm_backward            B * G * S slots: what grad_states left becomes the gradient of the states
using SlotHeadKernel = void (*)(const SlotHeadParams& params, int64_t begin, int64_t end, void* memory);

// Sections of the memory of the first three kernels begin at these bytes.
struct SlotHeadBlockMemory {
  int64_t normed, packed, converted, logits, bytes;
};

constexpr int64_t kConvertedRows = 48;  // of int8 in states' type at a time

static inline SlotHeadBlockMemory slot_head_block_memory(const SlotHeadParams& p) {
  const auto up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  SlotHeadBlockMemory m{};
  const int64_t row = p.C * element_bytes(p.element);
  m.packed = m.normed + up(p.normed == nullptr ? p.block * row : 0);
  m.converted = m.packed + packed_bytes(p.block, p.C);
  m.logits = m.converted + up(p.rows_element == Element::int8 ? kConvertedRows * row : 0);
  m.bytes = m.logits + p.block * p.V * 4;
  return m;
}

// Of grad_states: the rows of a block of columns, and where `valid` is there a copy of them with zeros.
static inline int64_t slot_head_grad_states_memory(const SlotHeadParams& p) {
  const int64_t copy = p.valid == nullptr ? 0 : p.V * p.columns * element_bytes(p.element);
  return packed_bytes(p.columns, p.V) + copy;
}

static inline int64_t slot_head_grad_rows_memory(const SlotHeadParams& p) {
  return packed_bytes(p.columns, (p.shared_rows ? p.sets : 1) * p.chunk);
}

VISIONLLM_FOR_EVERY_ISA(void slot_head_predict_kernel(const SlotHeadParams&, int64_t, int64_t, void*);
                        void slot_head_cross_entropy_kernel(const SlotHeadParams&, int64_t, int64_t, void*);
                        void slot_head_gradient_kernel(const SlotHeadParams&, int64_t, int64_t, void*);
                        void slot_head_grad_states_kernel(const SlotHeadParams&, int64_t, int64_t, void*);
                        void slot_head_grad_rows_kernel(const SlotHeadParams&, int64_t, int64_t, void*);
                        void slot_head_grad_norm_weight_kernel(const SlotHeadParams&, int64_t, int64_t,
                                                               void*);
                        void slot_head_norm_backward_kernel(const SlotHeadParams&, int64_t, int64_t, void*);)

}  // namespace visionllm::cpu
