// What the forward and the backward of fusion_attention share: products of a warp, a projection of a tile of
// rows by a weight that streams through shared memory, the layer norm, and the keys and values in shared
// memory.
//
// A block of 8 warps works on a tile of Tile<T>::kRows rows of one batch entry, all C channels of them. The
// tile lies in shared memory with 8 elements of padding after each row: rows are then an odd number of 16-byte
// units apart for 16-bit elements, and 8 or 24 words for float32, so that what a warp reads together lies in
// different banks.
#pragma once

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/numeric.cuh"
#include "device/platform.cuh"
#include "fusion_attention.h"

namespace visionllm::cuda::fusion {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPadding = 8;  // elements after each row in shared memory
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// x as a number of which the compiler knows nothing: it does not keep in registers what it computed from x
// before, from one phase of a kernel to a later one.
__device__ __forceinline__ int anew(int x) {
#ifndef VISIONLLM_EMULATION
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Products of 16 x kDepth by kDepth x 8 and their operands, for 16-bit elements. `Left` is 16 rows of the left
// matrix, `Right` 8 columns of the right one. "Transposed" is said of what lies in memory: the depth runs
// along rows (false) or along columns (true) there.
template <typename T>
struct Product {
  static constexpr int kDepth = 16;
  static constexpr int kAccumulators = 2;  // of 8 columns, whose values are a left operand of kDepth
  struct Left {
    std::uint32_t word[4];
  };
  struct Right {
    std::uint32_t word[2];
  };

  // Element [m][k] at tile[m * stride + k]. Of depth 8 only, with zeros behind, when `half`.
  static __device__ __forceinline__ void load_left(Left& left, const T* tile, int stride, bool half) {
    const int lane = threadIdx.x % kWarpSize;
    if (half) {
      std::uint32_t word[2];
      ldmatrix_x2(word, tile + lane % 16 * stride);
      left.word[0] = word[0], left.word[1] = word[1], left.word[2] = 0, left.word[3] = 0;
    } else {
      ldmatrix_x4(left.word, tile + lane % 16 * stride + lane / 16 * 8);
    }
  }

  // Element [m][k] at tile[k * stride + m].
  static __device__ __forceinline__ void load_left_transposed(Left& left, const T* tile, int stride) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix_x4_trans(left.word, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  }

  // 16 columns. Element [k][n] at tile[n * stride + k]; of depth 8 only, with zeros behind, when `half`.
  static __device__ __forceinline__ void load_right(Right (&right)[2], const T* tile, int stride, bool half) {
    const int lane = threadIdx.x % kWarpSize;
    if (half) {
      std::uint32_t word[2];
      ldmatrix_x2(word, tile + lane % 16 * stride);
      right[0].word[0] = word[0], right[0].word[1] = 0, right[1].word[0] = word[1], right[1].word[1] = 0;
    } else {
      load_right_at(right, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    }
  }

  // The same from a slab (below): rows of 32 bytes whose two halves change places in every other four rows.
  static __device__ __forceinline__ void load_right_slab(Right (&right)[2], const T* slab) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2 ^ row / 4 % 2;
    load_right_at(right, slab + row * kDepth + half * 8);
  }

  // Element [k][n] at tile[k * stride + n]; only the first 8 columns unless `both`.
  static __device__ __forceinline__ void load_right_transposed(Right (&right)[2], const T* tile, int stride,
                                                               bool both) {
    const int lane = threadIdx.x % kWarpSize;
    if (both) {
      std::uint32_t word[4];
      ldmatrix_x4_trans(word, tile + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8);
      right[0].word[0] = word[0], right[0].word[1] = word[1];
      right[1].word[0] = word[2], right[1].word[1] = word[3];
    } else {
      ldmatrix_x2_trans(right[0].word, tile + lane % 16 * stride);
    }
  }

  static __device__ __forceinline__ void left_of_accumulators(Left& left, const float (*c)[4]) {
    left.word[0] = pack2(from_float<T>(c[0][0]), from_float<T>(c[0][1]));
    left.word[1] = pack2(from_float<T>(c[0][2]), from_float<T>(c[0][3]));
    left.word[2] = pack2(from_float<T>(c[1][0]), from_float<T>(c[1][1]));
    left.word[3] = pack2(from_float<T>(c[1][2]), from_float<T>(c[1][3]));
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const Left& a, const Right& b) {
    mma_16x8x16(d, a.word, b.word, T());
  }

 private:
  static __device__ __forceinline__ void load_right_at(Right (&right)[2], const T* row) {
    std::uint32_t word[4];
    ldmatrix_x4(word, row);
    right[0].word[0] = word[0], right[0].word[1] = word[1];
    right[1].word[0] = word[2], right[1].word[1] = word[3];
  }
};

// The same for float32: each factor is a sum of two tf32 numbers, and of their four products all but the
// smallest are added up, which leaves a relative error of about 2^-21. The order of the depth is free as long
// as both operands have the same: here a thread's elements are neighbours, 2t and 2t + 1 where the tensor core
// has t and t + 4, so that they are one load, and accumulators are operands as they are.
template <>
struct Product<float> {
  static constexpr int kDepth = 8;
  static constexpr int kAccumulators = 1;
  struct Left {
    std::uint32_t high[4], low[4];
  };
  struct Right {
    std::uint32_t high[2], low[2];
  };

  static __device__ __forceinline__ void load_left(Left& left, const float* tile, int stride, bool) {
    const int lane = threadIdx.x % kWarpSize;
    const float* const row = tile + lane / 4 * stride + lane % 4 * 2;
    const Vector<float, 2> upper = load_vector<float, 2>(row),
                           lower = load_vector<float, 2>(row + 8 * stride);
    split(upper[0], left.high[0], left.low[0]);
    split(lower[0], left.high[1], left.low[1]);
    split(upper[1], left.high[2], left.low[2]);
    split(lower[1], left.high[3], left.low[3]);
  }

  static __device__ __forceinline__ void load_left_transposed(Left& left, const float* tile, int stride) {
    const int lane = threadIdx.x % kWarpSize;
    const float* const row = tile + lane % 4 * 2 * stride + lane / 4;
    split(row[0], left.high[0], left.low[0]);
    split(row[8], left.high[1], left.low[1]);
    split(row[stride], left.high[2], left.low[2]);
    split(row[stride + 8], left.high[3], left.low[3]);
  }

  static __device__ __forceinline__ void load_right(Right (&right)[2], const float* tile, int stride, bool) {
    const int lane = threadIdx.x % kWarpSize;
    const float* const row = tile + lane / 4 * stride + lane % 4 * 2;
    load_right_at(right[0], row);
    load_right_at(right[1], row + 8 * stride);
  }

  static __device__ __forceinline__ void load_right_slab(Right (&right)[2], const float* slab) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane / 4, half = lane % 4 / 2 ^ row / 4 % 2;
    const float* const pair = slab + row * kDepth + half * 4 + lane % 2 * 2;
    load_right_at(right[0], pair);
    load_right_at(right[1], pair + 8 * kDepth);
  }

  static __device__ __forceinline__ void load_right_transposed(Right (&right)[2], const float* tile,
                                                               int stride, bool both) {
    const int lane = threadIdx.x % kWarpSize;
    const float* const row = tile + lane % 4 * 2 * stride + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 0 || both) {
        split(row[8 * i], right[i].high[0], right[i].low[0]);
        split(row[stride + 8 * i], right[i].high[1], right[i].low[1]);
      }
    }
  }

  static __device__ __forceinline__ void left_of_accumulators(Left& left, const float (*c)[4]) {
    split(c[0][0], left.high[0], left.low[0]);
    split(c[0][2], left.high[1], left.low[1]);
    split(c[0][1], left.high[2], left.low[2]);
    split(c[0][3], left.high[3], left.low[3]);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const Left& a, const Right& b) {
    mma_16x8x8_tf32(d, a.low, b.high);
    mma_16x8x8_tf32(d, a.high, b.low);
    mma_16x8x8_tf32(d, a.high, b.high);
  }

 private:
  // x rounded to tf32, and the rest, of which the tensor core reads the upper bits. The rest of NaN is NaN,
  // even where rounding its bits gives a number.
  static __device__ __forceinline__ void split(float x, std::uint32_t& high, std::uint32_t& low) {
    high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
  }

  static __device__ __forceinline__ void load_right_at(Right& right, const float* pair) {
    const Vector<float, 2> both = load_vector<float, 2>(pair);
    split(both[0], right.high[0], right.low[0]);
    split(both[1], right.high[1], right.low[1]);
  }
};

