// Matrix products for kernels: C[m, n] = sum over k of A[m, k] B[n, k], with whatever is to become of C in the
// caller's epilogue. Header only, for one thread: callers share rows out themselves.
//
//   B is packed once and then used for any number of rows:
//
//     pack_b<TA>(packed, b, ldb, N, K)              from b [N, K], as a linear layer's weight lies
//     pack_b_transposed<TA>(packed, b, ldb, N, K)   from b [K, N]; a last argument row_at(k) says which of b's rows
//                                                   is row k
//     matmul(a, lda, M, packed, N, K, epilogue)     a [M, K] of type TA
//
//   packed     packed_bytes(N, K) bytes (cpu/packed_matrix.h), aligned to 64
//   a, b       the last dimension contiguous, row strides lda and ldb in elements
//   TA         float, bfloat16 or float16: the type of the A that B is packed for. B has TA's type, or is int8,
//              or, for TA = float, of any type
//   epilogue   called as epilogue(int64_t m, int64_t n, F value, int lanes) once for each piece of each row:
//              C[m, n .. n + lanes) in the first `lanes` of value, n a multiple of kWidth, lanes = kWidth but at the
//              row's end. Pieces of a row come from left to right; rows come in any order
//
// Sums are in float32. The order in which a row is summed depends on K only, not on M, N or which row it is.
// Products are of floats or, where the instruction set has bfloat16 dot products and TA is bfloat16, of pairs
// of bfloat16; int8 is exact in both.
//
// The packed form: panels of kPanel columns, each with its K rows one after the other, in 32-bit words, each a
// float or a pair of bfloat16. The last panel has only as many vectors as it needs. A tile of A (kTileRows by
// kTileDepth words) is converted, or copied where its stride is bad for the cache, on the stack; so is a tile of C.
// About 100 KB of stack in all.
#pragma once

#include "packed_matrix.h"
#include "simd.h"

namespace visionllm::cpu::VISIONLLM_ISA {

// Accumulators of the inner loop: kMicroRows by kPanelVectors, in at most three quarters of the registers.
#if VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 1
constexpr int kMicroRows = 4, kPanelVectors = 4;
#elif VISIONLLM_ISA_NUMBER(VISIONLLM_ISA) == 2
constexpr int kMicroRows = 6, kPanelVectors = 2;
#else
constexpr int kMicroRows = 6, kPanelVectors = 4;
#endif
constexpr int kPanel = kPanelVectors * kWidth;  // columns
constexpr int kTileRows = 48;
constexpr int kTileColumns = 256;
constexpr int kTileDepth = 256;               // words
constexpr int kTileStride = kTileDepth + 16;  // rows of a tile of A start on different cache sets

// ---- words ------------------------------------------------------------------------------------------------

struct PairWord {
  bfloat16 low, high;
};

template <typename TA>
struct WordOf {
  using type = float;
};
#ifdef __AVX512BF16__
template <>
struct WordOf<bfloat16> {
  using type = PairWord;
};
#endif

template <typename Word>
constexpr int kPerWord = 1;  // elements
template <>
inline constexpr int kPerWord<PairWord> = 2;

template <typename T, typename U>
constexpr bool kSame = false;
template <typename T>
inline constexpr bool kSame<T, T> = true;

VISIONLLM_INLINE F accumulate(F acc, const float* a, F b) { return mul_add(set(*a), b, acc); }

// The kWidth words of a row that begin at p, `n` elements long (more than a vector's worth counts as that).
template <typename T>
VISIONLLM_INLINE F load_words(const float*, const T* p, int64_t n) {
  return load_first(p, n);
}

#ifdef __AVX512BF16__
VISIONLLM_INLINE F accumulate(F acc, const PairWord* a, I b) {
  int32_t word;
  memcpy(&word, a, sizeof word);
  return dot_bfloat16(acc, set(word), b);
}

VISIONLLM_INLINE F load_words(const PairWord*, const bfloat16* p, int64_t n) {
  const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1u;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
}

VISIONLLM_INLINE F load_words(const PairWord*, const int8_t* p, int64_t n) {
  const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1u;
  const __m512i words = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p));
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)));
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low))};
}

VISIONLLM_INLINE I load(const PairWord* p) { return {_mm512_loadu_si512(p)}; }

