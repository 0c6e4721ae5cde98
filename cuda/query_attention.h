// Launch interface of query_attention on CUDA; the contract is in visionllm/query_attention.h.
#pragma once

#include <cstdint>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::cuda {

// [B, M, S, heads, D]; strides in elements, D contiguous, all of them and the address multiples of 16 bytes.
struct SlotTensor {
  const void* data;
  std::int64_t stride_b, stride_m, stride_s, stride_h;
};

// [B, P, Hkv, D]; as SlotTensor.
struct PrefixTensor {
  const void* data;
  std::int64_t stride_b, stride_p, stride_h;
};

struct QueryAttentionParams {
  int batch;     // B
  int groups;    // M
  int slots;     // S, 1 .. 64
  int heads;     // H
  int kv_heads;  // Hkv
  int channels;  // D, a multiple of 8 up to 128
  int prefix;    // P
  DType dtype;   // of all tensors but the float32 ones
  SlotTensor q;  // not rotated
  SlotTensor k;  // not rotated
  SlotTensor v;
  PrefixTensor prefix_k;  // rotated
  PrefixTensor prefix_v;
  const std::int64_t* prefix_length;  // [B]
  const float* cosine;                // [positions, D / 2], or null: no rotation
  const float* sine;                  // with cosine
  void* output;                       // [B, M, S, H, D], contiguous; the backward reads it
  float* logsumexp;                   // [B, M, S, H], contiguous; the backward reads it
  float* workspace;                   // [splits, B M S H D] and then [splits, B M S H]; null if splits is 1
  int splits;                         // parts that the keys are divided into, >= 1
};

struct QueryAttentionBackwardParams {
  QueryAttentionParams forward;  // its inputs and results
  SlotTensor grad_output;
  float* mean;   // [B, M, S, H], contiguous: workspace for grad_output . output of each row
  void* grad_q;  // the gradients are contiguous and have their input's shape
  void* grad_k;
  void* grad_v;
  void* grad_prefix_k;
  void* grad_prefix_v;
};

// `stream` is a cudaStream_t. There is at least one batch and head; forward: also one group and slot.
Status query_attention(const QueryAttentionParams& params, void* stream);
Status query_attention_backward(const QueryAttentionBackwardParams& params, void* stream);

}  // namespace visionllm::cuda