// How a block's warps divide a tile. A projection: each warp has 32 rows and every kWarpColumns-th 16 columns.
// Attention: 16 rows of one head at a time.
template <typename T>
struct Tile {
  static constexpr int kRows = 128 / static_cast<int>(sizeof(T));
  static constexpr int kVector = kVectorSize<T>;
  static constexpr int kWarpRows = kRows / 32;
  static constexpr int kWarpColumns = kWarps / kWarpRows;
  static constexpr int kPairs = kFusionMaxChannels / 16 / kWarpColumns;  // of accumulators, 16 columns
  static constexpr int kRowGroups = kRows / 16;
  static constexpr int kHeadWarps = kWarps / kRowGroups;  // heads at a time
  using Accumulators = float[2][2 * kPairs][4];
};

// Heads whose keys are in shared memory together.
template <typename T>
__host__ __device__ constexpr int heads_at_once(int head_channels) {
  return head_channels <= 32 ? Tile<T>::kHeadWarps : 2;
}

// Weights come through shared memory in slabs, kDepth inputs of all outputs: 8 KiB for 256 channels, and with
// padding for the transposed order, where a slab is kDepth rows of the weight.
template <typename T>
__host__ __device__ constexpr int slab_elements(int channels) {
  return Product<T>::kDepth * (channels + kPadding);
}

