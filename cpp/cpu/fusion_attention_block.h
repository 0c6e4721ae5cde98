// What the forward and backward kernels of language fusion share: how a block of positions lies in memory, the
// products, the layer norm and the softmax.
//
// A block is kBlock positions. Its rows of C channels are transposed as they are read, so that the lanes of a
// vector are positions: norm and softmax then are sums of vectors, of any number of channels and tokens, and
// weights and tokens are the operand of which single numbers are broadcast, as they lie in memory. Four forms:
//
//   columns  [channels, kBlock] float
//   strip    [channels, kBlock] words of cpu/matmul.h: the other operand of a product that sums over channels
//   plain    [channels, kBlock] elements, for a product that sums over positions. Where words are floats,
//            a strip is that already, and both are the same memory
//   panels   [kBlock, channels] words, in panels of kPanel channels as matmul.h has them: the other operand
//            of a product that sums over positions
#pragma once

#include "cpu/fusion_attention_memory.h"

namespace visionllm::cpu::VISIONLLM_ISA {

// ---- words ------------------------------------------------------------------------------------------------

// Rows `a` and `b` of a strip, the first of which is even, at a column.
VISIONLLM_INLINE void store_rows(float* strip, int64_t row, int64_t column, F a, F b, bool two) {
  store(strip + row * kBlock + column, a);
  if (two) store(strip + (row + 1) * kBlock + column, b);
}

VISIONLLM_INLINE void store_plain(float* plain, int64_t row, int64_t column, F a) {
  store(plain + row * kBlock + column, a);
}

#ifdef __AVX512BF16__
VISIONLLM_INLINE void store_pair(PairWord* p, F low, F high) {
  const __m512i order = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(0x10001)),
      _mm512_set1_epi32(0x100000));
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}

VISIONLLM_INLINE void store_rows(PairWord* strip, int64_t row, int64_t column, F a, F b, bool two) {
  store_pair(strip + row / 2 * kBlock + column, a, two ? b : set(0.0f));
}

VISIONLLM_INLINE void store_plain(PairWord* plain, int64_t row, int64_t column, F a) {
  store(&plain[(row * kBlock + column) / 2].low, a);
}
#endif

// kWidth positions from `row` on, of as many columns, where a column of panels begins.
template <typename Word>
VISIONLLM_INLINE void store_tile(Word* to, int64_t row, int stride, const F* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i += kPerWord<Word>) {
    if constexpr (kPerWord<Word> == 1) {
      store(to + (row + i) * stride, tile[i]);
    } else {
      store_pair(to + (row + i) / 2 * stride, tile[i], tile[i + 1]);
    }
  }
}

// Where column n of panels [K rows, N columns] of `depth` words begins, and the words from a row to the next.
struct Column {
  int64_t offset;
  int stride;
};
VISIONLLM_INLINE Column panel_column(int64_t n, int64_t N, int64_t depth) {
  const int64_t panel = n / kPanel * kPanel;
  const int stride = panel_vectors(N, panel) * kWidth;
  return {panel * depth + n - panel, stride};
}

// ---- products ---------------------------------------------------------------------------------------------

// Rows to take at once where `left` remain: an even number, and no few at the end.
VISIONLLM_INLINE int next_rows(int64_t left) {
  if (left <= kMicroRows) return static_cast<int>(left);
  if (left >= 2 * kMicroRows || kMicroRows < 4) return kMicroRows;
  return static_cast<int>((left + 3) / 4 * 2);
}

// c [M, N] = (first ? 0 : c) + a [M, depth] times panels of b.
template <typename Word>
void multiply(float* c, int64_t ldc, const Word* a, int64_t lda, int64_t M, const Word* b, int64_t N,
              int64_t depth, bool first) {
  for (int64_t n = 0; n < N; n += kPanel) {
    for (int64_t m = 0; m < M;) {
      const int rows = next_rows(M - m);
      matmul_vectors(panel_vectors(N, n), rows, c + m * ldc + n, ldc, a + m * lda, lda, b + n * depth, depth,
                     first);
      m += rows;
    }
  }
}

// epilogue(m, columns, two) gets rows m (even) and, if two, m + 1 of a [M, depth] times a strip, as columns.
template <typename Word, typename Epilogue>
VISIONLLM_INLINE void multiply_block(const Word* a, int64_t lda, int64_t M, const Word* strip, int64_t depth,
                                     Epilogue&& epilogue) {
  alignas(64) float tile[kMicroRows * kBlock];
  for (int64_t m = 0; m < M;) {
    const int rows = next_rows(M - m);
    matmul_rows<kPanelVectors>(rows, tile, kBlock, a + m * lda, lda, strip, depth, true);
    for (int i = 0; i < rows; i += 2) epilogue(m + i, tile + i * kBlock, i + 1 < rows);
    m += rows;
  }
}

// body(offset, vector) for each vector of a row of columns.
template <typename Body>
VISIONLLM_INLINE void for_vectors(Body&& body) {
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) body(v * kWidth, v);
}

// ---- transposition ----------------------------------------------------------------------------------------

