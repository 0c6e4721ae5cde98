// Language fusion on the CPU: preparation of weights and tokens, and the forward. Formula and contract are in
// include/visionllm/fusion_attention.h; cpu/fusion_attention_block.h says how a block lies in memory.
//
// A block goes through the whole layer at once: nothing but the output is written to memory that the next
// block does not use again.
#include "cpu/fusion_attention_block.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

template <typename T>
void to_floats(float* to, const void* from, int64_t count) {
  const auto row = [from](int64_t) { return static_cast<const T*>(from); };
  copy(1, count, 1, row, [to](int64_t, int64_t c) { return to + c; });
}

template <typename T, typename Word>
void prepare(const FusionAttentionParams& p) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  to_floats<T>(w.norm_weight, p.norm_weight, s.C);
  to_floats<T>(w.norm_bias, p.norm_bias, s.C);
  to_floats<T>(w.gate, p.gate, s.C);
  to_floats<T>(w.output_bias, p.output_bias, s.C);
  to_floats<T>(w.query_bias, p.query_bias, s.C);
  for (int64_t c = 0; c < s.C; ++c) w.gated_bias[c] = w.gate[c] * w.output_bias[c];
  const T* const query = static_cast<const T*>(p.query_weight);
  const T* const output = static_cast<const T*>(p.output_weight);
  constexpr int kWhole = kPerWord<Word>;
  const auto panels = [](float* to, int64_t N, int64_t depth) {
    return [=](int64_t k, int64_t n) {
      const Column column = panel_column(n, N, depth);
      return to + column.offset + k * column.stride;
    };
  };
  if (!s.folded) {
    copy(
        s.C, s.C, kWhole, [&](int64_t r) { return query + r * s.C; },
        [&](int64_t r, int64_t c) { return elements(w.query + r * s.across) + c; });
    if (p.backward) {
      copy_transposed(
          s.C, s.C, kWhole, [&](int64_t r) { return output + r * s.C; },
          [&](int64_t r, int64_t c) { return elements(w.output_transposed + r * s.across) + c; });
    }
  }
  for (int64_t h = 0; h < s.H; ++h) {
    const T* const query_rows = query + h * s.D * s.C;
    const auto query_row = [&](int64_t r) { return query_rows + r * s.C; };
    const auto output_row = [&](int64_t r) { return output + r * s.C + h * s.D; };
    const auto to_head = [&](Word* to) {
      return [=](int64_t r, int64_t c) { return elements(to + r * s.across_heads + h * s.Dw) + c; };
    };
    if (!s.folded) {
      copy(s.C, s.D, kWhole, output_row, to_head(w.output));
      if (p.backward) copy_transposed(s.D, s.C, kWhole, query_row, to_head(w.query_transposed));
    }
    if (s.folded || p.backward) {
      copy(s.D, s.C, kWidth, query_row, panels(w.query_rows + h * s.D * s.floats, s.C, s.D));
      copy_transposed(s.C, s.D, kWidth, output_row, panels(w.output_rows + h * s.D * s.floats, s.C, s.D));
    }
    if (s.folded && p.backward) {
      const int64_t at = h * s.C * s.head_floats;
      copy_transposed(s.D, s.C, kWidth, query_row, panels(w.query_columns + at, s.D, s.C), 1.0f,
                      w.norm_weight);
      const auto place = panels(w.output_columns + at, s.D, s.C);
      for (int64_t c = 0; c < s.C; ++c) {
        copy(
            1, s.D, kWidth, [&](int64_t) { return output_row(c); },
            [&](int64_t, int64_t d) { return place(c, d); }, w.gate[c]);
      }
      for (int64_t d = 0; d < s.D; ++d) {
        F sum_of = set(0.0f);
        for (int64_t c = 0; c < s.C; c += kWidth) {
          const int64_t left = s.C - c;
          sum_of = mul_add(load_at_most(query_row(d) + c, left), load_at_most(w.norm_bias + c, left), sum_of);
        }
        float lanes[kWidth], total = w.query_bias[h * s.D + d];
        store(lanes, sum_of);
        for (const float lane : lanes) total += lane;
        w.query_shift[h * s.D + d] = total;
      }
    }
  }
  for (int64_t c = 0; c < s.C; ++c) w.query_bias[c] *= s.scale;
}

