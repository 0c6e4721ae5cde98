// Backward of batched query decoding on the CPU; query_attention.h has the parameters,
// include/visionllm/query_attention.h the contract, query_attention_block.h the way a block is computed.
//
//   weight = 2^(score - log2 sum),  gradient of a score = weight (grad_output . v - grad_output . output)
//   grad_q^T [channel, row] = K^T grad_scores^T       grad_prefix_v [key, channel] += weights^T grad_output
//                                                     grad_prefix_k [key, channel] += grad_scores^T q
//
// The lanes are rows in the first three products and channels in the last two.
#include "cpu/query_attention_block.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// Rows of a block as the right side of a product that sums over them: [rows in words][vectors of channels],
// panel by panel.
template <typename Word>
void rows_to_panels(const float* rows, int64_t ld, int64_t channels, Word* to) {
  for (int64_t d = 0; d < channels; d += kPanel) {
    const int vectors = panel_vectors(channels, d);
    for (int64_t i = 0; i < kRows; i += kPerWord<Word>) {
      for (int v = 0; v < vectors; ++v, to += kWidth) {
        const float* row = rows + i * ld + d + v * kWidth;
        store_words(to, words_of_rows(to, row, row + ld, kWidth));
      }
    }
  }
}

// Gradients of one head's prefix: the sum of parts [parts][2][P][padded D], zeros behind its length.
template <typename T>
void store_sums(const Params& p, const Head& head, const float* sums, int64_t parts) {
  const int64_t ld = query_attention_padded(p.channels), plane = p.prefix * ld;
  for (int64_t t = 0; t < p.prefix; ++t) {
    const int64_t to = ((head.b * p.prefix + t) * p.kv_heads + head.g) * p.channels;
    for (int64_t d = 0; d < p.channels; d += kWidth) {
      F sum_k = set(0.0f), sum_v = set(0.0f);
      for (int64_t part = 0; t < head.length && part < parts; ++part) {
        const float* from = sums + 2 * part * plane + t * ld + d;
        sum_k = sum_k + load(from);
        sum_v = sum_v + load(from + plane);
      }
      store_some(static_cast<T*>(p.grad_prefix_k) + to + d, sum_k * set(kLn2), p.channels - d);
      store_some(static_cast<T*>(p.grad_prefix_v) + to + d, sum_v, p.channels - d);
    }
  }
}

template <typename T>
struct Backward {
  using Word = typename WordOf<T>::type;
  using Staged = typename StagedOf<Word>::type;
  static constexpr int64_t kRowWords = kRows / kPerWord<Word>;

  const Params& p;
  RowOrder order;
  int64_t ld;          // of rows [.., D] in float
  int64_t ld_keys;     // of keys and values in words
  int64_t ld_columns;  // of keys^T in words
  int64_t ld_sums;     // of sums of gradients of the prefix
  int64_t bytes;

  Word* keys;                 // [P][ld_keys]
  Word* values;               // [P][ld_keys]
  Word* columns;              // keys^T: [D][ld_columns]
  float* own_k;               // [chunk * S][ld] rotated
  float* own_v;               // [chunk * S][ld]
  float* own_grad_k;          // [chunk * S][ld] of the rotated keys, times log2(e) as q's rows are
  float* own_grad_v;          // [chunk * S][ld]
  Queries<T> queries, grads;  // grads: of the output
  Word* query_panels;         // rows_to_panels
  Word* grad_panels;
  float* scores;           // [kKeys][kRows], then weights
  float* grad_scores;      // [kKeys][kRows]
  Staged* staged_weights;  // the same in words along the rows; scores and grad_scores where those are floats
  Staged* staged_grads;
  Word* grad_words;  // grad_scores in words along the keys
  float* own;        // [S][kRows] of the keys of the row's group
  float* own_grad;   // [S][kRows]
  float* grad_q;     // [D][kRows]
  float* grad_rows;  // the same in rows: [kRows][ld]
  float* norm;       // [kRows] logsumexp in units of log 2
  float* mean;       // [kRows] grad_output . output
  float* sums;       // [2][P][ld_sums] of an only part
  float* sums_k;     // [P][ld_sums] of this part: grad_prefix_k times log2(e)
  float* sums_v;     // [P][ld_sums] grad_prefix_v