template <typename T>
VISIONLLM_INLINE F load_at_most(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_partial(p, static_cast<int>(n));
}

template <typename Word>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<PairWord> {
  using type = bfloat16;
};

template <typename Word>
VISIONLLM_INLINE auto elements(Word* words) {
  return reinterpret_cast<typename ElementOf<Word>::type*>(words);
}

template <typename E>
VISIONLLM_INLINE void store_at_most(E* to, F value, int64_t lanes) {
  if (lanes >= kWidth) {
    store(to, value);
  } else {
    store_partial(to, value, static_cast<int>(lanes));
  }
}

// Copies row(r) of [rows, cols], times column_factor [cols] if not null, converted, to place(r, c) for every
// c that is a multiple of kWidth; `whole` completes rows with zeros to a multiple of that many elements.
template <typename Row, typename Place>
void copy(int64_t rows, int64_t cols, int64_t whole, const Row& row, const Place& place,
          float factor = 1.0f) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kWidth)
      store_at_most(place(r, c), load_at_most(row(r) + c, cols - c) * set(factor), round_up(cols - c, whole));
  }
}

// The same to place(c, r), for every r that is a multiple of kWidth.
template <typename Row, typename Place>
void copy_transposed(int64_t rows, int64_t cols, int64_t whole, const Row& row, const Place& place,
                     float factor = 1.0f, const float* column_factor = nullptr) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      const F scale = column_factor == nullptr ? set(factor) : load_at_most(column_factor + c, cols - c);
      F tile[kWidth];
      for (int i = 0; i < kWidth; ++i)
        tile[i] = r + i < rows ? load_at_most(row(r + i) + c, cols - c) * scale : set(0.0f);
      transpose(tile);
      for (int i = 0; i < kWidth; ++i) {
        if (c + i < cols) store_at_most(place(c + i, r), tile[i], round_up(rows - r, whole));
      }
    }
  }
}

// kWidth positions from `row` on by kWidth channels from `c` on of x [valid, C]; zeros elsewhere.
template <typename T>
VISIONLLM_INLINE void load_tile(F* tile, const T* x, int64_t C, int64_t valid, int64_t row, int64_t c) {
  if (row + kWidth <= valid && c + kWidth <= C) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) tile[i] = load(x + (row + i) * C + c);
  } else {
    for (int i = 0; i < kWidth; ++i)
      tile[i] = row + i < valid ? load_at_most(x + (row + i) * C + c, C - c) : set(0.0f);
  }
}

// Columns of x's block; channels up to whole vectors are written.
template <typename T>
void load_columns(float* columns, const T* x, int64_t C, int64_t valid) {
  for (int64_t row = 0; row < kBlock; row += kWidth) {
    for (int64_t c = 0; c < C; c += kWidth) {
      F tile[kWidth];
      load_tile(tile, x, C, valid, row, c);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(columns + (c + i) * kBlock + row, tile[i]);
    }
  }
}

// y [valid, C] = columns, transposed, + x; null x adds nothing. Columns have channels up to whole vectors.
template <typename T>
void store_columns(T* y, const float* columns, const T* x, int64_t C, int64_t valid) {
  for (int64_t row = 0; row < valid; row += kWidth) {
    for (int64_t c = 0; c < C; c += kWidth) {
      F tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = load(columns + (c + i) * kBlock + row);
      transpose(tile);
      const int lanes = static_cast<int>(C - c < kWidth ? C - c : kWidth);
      const int rows = static_cast<int>(valid - row < kWidth ? valid - row : kWidth);
      for (int i = 0; i < rows; ++i) {
        const int64_t at = (row + i) * C + c;
        const F value = x == nullptr ? tile[i] : tile[i] + load_at_most(x + at, lanes);
        if (lanes == kWidth) {
          store(y + at, value);
        } else {
          store_partial(y + at, value, lanes);
        }
      }
    }
  }
}

// Panels [kBlock, N] from columns [N up to whole vectors, kBlock].
template <typename Word>
void columns_to_panels(Word* panels, const float* columns, int64_t N) {
  for (int64_t n = 0; n < N; n += kWidth) {
    const Column to = panel_column(n, N, kPlain<Word>);
    for (int64_t row = 0; row < kBlock; row += kWidth) {
      F tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = load(columns + (n + i) * kBlock + row);
      transpose(tile);
      store_tile(panels + to.offset, row, to.stride, tile);
    }
  }
}

// ---- norm and softmax -------------------------------------------------------------------------------------