VISIONLLM_INLINE void store_words(PairWord* p, F words) { _mm512_storeu_ps(p, words.v); }
#endif

VISIONLLM_INLINE void store_words(float* p, F words) { store(p, words); }

// ---- packing ----------------------------------------------------------------------------------------------

template <typename Word>
VISIONLLM_INLINE int64_t words_of(int64_t K) {
  return (K + kPerWord<Word> - 1) / kPerWord<Word>;
}

// Vectors of the panel that begins at column n.
VISIONLLM_INLINE int panel_vectors(int64_t N, int64_t n) {
  const int64_t left = (N - n + kWidth - 1) / kWidth;
  return static_cast<int>(left < kPanelVectors ? left : kPanelVectors);
}

template <typename TA, typename TB>
void pack_b(void* packed, const TB* b, int64_t ldb, int64_t N, int64_t K) {
  using Word = typename WordOf<TA>::type;
  constexpr int kStep = kWidth * kPerWord<Word>;  // elements of a vector of words
  const int64_t depth = words_of<Word>(K);
  for (int64_t panel = 0; panel < N; panel += kPanel) {
    const int vectors = panel_vectors(N, panel);
    Word* to = static_cast<Word*>(packed) + panel * depth;
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = panel + v * kWidth;
      const int columns = static_cast<int>(N - n < kWidth ? N - n : kWidth);
      for (int64_t k = 0; k < K; k += kStep) {
        F rows[kWidth];
        for (int i = 0; i < kWidth; ++i)
          rows[i] = i < columns ? load_words(to, b + (n + i) * ldb + k, K - k) : set(0.0f);
        transpose(rows);
        const int64_t word = k / kPerWord<Word>;
        const int64_t left = depth - word < kWidth ? depth - word : kWidth;
        for (int i = 0; i < kWidth; ++i) {
          if (i < left) store_words(to + ((word + i) * vectors + v) * kWidth, rows[i]);
        }
      }
    }
  }
}

// Row k of B's rows is b's row row_at(k).
template <typename TA, typename TB, typename RowAt>
void pack_b_transposed(void* packed, const TB* b, int64_t ldb, int64_t N, int64_t K, const RowAt& row_at) {
  using Word = typename WordOf<TA>::type;
  const int64_t depth = words_of<Word>(K);
  for (int64_t panel = 0; panel < N; panel += kPanel) {
    const int vectors = panel_vectors(N, panel);
    Word* to = static_cast<Word*>(packed) + panel * depth;
    for (int64_t k = 0; k < K; k += kPerWord<Word>) {
      const TB* row = b + row_at(k) * ldb;
      for (int v = 0; v < vectors; ++v, to += kWidth) {
        const int64_t n = panel + v * kWidth;
        const F values = load_first(row + n, N - n);
#ifdef __AVX512BF16__
        if constexpr (kPerWord<Word> == 2) {
          const F next = k + 1 < K ? load_first(b + row_at(k + 1) * ldb + n, N - n) : set(0.0f);
          _mm512_storeu_si512(to, pair_bfloat16(values, next).v);
        } else
#endif
        {
          store(to, values);
        }
      }
    }
  }
}

template <typename TA, typename TB>
void pack_b_transposed(void* packed, const TB* b, int64_t ldb, int64_t N, int64_t K) {
  pack_b_transposed<TA>(packed, b, ldb, N, K, [](int64_t k) { return k; });
}

// ---- the product ------------------------------------------------------------------------------------------

// c [kRows, kVectors * kWidth] = (first ? 0 : c) + a [kRows, depth] times a panel of b.
template <int kRows, int kVectors, typename Word>
__attribute__((noinline)) void matmul_kernel(float* c, int64_t ldc, const Word* a, int64_t lda, const Word* b,
                                             int64_t depth, bool first) {
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = first ? set(0.0f) : load(c + r * ldc + v * kWidth);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kWidth);
    b += kVectors * kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = accumulate(sums[r][v], a + r * lda + k, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kWidth, sums[r][v]);
  }
}

