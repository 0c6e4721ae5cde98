// A product for few rows of A, which reads B once, as it lies: C[m, n] = sum over k of A[m, k] B[n, k], both with k
// contiguous. Each sum is a dot product over vectors along k, whose lanes are added up at its end. Only memory
// limits one row; from about 64 rows on, packing B (cpu/matmul.h) costs less than the loads here.
#pragma once

#include "matmul.h"

namespace visionllm::cpu::VISIONLLM_ISA {

// Sums at a time: as many as the registers hold beside a vector of each row and column.
constexpr int kStreamColumns = 4;
constexpr int kStreamTileRows = VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) <= 2 ? 2 : 4;

VISIONLLM_INLINE F multiply_words(const float*, F sum, F a, F b) { return mul_add(a, b, sum); }
#ifdef __AVX512BF16__
VISIONLLM_INLINE F multiply_words(const PairWord*, F sum, F a, F b) {
  return dot_bfloat16(sum, {_mm512_castps_si512(a.v)}, {_mm512_castps_si512(b.v)});
}
#endif

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// What is added to a row's product: factors[r] times b[n, r], where b is the row's adapter.
template <typename T>
struct StreamAdapter {
  const float* factors;  // [R]; null: nothing
  const T* b;            // [N, R]
};

// sums[i * kColumns + j] += a[i] times b[j] over the words of K elements.
template <typename Word, int kRows, int kColumns, typename TA, typename TB>
VISIONLLM_INLINE void stream_words(F* sums, const TA* const* a, const TB* b, int64_t ldb, int64_t K) {
  constexpr int kStep = kWidth * kPerWord<Word>;
  const Word* type = nullptr;
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    F row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) row[i] = load_words(type, a[i] + k, n);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const F column = load_words(type, b + j * ldb + k, n);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        sums[i * kColumns + j] = multiply_words(type, sums[i * kColumns + j], row[i], column);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) step(k, kStep);
  if (k < K) step(k, K - k);
}

// c[i * ldc + j] for kRows rows and kColumns columns.
template <int kRows, int kColumns, typename TA, typename TB>
__attribute__((noinline)) void stream_tile(float* c, int64_t ldc, const TA* const* a, const TB* b,
                                           int64_t ldb, int64_t K, const float* column_scale,
                                           const StreamAdapter<TA>* adapters, int64_t n, int64_t R) {
  constexpr int kSums = (kRows * kColumns + kWidth - 1) / kWidth * kWidth;
  F sums[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = set(0.0f);
  stream_words<typename WordOf<TA>::type, kRows, kColumns>(sums, a, b, ldb, K);
  if (column_scale != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
        sums[i * kColumns + j] = sums[i * kColumns + j] * set(column_scale[j]);
    }
  }
  if (adapters != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (adapters[i].factors != nullptr)
        stream_words<float, 1, kColumns>(sums + i * kColumns, &adapters[i].factors, adapters[i].b + n * R, R,
                                         R);
    }
  }
  alignas(64) float totals[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i += kWidth) store(totals + i, sum_rows(sums + i));
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) c[i * ldc + j] = totals[i * kColumns + j];
  }
}

// c [M, columns] for the columns n .. n + columns of B; `adapters` has an entry for each row, or is null.
template <typename TA, typename TB>
void matmul_stream(float* c, int64_t ldc, const TA* const* a, int64_t M, const TB* b, int64_t ldb, int64_t n,
                   int64_t columns, int64_t K, const float* column_scale, const StreamAdapter<TA>* adapters,
                   int64_t R) {
  const auto tile = [&](auto rows, auto width, int64_t i, int64_t j) {
    stream_tile<decltype(rows)::value, decltype(width)::value>(
        c + i * ldc + j, ldc, a + i, b + (n + j) * ldb, ldb, K,
        column_scale == nullptr ? nullptr : column_scale + n + j,
        adapters == nullptr ? nullptr : adapters + i, n + j, R);
  };
  // Columns outside: their rows of B come from memory once and from the cache for further rows of A.
  for (int64_t j = 0; j < columns;) {
    const bool full = j + kStreamColumns <= columns;
    for (int64_t i = 0; i < M;) {
      const int64_t left = M - i;
      if (left >= kStreamTileRows) {
        full ? tile(Count<kStreamTileRows>{}, Count<kStreamColumns>{}, i, j)
             : tile(Count<kStreamTileRows>{}, Count<1>{}, i, j);
        i += kStreamTileRows;
      } else if (left >= 2) {
        full ? tile(Count<2>{}, Count<kStreamColumns>{}, i, j) : tile(Count<2>{}, Count<1>{}, i, j);
        i += 2;
      } else {
        full ? tile(Count<1>{}, Count<kStreamColumns>{}, i, j) : tile(Count<1>{}, Count<1>{}, i, j);
        i += 1;
      }
    }
    j += full ? kStreamColumns : 1;
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
