// Launch interface of fusion_attention on CUDA; the contract is in visionllm/fusion_attention.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::cuda {

constexpr int kFusionMaxChannels = 256;          // C
constexpr int kFusionMaxHeadChannels = 64;       // D
constexpr int kFusionMaxTokens = 512;            // T
constexpr int kFusionMaxPositions = 0x7fffff00;  // N: a tile further is still an int

struct FusionAttentionParams {
  std::int64_t batch;        // B
  int positions;             // N, up to kFusionMaxPositions
  int channels;              // C, a multiple of 16 up to 256
  int tokens;                // T, up to 512
  int heads;                 // H
  int head_channels;         // D = C / H, a multiple of 8 up to 64
  DType dtype;               // of all tensors but the mask
  float epsilon;             // added to the variance
  const void* x;             // [B, N, C], contiguous as everything but key and value
  const void* norm_weight;   // [C]
  const void* norm_bias;     // [C]
  const void* query_weight;  // [C, C]
  const void* query_bias;    // [C]
  const void* key;           // [B, T, H, D]; strides in elements, D contiguous, rows at multiples of 16 bytes
  std::int64_t key_stride_b, key_stride_t, key_stride_h;
  const void* value;  // as key
  std::int64_t value_stride_b, value_stride_t, value_stride_h;
  const std::uint8_t* mask;   // [B, T], 0 where there is no text
  const void* output_weight;  // [C, C]
  const void* output_bias;    // [C]
  const void* gate;           // [C]
  void* output;               // [B, N, C]; null in the backward
};

struct FusionAttentionBackwardParams {
  FusionAttentionParams forward;
  const void* grad_output;  // [B, N, C]
  void* grad_x;             // the gradients are contiguous and have their input's shape and type
  void* grad_norm_weight;
  void* grad_norm_bias;
  void* grad_query_weight;
  void* grad_query_bias;
  void* grad_key;
  void* grad_value;
  void* grad_output_weight;
  void* grad_output_bias;
  void* grad_gate;
  unsigned char* workspace;  // FusionAttentionWorkspace(...).bytes, aligned to 16 bytes
};

// How the backward divides its sums over rows into slices, and where it keeps what. It depends on the sizes
// alone, and so do the order of additions and the result.
struct FusionAttentionWorkspace {
  static constexpr int kSquare = 128;    // rows and columns of a weight gradient that a block sums
  static constexpr int kBlocks = 256;    // that the sums are meant to be divided into: two for each
                                         // multiprocessor of the largest GPUs
  static constexpr int kSliceRows = 64;  // of which a slice has a multiple
  static constexpr int kKeyWarps = 4;    // warps of a block that sums gradients of keys and values

  std::int64_t tiles = 0;         // of rows, of the row kernel, in the whole batch
  int key_warps = 1;              // warps of a block that have different keys, 16 each; the others share rows
  std::int64_t key_blocks = 0;    // blocks of 16 key_warps keys
  std::int64_t key_slices = 0;    // slices of one batch entry's rows
  std::int64_t key_rows = 0;      // rows of such a slice
  std::int64_t key_partials = 0;  // partial sums for each key: key_slices * (kKeyWarps / key_warps)
  std::int64_t weight_squares = 0;
  std::int64_t weight_slices = 0;  // slices of all batch entries' rows
  std::int64_t weight_rows = 0;    // rows of such a slice

  // Offsets in bytes.
  std::int64_t normed = 0;         // [B, N, C] in the tensors' type
  std::int64_t query = 0;          // the same, times log2(e) / sqrt(D)
  std::int64_t attended = 0;       // the same
  std::int64_t grad_attended = 0;  // the same
  std::int64_t grad_query = 0;     // the same
  std::int64_t logsumexp = 0;      // [B, H, N] float32, of base 2
  std::int64_t mean = 0;           // [B, H, N] float32, attended . grad_attended of a head
  std::int64_t column_sums = 0;    // [4, C, tiles] float32: gradients of norm weight, norm bias and query
                                   // bias, and grad_output, summed over a tile
  std::int64_t weight_sums = 0;    // [2, weight_slices, C, C] float32: grad_query^T normed, grad_output^T
                                   // attended
  std::int64_t key_sums = 0;       // [2, key_partials, B, T, C] float32: gradients of key and value
  std::int64_t bytes = 0;

  FusionAttentionWorkspace(std::int64_t B, std::int64_t N, std::int64_t C, std::int64_t T, std::int64_t H,
                           std::int64_t element_bytes) {
    const std::int64_t tile_rows = 128 / element_bytes;
    tiles = B * divide_up(N, tile_rows);
    const std::int64_t slices_at_most = divide_up(N, kSliceRows);
    key_warps = T > 32 ? 4 : T > 16 ? 2 : 1;
    key_blocks = divide_up(T, 16 * key_warps);
    if (B * H * key_blocks > 0 && N > 0) {
      // Twice as many as for the weights: these blocks are half as large.
      slice(N, std::min(divide_up(2 * kBlocks, B * H * key_blocks), slices_at_most), &key_slices, &key_rows);
    }
    key_partials = key_slices * (kKeyWarps / key_warps);
    weight_squares = divide_up(C, kSquare) * divide_up(C, kSquare);
    if (B * N > 0) {
      slice(B * N, std::min(divide_up(kBlocks, 2 * weight_squares), divide_up(B * N, kSliceRows)),
            &weight_slices, &weight_rows);
    }
    normed = take(B * N * C * element_bytes);
    query = take(B * N * C * element_bytes);
    attended = take(B * N * C * element_bytes);
    grad_attended = take(B * N * C * element_bytes);
    grad_query = take(B * N * C * element_bytes);
    logsumexp = take(B * H * N * 4);
    mean = take(B * H * N * 4);
    column_sums = take(4 * C * tiles * 4);
    weight_sums = take(2 * weight_slices * C * C * 4);
    key_sums = take(2 * key_partials * B * T * C * 4);
  }

 private:
  static std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

  static void slice(std::int64_t rows, std::int64_t wanted, std::int64_t* slices, std::int64_t* slice_rows) {
    *slice_rows = divide_up(divide_up(rows, std::max<std::int64_t>(wanted, 1)), kSliceRows) * kSliceRows;
    *slices = divide_up(rows, *slice_rows);
  }

  std::int64_t take(std::int64_t size) {
    const std::int64_t start = bytes;
    bytes += divide_up(size, 256) * 256;
    return start;
  }
};

// `stream` is a cudaStream_t.
Status fusion_attention(const FusionAttentionParams& params, void* stream);
Status fusion_attention_backward(const FusionAttentionBackwardParams& params, void* stream);

}  // namespace visionllm::cuda
