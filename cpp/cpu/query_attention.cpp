// Forward of batched query decoding on the CPU; query_attention.h has the parameters,
// include/visionllm/query_attention.h the contract, query_attention_block.h the way a block is computed.
//
// The prefix is taken kKeys keys at a time with a running maximum (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018), which begins with the maximum over the row's own group.
#include "cpu/query_attention_block.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

template <typename T>
struct Forward {
  using Word = typename WordOf<T>::type;

  const Params& p;
  RowOrder order;
  int64_t ld;          // of rows [.., D] in float
  int64_t ld_keys;     // of keys in words
  int64_t ld_columns;  // of values^T in words
  int64_t bytes;

  Word* keys;     // [P][ld_keys]
  Word* columns;  // values^T: [D][ld_columns]
  float* own_k;   // [chunk * S][ld]
  Queries<T> queries;
  float* scores;   // [kKeys][kRows], then weights
  float* own;      // [S][kRows] scores and then weights of the keys of the row's group
  float* output;   // [D][kRows]
  float* highest;  // [kRows] maximum of the scores so far
  float* sum;      // [kRows] sum of the weights

  Forward(const Params& params, void* workspace) : p(params), order(params) {
    Slices slices{workspace};
    ld = round_up(p.channels, kWidth * kPerWord<Word>);
    ld_keys = ld / kPerWord<Word>;
    // Rows of the transpose start on different sets of the cache.
    ld_columns = round_up(words_of<Word>(p.prefix), kWidth) + kWidth;
    keys = slices.take<Word>(p.prefix * ld_keys);
    columns = slices.take<Word>(p.channels * ld_columns);
    own_k = slices.take<float>(p.chunk * p.slots * ld);
    queries.take(&slices, ld, p.channels);
    scores = slices.take<float>(kKeys * kRows);
    own = slices.take<float>(p.slots * kRows);
    output = slices.take<float>(p.channels * kRows);
    highest = slices.take<float>(kRows);
    sum = slices.take<float>(kRows);
    bytes = slices.bytes;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t chunks = query_attention_chunks(p);
    memset(own_k, 0, static_cast<size_t>(p.chunk * p.slots * ld) * sizeof(float));
    memset(queries.rows, 0, static_cast<size_t>(kRows * ld) * sizeof(float));
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const Head head(p, item / chunks);
      if (item / chunks != packed) {
        const T* k = prefix_head<T>(p.prefix_k, head);
        const T* v = prefix_head<T>(p.prefix_v, head);
        pack_rows(k, p.prefix_k.stride_p, head.length, p.channels, keys, ld_keys);
        pack_columns(v, p.prefix_v.stride_p, head.length, p.channels, columns, ld_columns);
        packed = item / chunks;
      }
      const int64_t first = item % chunks * p.chunk;
      const int64_t groups = p.groups - first < p.chunk ? p.groups - first : p.chunk;
      own_keys<T>(p, head, first, groups, own_k, ld);
      const int64_t per_group = p.slots * order.heads;
      for (int64_t i = 0; i < groups * per_group; i += kRows) {
        const int64_t left = groups * per_group - i;
        block(head, first, order.at(first * per_group + i), left < kRows ? left : kRows);
      }
    }
  }

  void block(const Head& head, int64_t first_group, const Row& first, int64_t count) {
    queries.load_rotated(p, head, order, first, count, ld, score_factor(p));
    own_scores(first_group, first, count);
    memset(output, 0, static_cast<size_t>(p.channels * kRows) * sizeof(float));
    for (int64_t t = 0; t < head.length; t += kKeys)
      prefix(t, head.length - t < kKeys ? head.length - t : kKeys);
    own_weights();
    finish(head, first, count);
  }

  void own_scores(int64_t first_group, Row row, int64_t count) {
    const F nothing = set(-INFINITY);
    for (int64_t i = 0; i < p.slots * kRows; i += kWidth) store(own + i, nothing);
    Dots dots;
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      const float* key = own_k + (row.group - first_group) * p.slots * ld;
      for (int64_t t = 0; t <= row.slot; ++t)
        dots.add(queries.rows + i * ld, key + t * ld, ld, own + t * kRows + i);
    }
    dots.finish();
    for (int64_t i = count; i < kRows; ++i) own[i] = 0.0f;  // rows that are not there get harmless numbers
    for (int64_t i = 0; i < kRows; i += kWidth) {
      F most = load(own + i);
      for (int64_t t = 1; t < p.slots; ++t) most = max(most, load(own + t * kRows + i));
      store(highest + i, most);
      store(sum + i, set(0.0f));
    }
  }

  // Adds keys [t, t + n) of the prefix. t is a multiple of kKeys, which is even.
  void prefix(int64_t t, int64_t n) {
    matmul_panel(n, kPanelVectors, scores, kRows, keys + t * ld_keys, ld_keys, queries.lanes,
                 words_of<Word>(p.channels), true);
    bool raised = false;
    float factors[kRows];
    for (int64_t i = 0; i < kRows; i += kWidth) {
      const F before = load(highest + i);
      F most = before;
      for (int64_t k = 0; k < n; ++k) most = max(most, load(scores + k * kRows + i));
      raised = raised || bits(greater(most, before)) != 0;
      const F factor = exp2(before - most);
      store(highest + i, most);
      store(factors + i, factor);
      store(sum + i, load(sum + i) * factor);
    }
    if (raised) {
      for (int64_t d = 0; d < p.channels; ++d) {
        for (int64_t i = 0; i < kRows; i += kWidth)
          store(output + d * kRows + i, load(output + d * kRows + i) * load(factors + i));
      }
    }
    Word* weights = reinterpret_cast<Word*>(scores);
    for (int64_t i = 0; i < kRows; i += kWidth) to_weights(n, i, weights + i);
    matmul_panel(p.channels, kPanelVectors, output, kRows, columns + t / kPerWord<Word>, ld_columns, weights,
                 words_of<Word>(n), false);
  }

  // Scores to weights in place, as words along the keys.
  VISIONLLM_INLINE void to_weights(int64_t n, int64_t i, float* weights) {
    const F most = load(highest + i);
    F total = load(sum + i);
    for (int64_t k = 0; k < n; ++k) {
      const F weight = exp2(load(scores + k * kRows + i) - most);
      total = total + weight;
      store(weights + k * kRows, weight);
    }
    store(sum + i, total);
  }