  Backward(const Params& params, void* workspace) : p(params), order(params) {
    Slices slices{workspace};
    ld = round_up(p.channels, kWidth * kPerWord<Word>);
    ld_keys = ld / kPerWord<Word>;
    ld_columns = round_up(words_of<Word>(p.prefix), kWidth) + kWidth;
    ld_sums = query_attention_padded(p.channels);
    keys = slices.take<Word>(p.prefix * ld_keys);
    values = slices.take<Word>(p.prefix * ld_keys);
    columns = slices.take<Word>(p.channels * ld_columns);
    const int64_t own_rows = p.chunk * p.slots * ld;
    own_k = slices.take<float>(own_rows), own_v = slices.take<float>(own_rows);
    own_grad_k = slices.take<float>(own_rows), own_grad_v = slices.take<float>(own_rows);
    queries.take(&slices, ld, p.channels), grads.take(&slices, ld, p.channels);
    query_panels = slices.take<Word>(kRowWords * ld_sums),
    grad_panels = slices.take<Word>(kRowWords * ld_sums);
    scores = slices.take<float>(kKeys * kRows), grad_scores = slices.take<float>(kKeys * kRows);
    if constexpr (kSame<Staged, float>) {
      staged_weights = scores, staged_grads = grad_scores;
      grad_words = grad_scores;
    } else {
      staged_weights = slices.take<Staged>(kKeys * kRows), staged_grads = slices.take<Staged>(kKeys * kRows);
      grad_words = slices.take<Word>(words_of<Word>(kKeys) * kRows);
    }
    own = slices.take<float>(p.slots * kRows), own_grad = slices.take<float>(p.slots * kRows);
    grad_q = slices.take<float>(p.channels * kRows), grad_rows = slices.take<float>(kRows * ld);
    norm = slices.take<float>(kRows), mean = slices.take<float>(kRows);
    sums = slices.take<float>(p.parts == 1 ? 2 * p.prefix * ld_sums : 0);
    bytes = slices.bytes;
  }