template <typename T, bool kTransposed>
__device__ __forceinline__ void copy_slab(T* slab, const T* weight, int step, int channels) {
  constexpr int kDepth = Product<T>::kDepth, kVector = Tile<T>::kVector;
  if (kTransposed) {  // element [k][n] at weight[k * C + n]
    const int vectors = channels / kVector;
#pragma unroll 1
    for (int i = threadIdx.x; i < kDepth * vectors; i += kThreads) {
      const int k = i / vectors, n = (i - k * vectors) * kVector;
      copy_async_16(slab + k * (channels + kPadding) + n,
                    weight + static_cast<std::int64_t>(step * kDepth + k) * channels + n, true);
    }
  } else {  // element [k][n] at weight[n * C + k]
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * channels; i += kThreads) {
      const int n = i / 2, half = i % 2;
      copy_async_16(slab + n * kDepth + (half ^ n / 4 % 2) * kVector,
                    weight + static_cast<std::int64_t>(n) * channels + step * kDepth + half * kVector, true);
    }
  }
}

// The first slabs of `project`, to be on their way before it begins.
template <typename T, bool kTransposed, int kSlabs>
__device__ __forceinline__ void start_projection(T* slabs, const T* weight, int channels) {
#pragma unroll
  for (int s = 0; s < kSlabs - 1; ++s) {
    if (s < channels / Product<T>::kDepth) {
      copy_slab<T, kTransposed>(slabs + s * slab_elements<T>(channels), weight, s, channels);
    }
    copy_async_commit();
  }
}