#ifdef __AVX512BF16__
  VISIONLLM_INLINE void to_weights(int64_t n, int64_t i, PairWord* weights) {
    const F most = load(highest + i);
    F total = load(sum + i);
    for (int64_t k = 0; k < n; k += 2) {
      const F low = exp2(load(scores + k * kRows + i) - most);
      const F high = k + 1 < n ? exp2(load(scores + (k + 1) * kRows + i) - most) : set(0.0f);
      total = total + (low + high);
      store_words(weights + k / 2 * kRows, {_mm512_castsi512_ps(pair_bfloat16(low, high).v)});
    }
    store(sum + i, total);
  }
#endif

  void own_weights() {
    for (int64_t i = 0; i < kRows; i += kWidth) {
      const F most = load(highest + i);
      F total = load(sum + i);
      for (int64_t t = 0; t < p.slots; ++t) {
        const F weight = exp2(load(own + t * kRows + i) - most);
        total = total + weight;
        store(own + t * kRows + i, weight);
      }
      store(sum + i, total);
    }
  }

  // Adds the values of the rows' own groups, divides by the sums and stores.
  void finish(const Head& head, Row row, int64_t count) {
    float* rows = queries.rows;
    lanes_to_rows(output, p.channels, rows, ld);
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      const int64_t number = row_number(p, head, row);
      const T* v = slot_row<T>(p.v, head.b, row.group, 0, head.g);
      T* to = static_cast<T*>(p.output) + number * p.channels;
      const F factor = set(1.0f / sum[i]);
      for (int64_t d = 0; d < p.channels; d += kWidth) {
        F value = load(rows + i * ld + d);
        for (int64_t t = 0; t <= row.slot; ++t) {
          value =
              mul_add(set(own[t * kRows + i]), load_some(v + t * p.v.stride_s + d, p.channels - d), value);
        }
        store_some(to + d, value * factor, p.channels - d);
      }
      p.logsumexp[number] = highest[i] * kLn2 + logf(sum[i]);
    }
  }
};

}  // namespace

int64_t query_attention_workspace_bytes(const QueryAttentionParams& params) {
  return params.element == Element::bfloat16 ? Forward<bfloat16>(params, nullptr).bytes
                                             : Forward<float>(params, nullptr).bytes;
}

void query_attention_kernel(const QueryAttentionParams& params, int64_t begin, int64_t end, void* workspace) {
  switch (params.element) {
    case Element::bfloat16: return Forward<bfloat16>(params, workspace).run(begin, end);
    case Element::float16: return Forward<float16>(params, workspace).run(begin, end);
    default: return Forward<float>(params, workspace).run(begin, end);
  }
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