  void run(int64_t begin, int64_t end) {
    memset(own_k, 0, static_cast<size_t>(p.chunk * p.slots * ld) * sizeof(float));
    memset(own_v, 0, static_cast<size_t>(p.chunk * p.slots * ld) * sizeof(float));
    memset(queries.rows, 0, static_cast<size_t>(kRows * ld) * sizeof(float));
    memset(grads.rows, 0, static_cast<size_t>(kRows * ld) * sizeof(float));
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const Head head(p, item / p.parts);
      if (item / p.parts != packed) {
        const T* k = prefix_head<T>(p.prefix_k, head);
        const T* v = prefix_head<T>(p.prefix_v, head);
        pack_rows(k, p.prefix_k.stride_p, head.length, p.channels, keys, ld_keys);
        pack_rows(v, p.prefix_v.stride_p, head.length, p.channels, values, ld_keys);
        pack_columns(k, p.prefix_k.stride_p, head.length, p.channels, columns, ld_columns);
        packed = item / p.parts;
      }
      sums_k = p.parts == 1 ? sums : p.partial_sums + item * 2 * p.prefix * ld_sums;
      sums_v = sums_k + p.prefix * ld_sums;
      memset(sums_k, 0, static_cast<size_t>(head.length * ld_sums) * sizeof(float));
      memset(sums_v, 0, static_cast<size_t>(head.length * ld_sums) * sizeof(float));
      const int64_t begin_group = item % p.parts * p.part;
      const int64_t last = p.groups - begin_group < p.part ? p.groups : begin_group + p.part;
      for (int64_t first = begin_group; first < last; first += p.chunk)
        chunk(head, first, last - first < p.chunk ? last - first : p.chunk);
      if (p.parts == 1) store_sums<T>(p, head, sums, 1);
    }
  }

  void chunk(const Head& head, int64_t first, int64_t groups) {
    own_keys<T>(p, head, first, groups, own_k, ld);
    for (int64_t i = 0; i < groups * p.slots; ++i) {
      const T* v = slot_row<T>(p.v, head.b, first + i / p.slots, i % p.slots, head.g);
      for (int64_t d = 0; d < p.channels; d += kWidth)
        store_some(own_v + i * ld + d, load_some(v + d, p.channels - d), p.channels - d);
    }
    memset(own_grad_k, 0, static_cast<size_t>(groups * p.slots * ld) * sizeof(float));
    memset(own_grad_v, 0, static_cast<size_t>(groups * p.slots * ld) * sizeof(float));
    const int64_t per_group = p.slots * order.heads;
    for (int64_t i = 0; i < groups * per_group; i += kRows) {
      const int64_t left = groups * per_group - i;
      block(head, first, order.at(first * per_group + i), left < kRows ? left : kRows);
    }
    for (int64_t i = 0; i < groups * p.slots; ++i) {
      const int64_t group = first + i / p.slots, slot = i % p.slots;
      const int64_t number = ((head.b * p.groups + group) * p.slots + slot) * p.kv_heads + head.g;
      rotate(p, head.length + slot, -1.0f, kLn2, own_grad_k + i * ld,
             static_cast<T*>(p.grad_k) + number * p.channels);
      T* to = static_cast<T*>(p.grad_v) + number * p.channels;
      for (int64_t d = 0; d < p.channels; d += kWidth)
        store_some(to + d, load(own_grad_v + i * ld + d), p.channels - d);
    }
  }

  void block(const Head& head, int64_t first_group, const Row& first, int64_t count) {
    queries.load_rotated(p, head, order, first, count, ld, score_factor(p));
    load_grads(head, first, count);
    rows_to_panels(queries.rows, ld, p.channels, query_panels);
    rows_to_panels(grads.rows, ld, p.channels, grad_panels);
    own_scores(first_group, first, count);
    memset(grad_q, 0, static_cast<size_t>(p.channels * kRows) * sizeof(float));
    for (int64_t t = 0; t < head.length; t += kKeys)
      prefix(t, head.length - t < kKeys ? head.length - t : kKeys);
    finish(head, first_group, first, count);
  }

  // Rows of grad_output, and the two numbers that a row has. Rows that are not there get zeros.
  void load_grads(const Head& head, Row row, int64_t count) {
    Dots dots;
    const int64_t query_head = head.g * order.heads;
    for (int64_t i = 0; i < kRows; i += kWidth) store(norm + i, set(0.0f)), store(mean + i, set(0.0f));
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      const int64_t number = row_number(p, head, row);
      const T* grad = slot_row<T>(p.grad_output, head.b, row.group, row.slot, query_head + row.head);
      const T* output = static_cast<const T*>(p.output) + number * p.channels;
      F sum = set(0.0f);
      for (int64_t d = 0; d < p.channels; d += kWidth) {
        const F value = load_some(grad + d, p.channels - d);
        store_some(grads.rows + i * ld + d, value, p.channels - d);
        sum = mul_add(value, load_some(output + d, p.channels - d), sum);
      }
      dots.add(sum, mean + i);
      norm[i] = p.logsumexp[number] * kLog2E;
    }
    dots.finish();
    grads.spread(count, ld, p.channels);
  }

  void own_scores(int64_t first_group, Row row, int64_t count) {
    const F nothing = set(-INFINITY), zero = set(0.0f);
    for (int64_t i = 0; i < p.slots * kRows; i += kWidth) store(own + i, nothing), store(own_grad + i, zero);
    Dots dots;
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      const int64_t key = (row.group - first_group) * p.slots * ld;
      for (int64_t t = 0; t <= row.slot; ++t) {
        dots.add(queries.rows + i * ld, own_k + key + t * ld, ld, own + t * kRows + i);
        dots.add(grads.rows + i * ld, own_v + key + t * ld, ld, own_grad + t * kRows + i);
      }
    }
    dots.finish();
    for (int64_t i = 0; i < kRows; i += kWidth) {
      for (int64_t t = i; t < i + p.slots * kRows; t += kRows) {
        const F weight = exp2(load(own + t) - load(norm + i));
        store(own + t, weight);
        store(own_grad + t, weight * (load(own_grad + t) - load(mean + i)));
      }
    }
  }

  // Keys [t, t + n) of the prefix. t is a multiple of kKeys, which is even.
  void prefix(int64_t t, int64_t n) {
    const int64_t depth = words_of<Word>(p.channels);
    matmul_panel(n, kPanelVectors, scores, kRows, keys + t * ld_keys, ld_keys, queries.lanes, depth, true);
    matmul_panel(n, kPanelVectors, grad_scores, kRows, values + t * ld_keys, ld_keys, grads.lanes, depth,
                 true);
    for (int64_t i = 0; i < kRows; i += kWidth) to_weights(n, i, grad_words + i);
    for (int64_t d = 0; d < p.channels; d += kPanel) {
      const int vectors = panel_vectors(p.channels, d);
      const auto weights = reinterpret_cast<const Word*>(staged_weights);
      const auto grad_weights = reinterpret_cast<const Word*>(staged_grads);
      matmul_panel(n, vectors, sums_v + t * ld_sums + d, ld_sums, weights, kRowWords,
                   grad_panels + d * kRowWords, kRowWords, false);
      matmul_panel(n, vectors, sums_k + t * ld_sums + d, ld_sums, grad_weights, kRowWords,
                   query_panels + d * kRowWords, kRowWords, false);
    }
    matmul_panel(p.channels, kPanelVectors, grad_q, kRows, columns + t / kPerWord<Word>, ld_columns,
                 grad_words, words_of<Word>(n), false);
  }

  // Weights and gradients of scores, of rows [i, i + kWidth).
  VISIONLLM_INLINE void to_weights(int64_t n, int64_t i, float*) {
    const F own_norm = load(norm + i), own_mean = load(mean + i);
    for (int64_t at = i; at < i + n * kRows; at += kRows) {
      const F weight = exp2(load(scores + at) - own_norm);
      store(scores + at, weight);
      store(grad_scores + at, weight * (load(grad_scores + at) - own_mean));
    }
  }
