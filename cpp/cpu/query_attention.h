// What cpp/query_attention.cpp hands to the CPU kernels of batched query decoding. Arguments are checked
// already.
#pragma once

#include <stdint.h>

#include "element.h"
#include "every_isa.h"

namespace visionllm::cpu {

// Query rows of a block, and channels of sums of gradients, are padded to multiples of these: multiples of
// what every instruction set needs.
constexpr int64_t kQueryAttentionRows = 64, kQueryAttentionChannels = 16;
// Keys of the prefix that are taken at a time: a block's scores for them stay in the first-level cache.
constexpr int64_t kQueryAttentionKeys = 96;

// [B, M, S, heads, D] with D contiguous; strides in elements.
struct SlotRows {
  const void* data;
  int64_t stride_b, stride_m, stride_s, stride_h;
};

// [B, P, Hkv, D]
struct PrefixRows {
  const void* data;
  int64_t stride_b, stride_p, stride_h;
};

struct QueryAttentionParams {
  int64_t batch, groups, slots, heads, kv_heads, channels, prefix;  // B, M, S, H, Hkv, D, P
  Element element;   // of all tensors but the tables and logsumexp
  int64_t chunk;     // groups whose own keys and values are rotated and converted together
  SlotRows q, k, v;  // not rotated
  PrefixRows prefix_k, prefix_v;
  const int64_t* prefix_length;  // [B]
  const float* cosine;           // [positions, D / 2] or null
  const float* sine;
  void* output;      // [B, M, S, H, D] contiguous
  float* logsumexp;  // [B, M, S, H] contiguous

  // Backward only. The groups of a (batch, KV head) are divided into `parts` of `part` groups, so that few
  // heads keep several threads busy; it depends on sizes alone. With more than one part, the sums over the rows
  // of each are partial_sums[b * Hkv + g][part][0: grad_prefix_k, 1: grad_prefix_v][P][padded D].
  int64_t parts, part;
  float* partial_sums;
  SlotRows grad_output;
  void* grad_q;  // contiguous, as their inputs' shapes
  void* grad_k;
  void* grad_v;
  void* grad_prefix_k;
  void* grad_prefix_v;
};

// All run the items [begin, end) on the calling thread.
//   forward   (b * Hkv + g) * chunks + c: the c-th `chunk` of groups, for the query heads of one KV head
//   backward  (b * Hkv + g) * parts + p
//   sums      b * Hkv + g: adds the parts up to the gradients of one head's prefix; where parts is 1 the backward
//             has done it, where parts is 0 the gradients become zero
// workspace: query_attention_workspace_bytes, query_attention_backward_workspace_bytes, aligned to 64, for one
// call alone.
using QueryAttentionKernel = void (*)(const QueryAttentionParams& params, int64_t begin, int64_t end,
                                      void* workspace);

static inline int64_t query_attention_padded(int64_t channels) {
  return (channels + kQueryAttentionChannels - 1) / kQueryAttentionChannels * kQueryAttentionChannels;
}

static inline int64_t query_attention_chunks(const QueryAttentionParams& params) {
  return (params.groups + params.chunk - 1) / params.chunk;
}

VISIONLLM_FOR_EVERY_ISA(int64_t query_attention_workspace_bytes(const QueryAttentionParams& params);
                        int64_t query_attention_backward_workspace_bytes(const QueryAttentionParams& params);
                        void query_attention_kernel(const QueryAttentionParams& params, int64_t begin,
                                                    int64_t end, void* workspace);
                        void query_attention_backward_kernel(const QueryAttentionParams& params,
                                                             int64_t begin, int64_t end, void* workspace);
                        void query_attention_sums_kernel(const QueryAttentionParams& params, int64_t begin,
                                                         int64_t end, void* workspace);)

}  // namespace visionllm::cpu