template <typename T, typename Word>
void prepare_tokens(const FusionAttentionParams& p, int64_t b) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const Tokens<Word> tokens = tokens_of(s, p, b);
  const int64_t count = tokens.count;
  const int32_t* const texts = p.texts + b * p.tokens;
  constexpr int kWhole = kPerWord<Word>;
  for (int64_t h = 0; h < s.H; ++h) {
    const T* const key = static_cast<const T*>(p.key) + b * p.key_stride_b + h * p.key_stride_h;
    const T* const value = static_cast<const T*>(p.value) + b * p.value_stride_b + h * p.value_stride_h;
    const auto key_row = [&](int64_t t) { return key + texts[t] * p.key_stride_t; };
    const auto value_row = [&](int64_t t) { return value + texts[t] * p.value_stride_t; };
    if (!s.folded) {
      const auto by_token = [&](Word* to) {
        return [=](int64_t t, int64_t d) { return elements(to + (h * s.T + t) * s.Dw) + d; };
      };
      const auto by_channel = [&](Word* to) {
        return [=](int64_t d, int64_t t) { return elements(to + (h * s.D + d) * s.Tw) + t; };
      };
      copy(count, s.D, kWhole, key_row, by_token(tokens.key));
      copy_transposed(count, s.D, kWhole, value_row, by_channel(tokens.value_transposed));
      if (p.backward) {
        copy_transposed(count, s.D, kWhole, key_row, by_channel(tokens.key_transposed));
        copy(count, s.D, kWhole, value_row, by_token(tokens.value));
      }
      continue;
    }
    const int64_t first = h * tokens.padded;
    // K' = K_h W_q,h or V' = V_h W_o,h^T, as rows of tokens and transposed.
    const auto fold = [&](const auto& row, const float* weight, float factor, Word* by_token,
                          Word* by_channel) {
      copy(count, s.D, 1, row, [&](int64_t t, int64_t d) { return tokens.rows + t * s.D + d; });
      float* const product = tokens.grad_key;
      multiply(product, s.floats, tokens.rows, s.D, count, weight + h * s.D * s.floats, s.C, s.D, true);
      const auto from = [&](int64_t t) -> const float* { return product + t * s.floats; };
      if (by_token != nullptr) {
        copy(
            count, s.C, kWhole, from,
            [&](int64_t t, int64_t c) { return elements(by_token + (first + t) * s.across) + c; }, factor);
        if (count < tokens.padded) memset(by_token + (first + count) * s.across, 0, s.Cw * sizeof(Word));
      }
      if (by_channel != nullptr) {
        copy_transposed(
            count, s.C, kWhole, from,
            [&](int64_t c, int64_t t) {
              return elements(by_channel + c * s.across_tokens + h * tokens.words) + t;
            },
            factor);
      }
    };
    fold(value_row, w.output_rows, 1.0f, p.backward ? tokens.value : nullptr, tokens.value_transposed);
    fold(key_row, w.query_rows, s.scale, tokens.key, p.backward ? tokens.key_transposed : nullptr);
    for (int64_t t = 0; t < count; ++t) {  // rows are the key's now
      float bias = 0.0f;
      for (int64_t d = 0; d < s.D; ++d) bias += tokens.rows[t * s.D + d] * w.query_bias[h * s.D + d];
      tokens.key_bias[first + t] = bias;
    }
    if (p.backward) {
      const auto by_channel = [&](float* to) {
        return [=](int64_t d, int64_t t) { return to + (h * s.D + d) * s.T + t; };
      };
      copy_transposed(count, s.D, 1, key_row, by_channel(tokens.key_columns));
      copy_transposed(count, s.D, 1, value_row, by_channel(tokens.value_columns));
    }
  }
}