#ifdef __AVX512BF16__
  VISIONLLM_INLINE void to_weights(int64_t n, int64_t i, PairWord* words) {
    const F own_norm = load(norm + i), own_mean = load(mean + i);
    F before = set(0.0f);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = k * kRows + i;
      const F weight = exp2(load(scores + at) - own_norm);
      const F grad = weight * (load(grad_scores + at) - own_mean);
      store(staged_weights + at, weight);
      store(staged_grads + at, grad);
      const F low = k % 2 == 0 ? grad : before, high = k % 2 == 0 ? set(0.0f) : grad;
      store_words(words + k / 2 * kRows, {_mm512_castsi512_ps(pair_bfloat16(low, high).v)});
      before = grad;
    }
  }
#endif

  // The rows' own groups, and grad_q.
  void finish(const Head& head, int64_t first_group, Row row, int64_t count) {
    const float scale = 1.0f / sqrtf(static_cast<float>(p.channels));
    lanes_to_rows(grad_q, p.channels, grad_rows, ld);
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      const int64_t key = (row.group - first_group) * p.slots * ld;
      float* to = grad_rows + i * ld;
      for (int64_t t = 0; t <= row.slot; ++t) {
        const F weight = set(own[t * kRows + i]), grad = set(own_grad[t * kRows + i]);
        const int64_t at = key + t * ld;
        for (int64_t d = 0; d < p.channels; d += kWidth) {
          store(to + d, mul_add(grad, load(own_k + at + d), load(to + d)));
          store(own_grad_k + at + d,
                mul_add(grad, load(queries.rows + i * ld + d), load(own_grad_k + at + d)));
          store(own_grad_v + at + d,
                mul_add(weight, load(grads.rows + i * ld + d), load(own_grad_v + at + d)));
        }
      }
      rotate(p, head.length + row.slot, -1.0f, scale, to,
             static_cast<T*>(p.grad_q) + row_number(p, head, row) * p.channels);
    }
  }
};

}  // namespace

int64_t query_attention_backward_workspace_bytes(const QueryAttentionParams& params) {
  return params.element == Element::bfloat16 ? Backward<bfloat16>(params, nullptr).bytes
                                             : Backward<float>(params, nullptr).bytes;
}

void query_attention_backward_kernel(const QueryAttentionParams& params, int64_t begin, int64_t end,
                                     void* workspace) {
  switch (params.element) {
    case Element::bfloat16: return Backward<bfloat16>(params, workspace).run(begin, end);
    case Element::float16: return Backward<float16>(params, workspace).run(begin, end);
    default: return Backward<float>(params, workspace).run(begin, end);
  }
}

void query_attention_sums_kernel(const QueryAttentionParams& params, int64_t begin, int64_t end, void*) {
  const int64_t size = params.parts * 2 * params.prefix * query_attention_padded(params.channels);
  for (int64_t i = begin; i < end; ++i) {
    const Head head(params, i);
    const float* sums = params.partial_sums + i * size;
    switch (params.element) {
      case Element::bfloat16: store_sums<bfloat16>(params, head, sums, params.parts); break;
      case Element::float16: store_sums<float16>(params, head, sums, params.parts); break;
      default: store_sums<float>(params, head, sums, params.parts);
    }
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
