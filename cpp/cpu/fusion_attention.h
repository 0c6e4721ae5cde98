// What cpp/fusion_attention.cpp hands to the CPU kernels of language fusion. Arguments are checked already.
#pragma once

#include <stdint.h>

#include "element.h"
#include "every_isa.h"

namespace visionllm::cpu {

// Tensors are contiguous but for key and value, whose strides are in elements.
struct FusionAttentionParams {
  int64_t batch, positions, channels;    // B, N, C
  int64_t tokens, heads, head_channels;  // T, H, D
  Element element;                       // of all tensors
  float epsilon;
  const void* x;
  const void* norm_weight;
  const void* norm_bias;
  const void* query_weight;
  const void* query_bias;
  const void* key;
  int64_t key_stride_b, key_stride_t, key_stride_h;
  const void* value;
  int64_t value_stride_b, value_stride_t, value_stride_h;
  const void* output_weight;
  const void* output_bias;
  const void* gate;
  void* output;  // forward only

  const int32_t* counts;  // [B] tokens that are text,
  const int32_t* texts;   // [B, T] and which they are
  int64_t most_tokens;    // the largest count

  // Backward only. The gradients have their input's shape and type.
  bool backward;
  const void* grad_output;
  void* grad_x;
  void* grad_norm_weight;
  void* grad_norm_bias;
  void* grad_query_weight;
  void* grad_query_bias;
  void* grad_key;
  void* grad_value;
  void* grad_output_weight;
  void* grad_output_bias;
  void* grad_gate;
  int64_t slices;  // into which the rows of one batch entry are divided, each with sums of its own

  // Memory of the sizes that fusion_attention_layout gives, aligned to 64.
  char* shared;   // prepared weights
  char* entries;  // prepared tokens of each batch entry
  char* sums;     // backward only: of each slice, then of each head
  int64_t entry_bytes, slice_bytes, head_bytes;
};

struct FusionAttentionLayout {
  int64_t block_rows;                  // positions that are worked on together
  int64_t shared, entry, slice, head;  // bytes; of slices there are B * slices, of heads H
  int64_t workspace;                   // bytes that each thread needs, for every function
};

// In this order, each for all its items [begin, end) before the next; items may be shared out among threads,
// but for the weights and the vectors, which are one item:
//   layout           needs the sizes, most_tokens and backward
//   prepare          item 0: the weights
//   prepare_tokens   one batch entry
//   kernel           forward: one block of positions, B * ceil(N / block_rows) of them
//   backward_kernel  backward: one slice, B * slices of them, slices <= ceil(N / block_rows)
//   sum_tokens       backward: one batch entry: gradients of key and value
//   sum_head         backward: one head: gradients of its part of both weights and of the query's bias
//   sum_vectors      backward: the other gradients of [C]
VISIONLLM_FOR_EVERY_ISA(void fusion_attention_layout(const FusionAttentionParams& params,
                                                     FusionAttentionLayout* layout);
                        void fusion_attention_prepare(const FusionAttentionParams& params);
                        void fusion_attention_prepare_tokens(const FusionAttentionParams& params,
                                                             int64_t begin, int64_t end);
                        void fusion_attention_kernel(const FusionAttentionParams& params, int64_t begin,
                                                     int64_t end, void* workspace);
                        void fusion_attention_backward_kernel(const FusionAttentionParams& params,
                                                              int64_t begin, int64_t end, void* workspace);
                        void fusion_attention_sum_tokens(const FusionAttentionParams& params, int64_t begin,
                                                         int64_t end, void* workspace);
                        void fusion_attention_sum_head(const FusionAttentionParams& params, int64_t begin,
                                                       int64_t end, void* workspace);
                        void fusion_attention_sum_vectors(const FusionAttentionParams& params);)

}  // namespace visionllm::cpu