// Of each position: mean and 1 / standard deviation; and normed as a strip.
template <typename Word>
void normalise(const float* columns, const Shape<Word>& s, const Weights<Word>& weights, float epsilon,
               float* mean, float* inverse, Word* normed) {
  const float share = 1.0f / static_cast<float>(s.C);
  F m[kPanelVectors], r[kPanelVectors];
  for_vectors([&](int, int v) { m[v] = r[v] = set(0.0f); });
  for (int64_t c = 0; c < s.C; ++c)
    for_vectors([&](int at, int v) { m[v] = m[v] + load(columns + c * kBlock + at); });
  for_vectors([&](int at, int v) { store(mean + at, m[v] = m[v] * set(share)); });
  for (int64_t c = 0; c < s.C; ++c) {
    for_vectors([&](int at, int v) {
      const F centred = load(columns + c * kBlock + at) - m[v];
      r[v] = mul_add(centred, centred, r[v]);
    });
  }
  for_vectors([&](int at, int v) { store(inverse + at, r[v]); });
  for (int i = 0; i < kBlock; ++i) inverse[i] = 1.0f / sqrtf(inverse[i] * share + epsilon);
  for_vectors([&](int at, int v) { r[v] = load(inverse + at); });
  for (int64_t c = 0; c < s.C; c += 2) {
    const bool two = c + 1 < s.C;
    const int64_t next = two ? c + 1 : c;
    const F w0 = set(weights.norm_weight[c]), b0 = set(weights.norm_bias[c]);
    const F w1 = set(weights.norm_weight[next]), b1 = set(weights.norm_bias[next]);
    for_vectors([&](int at, int v) {
      const F a = (load(columns + c * kBlock + at) - m[v]) * r[v];
      const F b = (load(columns + next * kBlock + at) - m[v]) * r[v];
      store_rows(normed, c, at, mul_add(a, w0, b0), mul_add(b, w1, b1), two);
    });
  }
}

// scores [count, kBlock], plus bias (or null), become 2^(score - maximum); inverse is 1 / their sum, 0 of none.
static inline void exponentials(float* scores, int64_t count, const float* bias, float* inverse) {
  F most[kPanelVectors], sum[kPanelVectors];
  for_vectors([&](int, int v) { most[v] = set(-HUGE_VALF), sum[v] = set(0.0f); });
  for (int64_t t = 0; t < count; ++t) {
    const F add = set(bias == nullptr ? 0.0f : bias[t]);
    for_vectors([&](int at, int v) { most[v] = max(most[v], load(scores + t * kBlock + at) + add); });
  }
  for (int64_t t = 0; t < count; ++t) {
    const F add = set(bias == nullptr ? 0.0f : bias[t]);
    for_vectors([&](int at, int v) {
      const F e = exp2(load(scores + t * kBlock + at) + add - most[v]);
      sum[v] = sum[v] + e;
      store(scores + t * kBlock + at, e);
    });
  }
  for_vectors([&](int at, int v) { store(inverse + at, sum[v]); });
  for (int i = 0; i < kBlock; ++i) inverse[i] = inverse[i] > 0.0f ? 1.0f / inverse[i] : inverse[i];
}

// The softmax's weights, exponentials * inverse, as rows `row` on of a strip and, if it is not null, plain.
template <typename Word>
void store_weights(Word* strip, Word* plain, int64_t row, const float* exponentials, int64_t count,
                   const float* inverse) {
  F factor[kPanelVectors];
  for_vectors([&](int at, int v) { factor[v] = load(inverse + at); });
  for (int64_t t = 0; t < count; t += 2) {
    const bool two = t + 1 < count;
    for_vectors([&](int at, int v) {
      const F a = load(exponentials + t * kBlock + at) * factor[v];
      const F b = two ? load(exponentials + (t + 1) * kBlock + at) * factor[v] : set(0.0f);
      store_rows(strip, row + t, at, a, b, two);
      if (kPerWord<Word> > 1 && plain != nullptr) {
        store_plain(plain, row + t, at, a);
        store_plain(plain, row + t + 1, at, b);
      }
    });
  }
}

// ---- what both directions begin with ----------------------------------------------------------------------

// query = (query_weight normed + query_bias) * scale of a head as a strip, and as columns unless they are null.
template <typename Word>
void query_of_head(const Shape<Word>& s, const Weights<Word>& weights, int64_t h, const Word* normed,
                   Word* strip, float* columns) {
  const float* const bias = weights.query_bias + h * s.D;
  multiply_block(weights.query + h * s.D * s.across, s.across, s.D, normed, s.Cw,
                 [&](int64_t m, const float* product, bool two) {
                   const F bias_0 = set(bias[m]), bias_1 = set(bias[two ? m + 1 : m]);
                   for_vectors([&](int at, int) {
                     const F a = mul_add(load(product + at), set(s.scale), bias_0);
                     const F b = mul_add(load(product + kBlock + at), set(s.scale), bias_1);
                     store_rows(strip, m, at, a, b, two);
                     if (columns != nullptr) {
                       store(columns + m * kBlock + at, a);
                       if (two) store(columns + (m + 1) * kBlock + at, b);
                     }
                   });
                 });
}

// body(element, word) with a value of the tensors' type and one of the words that their products take.
template <typename Body>
VISIONLLM_INLINE void with_element(const FusionAttentionParams& params, Body&& body) {
  switch (params.element) {
    case Element::float32: return body(float{}, float{});
    case Element::bfloat16: return body(bfloat16{}, typename WordOf<bfloat16>::type{});
    case Element::float16: return body(float16{}, float{});
    default: return;
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
