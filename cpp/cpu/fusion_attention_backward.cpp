// Backward of language fusion on the CPU, over the positions; cpu/fusion_attention_sums.cpp makes gradients of
// the sums. cpu/fusion_attention_block.h says how a block lies in memory.
//
// Nothing is kept from the forward: a block's queries, scores and weights are computed again. With
//
//   grad_attended = (grad_output * gate) output_weight         grad_value  = weights^T grad_attended
//   grad_scores = weights * (grad_weights - their mean),        grad_weights = grad_attended value^T
//   grad_query = grad_scores key / sqrt(D)                      grad_key = grad_scores^T query / sqrt(D)
//   grad_normed = grad_query query_weight
//
// a slice of positions sums attended^T grad_output and grad_query^T unit, where unit is normed before its
// scale and shift. The gradients of both weights, of gate and of the norm's parameters follow from these two
// without another pass over the positions. (Folded, both have a row for each head's token instead of each
// channel; see Shape.)
#include "cpu/fusion_attention_block.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// unit and grad as panels, gated as a strip, and grad_output's sum over the positions added to sums.
template <typename T, typename Word>
void load_gradient(const BackwardBlock<Word>& block, const Shape<Word>& s, const Weights<Word>& w, const T* x,
                   const T* grad_output, int64_t valid, float* sums) {
  for (int64_t row = 0; row < kBlock; row += kWidth) {
    for (int64_t c = 0; c < s.C; c += kWidth) {
      const Column to = panel_column(c, s.C, kPlain<Word>);
      F tile[kWidth];
      load_tile(tile, x, s.C, valid, row, c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        tile[i] = (tile[i] - set(block.mean[row + i])) * set(block.inverse[row + i]);
      store_tile(block.unit + to.offset, row, to.stride, tile);

      load_tile(tile, grad_output, s.C, valid, row, c);
      F sum = load(sums + c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sum = sum + tile[i];
      store(sums + c, sum);
      store_tile(block.grad + to.offset, row, to.stride, tile);
      transpose(tile);
      for (int i = 0; i < kWidth && c + i < s.C; i += kPerWord<Word>) {
        const bool two = kPerWord<Word> > 1 && c + i + 1 < s.C;
        const int next = two ? i + 1 : i;
        store_rows(block.gated, c + i, row, tile[i] * set(w.gate[c + i]), tile[next] * set(w.gate[c + next]),
                   two);
      }
    }
  }
}

// Gradients of scores, from exponentials and gradients of weights, as rows `row` on of a strip and plain, and
// added to of_rows (or null).
template <typename Word>
void store_grad_scores(Word* strip, Word* plain, float* of_rows, int64_t row, const float* exponentials,
                       const float* grad_weights, int64_t count, const float* inverse) {
  F dot[kPanelVectors], factor[kPanelVectors];
  for_vectors([&](int at, int v) { dot[v] = set(0.0f), factor[v] = load(inverse + at); });
  for (int64_t t = 0; t < count; ++t) {
    for_vectors([&](int at, int v) {
      dot[v] = mul_add(load(exponentials + t * kBlock + at), load(grad_weights + t * kBlock + at), dot[v]);
    });
  }
  for_vectors([&](int, int v) { dot[v] = dot[v] * factor[v]; });
  const auto grad = [&](int64_t t, int at, int v) {
    const F weight = load(exponentials + t * kBlock + at) * factor[v];
    return weight * (load(grad_weights + t * kBlock + at) - dot[v]);
  };
  for (int64_t t = 0; t < count; t += 2) {
    const bool two = t + 1 < count;
    F sum_0 = set(0.0f), sum_1 = set(0.0f);
    for_vectors([&](int at, int v) {
      const F a = grad(t, at, v), b = two ? grad(t + 1, at, v) : set(0.0f);
      store_rows(strip, row + t, at, a, b, two);
      if (kPerWord<Word> > 1) {
        store_plain(plain, row + t, at, a);
        store_plain(plain, row + t + 1, at, b);
      }
      sum_0 = sum_0 + a, sum_1 = sum_1 + b;
    });
    if (of_rows != nullptr) {
      float* const to = of_rows + (row + t) * kWidth;
      store(to, load(to) + sum_0);
      if (two) store(to + kWidth, load(to + kWidth) + sum_1);
    }
  }
}

// Rows of a product as a strip and as columns.
template <typename Word>
VISIONLLM_INLINE void store_both(Word* strip, float* columns, int64_t m, const float* product, bool two) {
  for_vectors([&](int at, int) {
    const F a = load(product + at), b = load(product + kBlock + at);
    store_rows(strip, m, at, a, b, two);
    store(columns + m * kBlock + at, a);
    if (two) store(columns + (m + 1) * kBlock + at, b);
  });
}

template <typename Word>
void attend_folded(const BackwardBlock<Word>& block, const Shape<Word>& s, const Tokens<Word>& tokens,
                   const SliceSums<Word>& sums, bool first) {
  const int64_t rows = s.H * tokens.padded;
  multiply(block.scores, kBlock, tokens.key, s.across, rows, block.normed, kBlock, s.Cw, true);
  multiply(block.grad_weights, kBlock, tokens.value, s.across, rows, block.gated, kBlock, s.Cw, true);
  for (int64_t h = 0; h < s.H; ++h) {
    const int64_t row = h * tokens.padded;
    float* const scores = block.scores + row * kBlock;
    exponentials(scores, tokens.count, tokens.key_bias + row, block.factor);
    store_weights(block.weights, block.weights_plain, row, scores, tokens.count, block.factor);
    store_grad_scores(block.grad_scores, block.grad_scores_plain, sums.of_rows, row, scores,
                      block.grad_weights + row * kBlock, tokens.count, block.factor);
  }
  multiply(sums.by_grad, s.floats, block.weights_plain, kPlain<Word>, rows, block.grad, s.C, kPlain<Word>,
           first);
  multiply(sums.by_unit, s.floats, block.grad_scores_plain, kPlain<Word>, rows, block.unit, s.C, kPlain<Word>,
           first);
}

template <typename Word>
void attend_head(const BackwardBlock<Word>& block, const Shape<Word>& s, const Weights<Word>& w,
                 const Tokens<Word>& tokens, int64_t h, const SliceSums<Word>& sums, bool first) {
  const int64_t by_token = h * s.T * s.Dw, by_channel = h * s.D * s.Tw, count = tokens.count;
  query_of_head(s, w, h, block.normed, block.query, block.head_columns);
  columns_to_panels(block.query_panels, block.head_columns, s.D);
  multiply_block(w.output_transposed + h * s.D * s.across, s.across, s.D, block.gated, s.Cw,
                 [&](int64_t m, const float* product, bool two) {
                   store_both(block.grad_attended, block.head_columns, m, product, two);
                 });
  columns_to_panels(block.grad_attended_panels, block.head_columns, s.D);

  multiply(block.scores, kBlock, tokens.key + by_token, s.Dw, count, block.query, kBlock, s.Dw, true);
  multiply(block.grad_weights, kBlock, tokens.value + by_token, s.Dw, count, block.grad_attended, kBlock,
           s.Dw, true);
  exponentials(block.scores, count, nullptr, block.factor);
  store_weights(block.weights, block.weights_plain, 0, block.scores, count, block.factor);
  store_grad_scores(block.grad_scores, block.grad_scores_plain, nullptr, 0, block.scores, block.grad_weights,
                    count, block.factor);
  multiply_block(tokens.value_transposed + by_channel, s.Tw, s.D, block.weights, tokens.words,
                 [&](int64_t m, const float* product, bool two) {
                   for_vectors([&](int at, int) {
                     store_plain(block.attended, m, at, load(product + at));
                     if (two) store_plain(block.attended, m + 1, at, load(product + kBlock + at));
                   });
                 });

  Word* const strip = block.grad_query + h * s.Dw * kBlock;
  Word* const plain = kPerWord<Word> > 1 ? block.grad_query_plain : strip;
  multiply_block(tokens.key_transposed + by_channel, s.Tw, s.D, block.grad_scores, tokens.words,
                 [&](int64_t m, const float* product, bool two) {
                   const F factor = set(s.scale * kLn2);
                   F sum_0 = set(0.0f), sum_1 = set(0.0f);
                   for_vectors([&](int at, int) {
                     const F a = load(product + at) * factor, b = load(product + kBlock + at) * factor;
                     store_rows(strip, m, at, a, b, two);
                     if (kPerWord<Word> > 1) {
                       store_plain(plain, m, at, a);
                       if (two) store_plain(plain, m + 1, at, b);
                     }
                     sum_0 = sum_0 + a, sum_1 = sum_1 + b;
                   });
                   float* const to = sums.of_rows + (h * s.D + m) * kWidth;
                   store(to, load(to) + sum_0);
                   if (two) store(to + kWidth, load(to + kWidth) + sum_1);
                 });

  const int64_t to_tokens = h * s.T * s.head_floats, to_rows = h * s.D * s.floats;
  multiply(sums.value + to_tokens, s.head_floats, block.weights_plain, kPlain<Word>, count,
           block.grad_attended_panels, s.D, kPlain<Word>, first);
  multiply(sums.key + to_tokens, s.head_floats, block.grad_scores_plain, kPlain<Word>, count,
           block.query_panels, s.D, kPlain<Word>, first);
  multiply(sums.by_grad + to_rows, s.floats, block.attended, kPlain<Word>, s.D, block.grad, s.C, kPlain<Word>,
           first);
  multiply(sums.by_unit + to_rows, s.floats, plain, kPlain<Word>, s.D, block.unit, s.C, kPlain<Word>, first);
}

template <typename T, typename Word>
void backward_block(const FusionAttentionParams& p, const BackwardBlock<Word>& block, const Shape<Word>& s,
                    const Weights<Word>& w, const Tokens<Word>& tokens, int64_t position, int64_t valid,
                    const SliceSums<Word>& sums, bool first) {
  const T* const x = static_cast<const T*>(p.x) + position * s.C;
  const T* const grad_output = static_cast<const T*>(p.grad_output) + position * s.C;
  load_columns(block.columns, x, s.C, valid);
  normalise(block.columns, s, w, p.epsilon, block.mean, block.inverse, block.normed);
  load_gradient(block, s, w, x, grad_output, valid, sums.grad);
  if (s.folded) {
    attend_folded(block, s, tokens, sums, first);
  } else {
    for (int64_t h = 0; h < s.H; ++h) attend_head(block, s, w, tokens, h, sums, first);
  }

  // The norm's backward: grad = inverse * (g - mean(g) - unit * mean(g * unit)), g = grad_normed * norm_weight.
  for_vectors([&](int at, int) {
    store(block.mean_grad + at, set(0.0f));
    store(block.mean_product + at, set(0.0f));
  });
  const auto unit_at = [&](int64_t c, int at) {
    return (load(block.columns + c * kBlock + at) - load(block.mean + at)) * load(block.inverse + at);
  };
  const auto gather_row = [&](int64_t m, const float* product) {
    const F factor = set(w.norm_weight[m] * (s.folded ? kLn2 : 1.0f));  // K' is times log2(e)
    for_vectors([&](int at, int) {
      const F g = load(product + at) * factor;
      store(block.grad_columns + m * kBlock + at, g);
      store(block.mean_grad + at, load(block.mean_grad + at) + g);
      store(block.mean_product + at, mul_add(g, unit_at(m, at), load(block.mean_product + at)));
    });
  };
  const auto gather = [&](int64_t m, const float* product, bool two) {
    gather_row(m, product);
    if (two) gather_row(m + 1, product + kBlock);
  };
  if (s.folded) {
    multiply_block(tokens.key_transposed, s.across_tokens, s.C, block.grad_scores, s.H * tokens.words,
                   gather);
  } else {
    multiply_block(w.query_transposed, s.across_heads, s.C, block.grad_query, s.H * s.Dw, gather);
  }
  const F share = set(1.0f / static_cast<float>(s.C));
  for (int64_t c = 0; c < s.C; ++c) {
    for_vectors([&](int at, int) {
      float* const g = block.grad_columns + c * kBlock + at;
      const F mean = load(block.mean_grad + at) * share, product = load(block.mean_product + at) * share;
      store(g, (load(g) - mean - unit_at(c, at) * product) * load(block.inverse + at));
    });
  }
  store_columns(static_cast<T*>(p.grad_x) + position * s.C, block.grad_columns, grad_output, s.C, valid);
}

template <typename T, typename Word>
void backward(const FusionAttentionParams& p, int64_t begin, int64_t end, char* workspace) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const BackwardBlock<Word> block(s, {workspace});
  const int64_t blocks = (p.positions + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.slices, slice = item % p.slices;
    const int64_t from = blocks * slice / p.slices, to = blocks * (slice + 1) / p.slices;
    const Tokens<Word> tokens = tokens_of(s, p, b);
    const SliceSums<Word> sums(s, {p.sums + item * p.slice_bytes});
    const int64_t rows = s.folded ? s.H * tokens.padded : s.C;
    memset(sums.of_rows, 0, static_cast<size_t>(rows) * kWidth * sizeof(float));
    memset(sums.grad, 0, static_cast<size_t>(s.floats) * sizeof(float));
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = i * kBlock;
      const int64_t valid = p.positions - row < kBlock ? p.positions - row : kBlock;
      backward_block<T>(p, block, s, w, tokens, b * p.positions + row, valid, sums, i == from);
    }
  }
}

}  // namespace

void fusion_attention_backward_kernel(const FusionAttentionParams& params, int64_t begin, int64_t end,
                                      void* workspace) {
  with_element(params, [&](auto element, auto word) {
    backward<decltype(element), decltype(word)>(params, begin, end, static_cast<char*>(workspace));
  });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
