// The product that the forward and grad_x of the linear layer with low-rank adapters share:
//
//   C[row, n] = sum over k of A[row, k] base[n, k] + sum over r of low_rank[row, r] adapter_e[n, r]
//
// for a range of columns n, with the adapter e of each row. Columns are taken in blocks, in each block the depth in
// chunks: a chunk of the base is packed once and multiplied with all rows of a block of rows while it lies in
// the cache; the sums wait in the workspace.
#pragma once

#include "lora_linear.h"
#include "matmul.h"

namespace visionllm::cpu::VISIONLLM_ISA {

struct LoraWorkspace {
  float* sums;     // [block rows or R, kLoraSumStride]
  void* packed;    // kLoraBlockColumns * kLoraBlockDepth words
  void* staged;    // 48 * kLoraSumStride words
  float* factors;  // 48 * 128
  float* adapter;  // R * max(kLoraBlockColumns, T)

  LoraWorkspace(const LoraLinearParams& p, void* memory) {
    const int64_t rows = lora_block_rows(p) > p.R ? lora_block_rows(p) : p.R;
    sums = static_cast<float*>(memory);
    packed = sums + rows * kLoraSumStride;
    staged = static_cast<float*>(packed) + kLoraBlockColumns * kLoraBlockDepth;
    factors = static_cast<float*>(staged) + kTileRows * kLoraSumStride;
    adapter = factors + kTileRows * 128;
  }
};

VISIONLLM_INLINE int64_t row_of(const LoraRows& rows, int64_t position) {
  return rows.order == nullptr ? position : rows.order[position];
}
VISIONLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VISIONLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// sums [rows, columns] (a block) = or += A [rows, words] times packed columns.
template <typename Word>
VISIONLLM_INLINE void multiply_panels(float* sums, const Word* a, int64_t lda, int64_t rows,
                                      const Word* packed, int64_t columns, int64_t words, bool first) {
  for (int64_t panel = 0; panel < columns; panel += kPanel)
    matmul_panel(rows, panel_vectors(columns, panel), sums + panel, kLoraSumStride, a, lda,
                 packed + panel * words, words, first);
}

// The operand whose rows are multiplied: [T, K].
template <typename TA>
struct LoraOperand {
  const TA* data;
  int64_t stride;
  int64_t K;
  const float* scale;  // [K], what its columns are multiplied by, or null; float words only
};

// Rows at positions begin .. end as words, elements k .. k + count; *stride becomes the distance of the rows.
template <typename Word, typename TA>
const Word* words_of_rows(const LoraOperand<TA>& a, const LoraRows& rows, int64_t begin, int64_t end,
                          int64_t k, int64_t count, Word* staged, int64_t* stride) {
  constexpr bool kWhole = kSame<TA, Word> || kPerWord<Word> == 2;
  if constexpr (kWhole) {
    const bool pairs = kPerWord<Word> == 1 || (count % 2 == 0 && a.stride % 2 == 0);
    // Not with strides that put many rows on one set of the cache.
    if (pairs && rows.order == nullptr && a.scale == nullptr &&
        a.stride * static_cast<int64_t>(sizeof(TA)) % 4096 != 0) {
      *stride = a.stride / kPerWord<Word>;
      return reinterpret_cast<const Word*>(a.data + begin * a.stride + k);
    }
  }
  for (int64_t p = begin; p < end; ++p) {
    Word* to = staged + (p - begin) * kTileStride;
    stage_rows(to, a.data + row_of(rows, p) * a.stride + k, 0, 1, count);
    if constexpr (kSame<Word, float>) {
      if (a.scale == nullptr) continue;
      for (int64_t i = 0; i < count; i += kWidth)
        store(to + i, load(to + i) * load_first(a.scale + k + i, count - i));
    }
  }
  *stride = kTileStride;
  return staged;
}

// The base's part for rows at positions begin .. end (a block) and columns n .. n + columns, into w.sums.
//   pack(packed, n, columns, k, count)  packs elements k .. k + count of these columns
template <typename Word, typename TA, typename Pack>
VISIONLLM_INLINE void base_product(const LoraWorkspace& w, const LoraOperand<TA>& a, const LoraRows& rows,
                                   int64_t begin, int64_t end, int64_t n, int64_t columns, const Pack& pack) {
  constexpr int64_t kDepth = kLoraBlockDepth * kPerWord<Word>;
  Word* packed = static_cast<Word*>(w.packed);
  for (int64_t k = 0; k < a.K || k == 0; k += kDepth) {
    const int64_t count = smaller(a.K - k, kDepth);
    pack(w.packed, n, columns, k, count);
    for (int64_t p = begin; p < end; p += kTileRows) {
      const int64_t stop = smaller(end, p + kTileRows);
      int64_t stride;
      const Word* words = words_of_rows(a, rows, p, stop, k, count, static_cast<Word*>(w.staged), &stride);
      multiply_panels(w.sums + (p - begin) * kLoraSumStride, words, stride, stop - p, packed, columns,
                      words_of<Word>(count), k == 0);
    }
  }
}

// Adds the adapters' part to w.sums.
//   pack(packed, e, n, columns)  packs the R words of these columns of adapter e, as floats
template <typename Pack>
VISIONLLM_INLINE void add_adapters(const LoraWorkspace& w, const float* low_rank, int64_t R,
                                   const LoraRows& rows, int64_t E, int64_t begin, int64_t end, int64_t n,
                                   int64_t columns, const Pack& pack) {
  for (int64_t e = 0; e < E; ++e) {
    const int64_t from = larger(begin, rows.segments[e]), to = smaller(end, rows.segments[e + 1]);
    if (from >= to) continue;
    pack(w.adapter, e, n, columns);
    for (int64_t p = from; p < to; p += kTileRows) {
      const int64_t count = smaller(to - p, kTileRows);
      const float* factors = low_rank + p * R;
      if (rows.order != nullptr) {
        for (int64_t i = 0; i < count; ++i)
          memcpy(w.factors + i * R, low_rank + rows.order[p + i] * R, static_cast<size_t>(R) * sizeof(float));
        factors = w.factors;
      }
      multiply_panels(w.sums + (p - begin) * kLoraSumStride, factors, R, count, w.adapter, columns, R, false);
    }
  }
}

// All rows, in blocks, for the columns begin .. end: base, adapters, then finish(row, n, F sum, lanes) for each piece
// of a row. column_scale: what the base's part of each column is multiplied by, or null.
template <typename Word, typename TA, typename PackBase, typename PackAdapter, typename Finish>
VISIONLLM_INLINE void adapted_product(const LoraLinearParams& p, const LoraOperand<TA>& a,
                                      const float* low_rank, const float* column_scale, int64_t begin,
                                      int64_t end, void* workspace, const PackBase& pack_base,
                                      const PackAdapter& pack_adapter, const Finish& finish) {
  const LoraWorkspace w(p, workspace);
  for (int64_t row = 0; row < p.T; row += kLoraBlockRows) {
    const int64_t stop = smaller(p.T, row + kLoraBlockRows);
    for (int64_t n = begin; n < end; n += kLoraBlockColumns) {
      const int64_t columns = smaller(end - n, kLoraBlockColumns);
      base_product<Word>(w, a, p.rows, row, stop, n, columns, pack_base);
      if (column_scale != nullptr) {
        for (int64_t c = 0; c < columns; c += kWidth) {
          const F scale = load_first(column_scale + n + c, columns - c);
          for (int64_t i = 0; i < stop - row; ++i) {
            float* sum = w.sums + i * kLoraSumStride + c;
            store(sum, load(sum) * scale);
          }
        }
      }
      add_adapters(w, low_rank, p.R, p.rows, p.E, row, stop, n, columns, pack_adapter);
      for (int64_t i = row; i < stop; ++i) {
        const float* sum = w.sums + (i - row) * kLoraSumStride;
        for (int64_t c = 0; c < columns; c += kWidth)
          finish(row_of(p.rows, i), n + c, load(sum + c), static_cast<int>(smaller(columns - c, kWidth)));
      }
    }
  }
}

// low_rank[row, r] = factor_e times the sum over k of A[row, k] adapter_e[r, k] for the rows at positions
// begin .. end; zero in rows without adapter.
//   pack(packed, e, k, count)  packs elements k .. k + count of adapter e's R columns
template <typename TA, typename Pack>
VISIONLLM_INLINE void low_rank_product(const LoraLinearParams& p, const LoraOperand<TA>& a, float* low_rank,
                                       int64_t begin, int64_t end, void* workspace, const Pack& pack) {
  using Word = typename WordOf<TA>::type;
  const LoraWorkspace w(p, workspace);
  for (int64_t e = 0; e <= p.E; ++e) {
    const int64_t from = larger(begin, p.rows.segments[e]);
    const int64_t to = e == p.E ? end : smaller(end, p.rows.segments[e + 1]);
    for (int64_t block = from; block < to; block += kLoraBlockRows) {
      const int64_t stop = smaller(to, block + kLoraBlockRows);
      if (e < p.E) {
        base_product<Word>(
            w, a, p.rows, block, stop, 0, p.R,
            [&](void* packed, int64_t, int64_t, int64_t k, int64_t count) { pack(packed, e, k, count); });
      }
      const F factor = set(e < p.E ? p.factor[e] : 0.0f);
      for (int64_t i = block; i < stop; ++i) {
        float* out = low_rank + row_of(p.rows, i) * p.R;
        const float* sum = w.sums + (i - block) * kLoraSumStride;
        for (int64_t r = 0; r < p.R; r += kWidth) {
          const F value = e < p.E ? load(sum + r) * factor : set(0.0f);
          store_first(out + r, value, p.R - r);
        }
      }
    }
  }
}

template <typename T>
VISIONLLM_INLINE const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}

// Calls function(T{}) for the element type.
template <typename Function>
VISIONLLM_INLINE void with_element(Element element, const Function& function) {
  switch (element) {
    case Element::bfloat16: return function(bfloat16{});
    case Element::float16: return function(float16{});
    default: return function(0.0f);
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