template <int kVectors, int kRows = kMicroRows, typename Word>
VISIONLLM_INLINE void matmul_rows(int rows, float* c, int64_t ldc, const Word* a, int64_t lda, const Word* b,
                                  int64_t depth, bool first) {
  if (rows == kRows) return matmul_kernel<kRows, kVectors>(c, ldc, a, lda, b, depth, first);
  if constexpr (kRows > 1) matmul_rows<kVectors, kRows - 1>(rows, c, ldc, a, lda, b, depth, first);
}

template <int kVectors = kPanelVectors, typename Word>
VISIONLLM_INLINE void matmul_vectors(int vectors, int rows, float* c, int64_t ldc, const Word* a, int64_t lda,
                                     const Word* b, int64_t depth, bool first) {
  if (vectors == kVectors) return matmul_rows<kVectors>(rows, c, ldc, a, lda, b, depth, first);
  if constexpr (kVectors > 1) matmul_vectors<kVectors - 1>(vectors, rows, c, ldc, a, lda, b, depth, first);
}

// A panel's columns of a tile of C, whose rows lie ldc apart: c = (first ? 0 : c) + a times the panel of b.
template <typename Word>
void matmul_panel(int64_t rows, int vectors, float* c, int64_t ldc, const Word* a, int64_t lda, const Word* b,
                  int64_t depth, bool first) {
  // Blocks as equal as they can be: 4 and 3 rows rather than 6 and 1.
  const int64_t blocks = (rows + kMicroRows - 1) / kMicroRows;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int count = static_cast<int>((rows - row + blocks - block - 1) / (blocks - block));
    float* to = c + row * ldc;
    const Word* from = a + row * lda;
    matmul_vectors(vectors, count, to, ldc, from, lda, b, depth, first);
    row += count;
  }
}

// Rows of A as words; the last pair of an odd K is completed with zero.
template <typename Word, typename TA>
VISIONLLM_INLINE void stage_rows(Word* staged, const TA* a, int64_t lda, int64_t rows, int64_t elements) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < elements; k += kWidth * kPerWord<Word>)
      store_words(staged + r * kTileStride + k / kPerWord<Word>,
                  load_words(staged, a + r * lda + k, elements - k));
  }
}

template <typename TA, typename Epilogue>
void matmul(const TA* a, int64_t lda, int64_t M, const void* packed, int64_t N, int64_t K,
            Epilogue&& epilogue) {
  using Word = typename WordOf<TA>::type;
  alignas(64) Word staged[kTileRows * kTileStride];
  alignas(64) float tile[kTileRows * kTileColumns];
  const int64_t depth = words_of<Word>(K);
  // Where the elements are words already; not with strides that put many rows of A on one set of the cache.
  const bool direct = (kSame<TA, Word> || (kPerWord<Word> == 2 && K % 2 == 0 && lda % 2 == 0)) &&
                      lda * static_cast<int64_t>(sizeof(TA)) % 4096 != 0;
  for (int64_t m = 0; m < M; m += kTileRows) {
    const int64_t rows = M - m < kTileRows ? M - m : kTileRows;
    for (int64_t n = 0; n < N; n += kTileColumns) {
      const int64_t columns = N - n < kTileColumns ? N - n : kTileColumns;
      for (int64_t k = 0; k < depth || k == 0; k += kTileDepth) {
        const int64_t words = depth - k < kTileDepth ? depth - k : kTileDepth;
        const TA* from = a + m * lda + k * kPerWord<Word>;
        const Word* rows_of_a = staged;
        if (direct) {
          rows_of_a = reinterpret_cast<const Word*>(from);
        } else if (n == 0 || depth > kTileDepth) {
          const int64_t left = K - k * kPerWord<Word>, most = kTileDepth * kPerWord<Word>;
          stage_rows(staged, from, lda, rows, left < most ? left : most);
        }
        for (int64_t panel = 0; panel < columns; panel += kPanel) {
          const int vectors = panel_vectors(N, n + panel);
          const Word* b = static_cast<const Word*>(packed) + (n + panel) * depth + k * vectors * kWidth;
          matmul_panel(rows, vectors, tile + panel, kTileColumns, rows_of_a,
                       direct ? lda / kPerWord<Word> : kTileStride, b, words, k == 0);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; c += kWidth) {
          const int lanes = static_cast<int>(columns - c < kWidth ? columns - c : kWidth);
          epilogue(m + r, n + c, load(tile + r * kTileColumns + c), lanes);
        }
      }
    }
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
