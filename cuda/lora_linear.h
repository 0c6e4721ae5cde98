// Launch interface of lora_linear on CUDA; the contract is in visionllm/lora_linear.h.
#pragma once

#include <cstdint>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::cuda {

struct LoraAdapters {
  const void* a;              // [E, R, K], contiguous
  const void* b;              // [E, N, R], contiguous
  const float* scale;         // [E], or null: 1
  const std::int64_t* index;  // [T], or null: adapter 0 for every row
  float scaling;              // factor of every scale
  int count;                  // E, at least 1 unless every row has an index; 0 when there are no adapters
  int rank;                   // R, 1 to 128; 0: no adapters, and none of the pointers is read
};

// Strides in elements; rows are contiguous. T, K, N < 2^31.
struct LoraLinearParams {
  DType dtype;  // of output, x, bias, a, b, and of weight unless int8
  bool int8;    // weight is int8 with weight_scale
  std::int64_t T, K, N;
  void* output;  // [T, N]
  std::int64_t output_stride;
  float* low_rank;  // [T, R], contiguous; null without adapters
  void* workspace;  // lora_linear_workspace_bytes(...) bytes, aligned to 16
  const void* x;    // [T, K]
  std::int64_t x_stride;
  const void* weight;  // [N, K]
  std::int64_t weight_stride;
  const float* weight_scale;  // [N], or null unless int8
  const void* bias;           // [N], or null
  LoraAdapters adapters;
};

struct LoraLinearBackwardParams {
  DType dtype;
  bool int8;
  std::int64_t T, K, N;
  void* grad_x;  // [T, K], or null: not wanted
  std::int64_t grad_x_stride;
  void* grad_a;             // [E, R, K], or null
  void* grad_b;             // [E, N, R], or null
  void* workspace;          // lora_linear_backward_workspace_bytes(...) bytes, aligned to 16
  const void* grad_output;  // [T, N]
  std::int64_t grad_output_stride;
  const void* x;  // [T, K]; read for grad_a
  std::int64_t x_stride;
  const void* weight;  // [N, K]
  std::int64_t weight_stride;
  const float* weight_scale;  // [N], or null unless int8
  const float* low_rank;      // [T, R], of the forward; read for grad_b
  LoraAdapters adapters;
};

// `stream` is a cudaStream_t. Sizes may be 0.
Status lora_linear(const LoraLinearParams& params, void* stream);
Status lora_linear_backward(const LoraLinearBackwardParams& params, void* stream);

}  // namespace visionllm::cuda
