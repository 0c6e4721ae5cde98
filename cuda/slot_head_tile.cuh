// What the two tensor-core products of slot_head share: where vectors lie, tiles in shared memory, one step of
// the product; and the kernels of slot_head.cu that its backward uses too.
//
// A tile is a number of lines. Of each line a stage of the pipeline holds 128 bytes: 64 16-bit or 32 float32
// elements of the sum. One step of the product takes 32 bytes of each line, which is the depth of
// mma 16x8x16 for 16-bit types and of 16x8x8 for float32, with the same fragments in bytes.
#pragma once

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "device/platform.cuh"
#include "slot_head.h"

namespace visionllm::cuda::slot_head_detail {

constexpr int kLineBytes = 128;
constexpr int kSteps = 4;  // of 32 bytes
// Unrolled so far that fragments of the next step load during this one; float32 has no registers for it.
template <typename T>
constexpr int kStepsAtOnce = sizeof(T) == 2 ? 2 : 1;
constexpr int kStepLines = 32;  // right-hand lines of a warp's tile: four mma side by side
template <typename T>
constexpr int kLineElements = kLineBytes / static_cast<int>(sizeof(T));

// Where vector `index` of a set begins.
struct Vectors {
  const void* data;
  std::int64_t set_stride;                                 // in elements, as the others
  std::int64_t stride;                                     // of neighbours; where not one number:
  std::int64_t picture_stride, group_stride, slot_stride;  // of [pictures, groups, slots]
  std::uint32_t per_picture, per_group;                    // slots; 0: `stride` holds

  template <typename T>
  __device__ __forceinline__ const T* at(std::int64_t set, std::uint32_t index) const {
    std::int64_t offset = set * set_stride;
    if (per_picture == 0) {
      offset += index * stride;
    } else {
      const std::uint32_t picture = index / per_picture, rest = index - picture * per_picture;
      const std::uint32_t group = rest / per_group, slot = rest - group * per_group;
      offset += picture * picture_stride + group * group_stride + slot * slot_stride;
    }
    return static_cast<const T*>(data) + offset;
  }
};

// 16-byte chunk `chunk` of a line. Lines change their chunks' places, so that the same chunk of eight lines
// lies in all banks.
__device__ __forceinline__ unsigned char* line_chunk(unsigned char* lines, int line, int chunk) {
  return lines + line * kLineBytes + ((chunk ^ (line & 7)) << 4);
}

// Left-hand fragments: lines first, ..., first + 16 M - 1.
template <int M>
__device__ __forceinline__ void load_left(std::uint32_t (&a)[M][4], unsigned char* lines, int first,
                                          int step) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < M; ++i)
    ldmatrix_x4(a[i], line_chunk(lines, first + 16 * i + lane % 16, 2 * step + lane / 16));
}

// Right-hand fragments where a line is a column of the product: lines first, ..., first + 31.
__device__ __forceinline__ void load_right(std::uint32_t (&b)[4][2], unsigned char* lines, int first,
                                           int step) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    std::uint32_t r[4];
    const int line = first + 8 * j + lane / 16 * 8 + lane % 8;
    ldmatrix_x4(r, line_chunk(lines, line, 2 * step + lane / 8 % 2));
    b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
  }
}

// float32 as the sum of two numbers that the tensor core reads exactly but for 2^-20 of the whole. Infinity
// becomes NaN.
__device__ __forceinline__ void split_tf32(std::uint32_t x, std::uint32_t* high, std::uint32_t* low) {
  *high = x & 0xffffe000u;
  *low = __float_as_uint(__uint_as_float(x) - __uint_as_float(*high));
}

// sums += a * b, one step. In float32 three tf32 products make one, and the tensor core adds up only these:
// it truncates, which over thousands of additions to one sum would show.
template <typename T, int M>
__device__ __forceinline__ void multiply(float (&sums)[M][4][4], const std::uint32_t (&a)[M][4],
                                         const std::uint32_t (&b)[4][2]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_16x8x16(sums[i][j], a[i], b[j], T());
    }
  } else {
    std::uint32_t b_high[4][2], b_low[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      split_tf32(b[j][0], &b_high[j][0], &b_low[j][0]);
      split_tf32(b[j][1], &b_high[j][1], &b_low[j][1]);
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
      std::uint32_t a_high[4], a_low[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) split_tf32(a[i][k], &a_high[k], &a_low[k]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16x8x8_tf32(step, a_low, b_high[j]);
        mma_16x8x8_tf32(step, a_high, b_low[j]);
        mma_16x8x8_tf32(step, a_high, b_high[j]);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][j][k] += step[k];
      }
    }
  }
}

// ---- kernels of slot_head.cu ----------------------------------------------------------------------------

enum class LogitsMode : std::int32_t { predict, cross_entropy, gradient };

// Logits of slots [first, first + count) of every set with all rows, and what becomes of them in each mode.
struct LogitsParams {
  LogitsMode mode;
  Vectors states, rows;
  std::int64_t set_slots, first, count;
  std::int64_t slot_tiles, row_tiles;
  std::int64_t C;
  int V;
  float scale;
  const std::uint8_t* valid;  // [sets, V] or null
  std::int64_t valid_stride;
  SlotHeadTarget target;  // not read in prediction
  // prediction and cross-entropy
  SlotHeadPartial* partials;  // [slots, row_tiles]
  float* near;                // [slots, row_tiles, 4 window + 1] or null
  int window;
  float* probabilities;  // [slots, V] or null: here logits
  // gradient
  const float* logsumexp;  // [slots], as the next three
  const float* target_logsumexp;
  const float* factor;
  const std::uint8_t* active;
  void* gradient;         // [sets, chunk, row_pitch]
  void* gradient_by_row;  // [sets, V, chunk]
  std::int64_t chunk, row_pitch;
};

// The states as they are, or the normed ones in the workspace.
Vectors state_vectors(const SlotHeadInputs& inputs, const SlotHeadPlan& plan);
Vectors normed_vectors(const SlotHeadInputs& inputs, const SlotHeadPlan& plan);
Vectors row_vectors(const SlotHeadInputs& inputs, const SlotHeadPlan& plan);

// Writes the normed states, and where `inverse` is there each slot's 1 / sqrt(mean square + epsilon).
Status launch_normalise(const SlotHeadInputs& inputs, const SlotHeadPlan& plan, float* inverse,
                        cudaStream_t stream);
Status launch_logits(const LogitsParams& params, DType dtype, const SlotHeadPlan& plan, cudaStream_t stream);

}  // namespace visionllm::cuda::slot_head_detail