// acc = tile [kRows, C] * the weight. After start_projection, with no other copies in between. Has a barrier
// between the caller's writes to the tile and its own reads; the caller needs one before it changes the tile
// or the slabs.
template <typename T, bool kTransposed, int kSlabs>
__device__ __forceinline__ void project(typename Tile<T>::Accumulators& acc, const T* tile, T* slabs,
                                        const T* weight, int channels) {
  using P = Product<T>;
  using W = Tile<T>;
  const int warp = threadIdx.x / kWarpSize;
  const int steps = channels / P::kDepth, stride = channels + kPadding;
  const int warp_column = warp / W::kWarpRows;
  const T* const rows = tile + warp % W::kWarpRows * 32 * stride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * W::kPairs; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kSlabs - 2>();
    __syncthreads();  // the slab is there, and nobody reads the one before it any more
    const int next = step + kSlabs - 1;
    if (next < steps) {
      copy_slab<T, kTransposed>(slabs + next % kSlabs * slab_elements<T>(channels), weight, next, channels);
    }
    copy_async_commit();
    const T* const slab = slabs + step % kSlabs * slab_elements<T>(channels);
    typename P::Left left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      P::load_left(left[i], rows + i * 16 * stride + step * P::kDepth, stride, false);
    }
#pragma unroll
    for (int pair = 0; pair < W::kPairs; ++pair) {
      const int column = (warp_column + pair * W::kWarpColumns) * 16;
      if (column < channels) {
        typename P::Right right[2];
        if (kTransposed) {
          P::load_right_transposed(right, slab + column, stride, true);
        } else {
          P::load_right_slab(right, slab + column * P::kDepth);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          P::multiply(acc[i][2 * pair], left[i], right[0]);
          P::multiply(acc[i][2 * pair + 1], left[i], right[1]);
        }
      }
    }
  }
}

// f(place, column, first, second): the two neighbouring elements of a tile that a thread has, and where.
template <typename T, typename F>
__device__ __forceinline__ void for_each_pair(typename Tile<T>::Accumulators& acc, int channels, const F& f) {
  using W = Tile<T>;
  const int thread = anew(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int stride = channels + kPadding, row = warp % W::kWarpRows * 32 + lane / 4;
#pragma unroll
  for (int j = 0; j < 2 * W::kPairs; ++j) {
    const int column = (warp / W::kWarpRows + j / 2 * W::kWarpColumns) * 16 + j % 2 * 8 + lane % 4 * 2;
    if (column < channels) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          f((row + i * 16 + k * 8) * stride + column, column, acc[i][j][2 * k], acc[i][j][2 * k + 1]);
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* target, float first, float second) {
  Vector<T, 2> both;
  both[0] = from_float<T>(first), both[1] = from_float<T>(second);
  store_vector<T, 2>(target, both);
}

// A row of C <= 256 channels over a warp, 8 for each lane; lanes beyond the row have zeros.
__device__ __forceinline__ bool has_channels(int channels) {
  return static_cast<int>(threadIdx.x % kWarpSize) * 8 < channels;
}

template <typename T>
__device__ __forceinline__ void load_row(float (&values)[8], const T* row, int channels, bool valid) {
  if (valid && has_channels(channels)) {
    load_floats<T, 8>(values, row + threadIdx.x % kWarpSize * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0.0f;
  }
}

// values becomes (values - mean) / sqrt(variance + epsilon), and 0 in lanes beyond the row; returns the factor.
__device__ __forceinline__ float normalise_row(float (&values)[8], int channels, float epsilon) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += values[i];
  const float mean = warp_sum(sum) / static_cast<float>(channels);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = has_channels(channels) ? values[i] - mean : 0.0f;
    squares += values[i] * values[i];
  }
  const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(channels) + epsilon);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] *= factor;
  return factor;
}