template <typename T, typename Word>
void forward(const FusionAttentionParams& p, int64_t begin, int64_t end, char* workspace) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const ForwardBlock<Word> block(s, {workspace});
  const int64_t blocks = (p.positions + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks, row = item % blocks * kBlock;
    const int64_t at = (b * p.positions + row) * s.C;
    const int64_t valid = p.positions - row < kBlock ? p.positions - row : kBlock;
    const Tokens<Word> tokens = tokens_of(s, p, b);
    load_columns(block.columns, static_cast<const T*>(p.x) + at, s.C, valid);
    normalise(block.columns, s, w, p.epsilon, block.mean, block.inverse, block.normed);
    const auto finish_row = [&](int64_t m, const float* product) {
      const F gate = set(w.gate[m]), bias = set(w.gated_bias[m]);
      for_vectors([&](int v, int) {
        float* const to = block.columns + m * kBlock + v;
        store(to, load(to) + mul_add(load(product + v), gate, bias));
      });
    };
    const auto finish = [&](int64_t m, const float* product, bool two) {
      finish_row(m, product);
      if (two) finish_row(m + 1, product + kBlock);
    };
    if (s.folded) {
      multiply(block.scores, kBlock, tokens.key, s.across, s.H * tokens.padded, block.normed, kBlock, s.Cw,
               true);
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t first = h * tokens.padded;
        float* const scores = block.scores + first * kBlock;
        exponentials(scores, tokens.count, tokens.key_bias + first, block.inverse);
        store_weights<Word>(block.weights, nullptr, first, scores, tokens.count, block.inverse);
      }
      multiply_block(tokens.value_transposed, s.across_tokens, s.C, block.weights, s.H * tokens.words,
                     finish);
    } else {
      for (int64_t h = 0; h < s.H; ++h) {
        query_of_head(s, w, h, block.normed, block.query, static_cast<float*>(nullptr));
        multiply(block.scores, kBlock, tokens.key + h * s.T * s.Dw, s.Dw, tokens.count, block.query, kBlock,
                 s.Dw, true);
        exponentials(block.scores, tokens.count, nullptr, block.inverse);
        store_weights<Word>(block.weights, nullptr, 0, block.scores, tokens.count, block.inverse);
        Word* const attended = block.attended + h * s.Dw * kBlock;
        multiply_block(tokens.value_transposed + h * s.D * s.Tw, s.Tw, s.D, block.weights, tokens.words,
                       [&](int64_t m, const float* product, bool two) {
                         for_vectors([&](int v, int) {
                           store_rows(attended, m, v, load(product + v), load(product + kBlock + v), two);
                         });
                       });
      }
      multiply_block(w.output, s.across_heads, s.C, block.attended, s.H * s.Dw, finish);
    }
    store_columns(static_cast<T*>(p.output) + at, block.columns, static_cast<const T*>(nullptr), s.C, valid);
  }
}

template <typename Word>
void layout_of(const FusionAttentionParams& p, FusionAttentionLayout* layout) {
  const Shape<Word> s(p);
  layout->block_rows = kBlock;
  Weights<Word>(s, p.backward, {nullptr}, &layout->shared);
  Tokens<Word>(s, p.backward, 0, {nullptr}, &layout->entry);
  ForwardBlock<Word>(s, {nullptr}, &layout->workspace);
  if (!p.backward) return;
  SliceSums<Word>(s, {nullptr}, &layout->slice);
  HeadSums(s.floats, {nullptr}, &layout->head);
  int64_t sum_bytes;
  SumBlock(s, {nullptr}, &sum_bytes);
  BackwardBlock<Word>(s, {nullptr}, &layout->workspace);
  if (sum_bytes > layout->workspace) layout->workspace = sum_bytes;
}

}  // namespace

void fusion_attention_layout(const FusionAttentionParams& params, FusionAttentionLayout* layout) {
  with_element(params, [&](auto, auto word) { layout_of<decltype(word)>(params, layout); });
}

void fusion_attention_prepare(const FusionAttentionParams& params) {
  with_element(params, [&](auto element, auto word) { prepare<decltype(element), decltype(word)>(params); });
}

void fusion_attention_prepare_tokens(const FusionAttentionParams& params, int64_t begin, int64_t end) {
  with_element(params, [&](auto element, auto word) {
    for (int64_t b = begin; b < end; ++b) prepare_tokens<decltype(element), decltype(word)>(params, b);
  });
}

void fusion_attention_kernel(const FusionAttentionParams& params, int64_t begin, int64_t end,
                             void* workspace) {
  with_element(params, [&](auto element, auto word) {
    forward<decltype(element), decltype(word)>(params, begin, end, static_cast<char*>(workspace));
  });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