// tile = layer norm of the rows of x from `first` on, zeros' norm behind the last; four rows of a warp are
// loaded at a time. Writes them to `normed` too unless it is null. Both point to the batch entry.
template <typename T>
__device__ __forceinline__ void normalise_tile(T* tile, T* normed, const T* x, const T* norm_weight,
                                               const T* norm_bias, int first, int positions, int channels,
                                               float epsilon) {
  constexpr int kAtOnce = 4;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float weight[8], bias[8];
  load_row(weight, norm_weight, channels, true);
  load_row(bias, norm_bias, channels, true);
#pragma unroll 1
  for (int start = 0; start < Tile<T>::kRows; start += kAtOnce * kWarps) {
    float values[kAtOnce][8];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int n = first + start + i * kWarps + warp;
      load_row(values[i], x + static_cast<std::int64_t>(n) * channels, channels, n < positions);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = start + i * kWarps + warp;
      normalise_row(values[i], channels, epsilon);
      if (has_channels(channels)) {
#pragma unroll
        for (int j = 0; j < 8; ++j) values[i][j] = values[i][j] * weight[j] + bias[j];
        store_floats<T, 8>(tile + row * (channels + kPadding) + lane * 8, values[i]);
        if (normed != nullptr && first + row < positions) {
          store_floats<T, 8>(normed + static_cast<std::int64_t>(first + row) * channels + lane * 8,
                             values[i]);
        }
      }
    }
  }
}

// Copies the tile's rows to memory, 16 bytes a thread. `rows` points to the batch entry.
template <typename T>
__device__ __forceinline__ void store_tile(T* rows, const T* tile, int first, int positions, int channels) {
  constexpr int kVector = Tile<T>::kVector;
  const int vectors = channels / kVector;
  for (int i = threadIdx.x; i < Tile<T>::kRows * vectors; i += kThreads) {
    const int row = i / vectors, column = (i - row * vectors) * kVector;
    if (first + row < positions) {
      store_vector<T, kVector>(rows + static_cast<std::int64_t>(first + row) * channels + column,
                               load_vector<T, kVector>(tile + row * (channels + kPadding) + column));
    }
  }
}

// What is added to a token's scores: 0, or -infinity where there is no text, up to `padded` tokens. Returns how
// many tokens there are up to the last that is text. Two barriers.
__device__ __forceinline__ int read_mask(float* bias, int* count, const std::uint8_t* mask, int tokens,
                                         int padded) {
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  int last = 0;
  for (int t = threadIdx.x; t < padded; t += blockDim.x) {
    const bool text = t < tokens && mask[t] != 0;
    bias[t] = text ? 0.0f : -INFINITY;
    if (text) last = t + 1;
  }
  if (last > 0) atomicMax(count, last);
  __syncthreads();
  return *count;
}

// Copies kKeys tokens of some heads to shared memory, zeros where there is no text: [kKeys, columns + padding].
// `source` points to the batch entry's first of these heads.
template <typename T, int kKeys>
__device__ __forceinline__ void copy_tokens(T* target, const T* source, std::int64_t stride_t,
                                            std::int64_t stride_h, const float* bias, int first, int heads,
                                            int heads_given, int head_channels) {
  constexpr int kVector = Tile<T>::kVector;
  const int head_vectors = head_channels / kVector, vectors = heads * head_vectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < kKeys * vectors; i += kThreads) {
    const int key = i / vectors, rest = i - key * vectors;
    const int head = rest / head_vectors, column = (rest - head * head_vectors) * kVector;
    const bool valid = head < heads_given && bias[first + key] == 0.0f;
    copy_async_16(target + key * (vectors * kVector + kPadding) + rest * kVector,
                  valid ? source + (first + key) * stride_t + head * stride_h + column : source, valid);
  }
}

// c[keys] = the left rows [16, D] by the tokens [kKeys, D] in shared memory, scores of 16 rows. Tiles of 16
// tokens from `count` on are left at 0.
template <typename T, int kKeys>
__device__ __forceinline__ void multiply_tokens(float (&c)[kKeys / 8][4], const T* rows, int row_stride,
                                                const T* tokens, int token_stride, int head_channels,
                                                int count) {
  using P = Product<T>;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < head_channels; k += P::kDepth) {
    const bool half = k + P::kDepth > head_channels;
    typename P::Left left;
    P::load_left(left, rows + k, row_stride, half);
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      if (j * 16 < count) {
        typename P::Right right[2];
        P::load_right(right, tokens + j * 16 * token_stride + k, token_stride, half);
        P::multiply(c[2 * j], left, right[0]);
        P::multiply(c[2 * j + 1], left, right[1]);
      }
    }
  }
}

// sum[D] += c [16, kKeys] by the tokens [kKeys, D], for the first `count` tokens.
template <typename T, int kKeys>
__device__ __forceinline__ void gather_tokens(float (&sum)[kFusionMaxHeadChannels / 8][4],
                                              const float (&c)[kKeys / 8][4], const T* tokens,
                                              int token_stride, int head_channels, int count) {
  using P = Product<T>;
#pragma unroll
  for (int k = 0; k < kKeys / P::kDepth; ++k) {
    if (k * P::kDepth < count) {
      typename P::Left left;
      P::left_of_accumulators(left, c + k * P::kAccumulators);
#pragma unroll
      for (int j = 0; j < kFusionMaxHeadChannels / 16; ++j) {
        if (j * 16 < head_channels) {
          const bool both = j * 16 + 8 < head_channels;
          typename P::Right right[2];
          P::load_right_transposed(right, tokens + k * P::kDepth * token_stride + j * 16, token_stride, both);
          P::multiply(sum[2 * j], left, right[0]);
          if (both) P::multiply(sum[2 * j + 1], left, right[1]);
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void clear(T (&tiles)[kFusionMaxHeadChannels / 8][4]) {
#pragma unroll
  for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
    tiles[j][0] = tiles[j][1] = tiles[j][2] = tiles[j][3] = 0.0f;
  }
}

// The running maximum and sum of a softmax over base 2 for rows g and g + 8 of a warp's 16 (g = lane / 4), each
// spread over 4 lanes.
struct Softmax {
  float maximum[2], sum[2];  // the sum of the lane's own columns

  __device__ __forceinline__ void reset() {
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // c = exp2(c + bias - maximum); what was gathered before is scaled to the new maximum.
  template <int kKeys>
  __device__ __forceinline__ void step(float (&c)[kKeys / 8][4], const float* bias,
                                       float (&gathered)[kFusionMaxHeadChannels / 8][4]) {
    const int t = threadIdx.x % 4;
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const Vector<float, 2> b = load_vector<float, 2>(bias + j * 8 + t * 2);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        c[j][2 * k] += b[0], c[j][2 * k + 1] += b[1];
        top[k] = fmaxf(top[k], fmaxf(c[j][2 * k], c[j][2 * k + 1]));
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      top[k] = warp_max<4>(top[k]);
      const float base = top[k] == -INFINITY ? 0.0f : top[k];
      const float scale = exp2f(maximum[k] - base);
      maximum[k] = top[k];
      sum[k] *= scale;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        c[j][2 * k] = exp2f(c[j][2 * k] - base);
        c[j][2 * k + 1] = exp2f(c[j][2 * k + 1] - base);
        sum[k] += c[j][2 * k] + c[j][2 * k + 1];
      }
#pragma unroll
      for (int j = 0; j < kFusionMaxHeadChannels / 8; ++j) {
        gathered[j][2 * k] *= scale, gathered[j][2 * k + 1] *= scale;
      }
    }
  }
};

// ---- backward -------------------------------------------------------------------------------------------

using Params = FusionAttentionBackwardParams;
using Workspace = FusionAttentionWorkspace;

constexpr int kSums = 4;  // of columns: see FusionAttentionWorkspace::column_sums

// All sums over rows, after the row kernel; in fusion_attention_backward_sums.cu.
template <typename T>
Status launch_sums(const Params& params, const Workspace& layout, cudaStream_t stream);

}  // namespace visionllm::cuda::fusion
