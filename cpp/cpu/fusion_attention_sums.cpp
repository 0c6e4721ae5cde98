// The end of language fusion's backward on the CPU: gradients of weights and tokens from the sums that
// cpu/fusion_attention_backward.cpp has made over slices of the positions. Slices are added in their order, so
// the result does not depend on who summed which.
//
// With U = attended^T grad_output and G = grad_query^T unit, both [C, C], a row for each channel of each head:
//
//   grad_output_weight = gate * U^T       grad_gate = column sums of U * output_weight^T, + output_bias * sum
//   grad_query_weight  = G * norm_weight + grad_query_bias norm_bias^T       of grad_output
//   grad_norm_weight   = column sums of G * query_weight
//   grad_norm_bias     = grad_query_bias query_weight
//
// Folded, the slices' sums U' and G' have a row for each head's token, and head by head
//
//   U = value^T U'     grad_value = U' (gate * output_weight)
//   G = key^T G'       grad_key = G' (norm_weight * query_weight^T) + g (query_weight norm_bias + query_bias)^T
//
// where g is the sum of grad_scores, and G' and g are divided by sqrt(D).
#include "cpu/fusion_attention_block.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

template <typename Word>
SliceSums<Word> slice_sums(const Shape<Word>& s, const FusionAttentionParams& p, int64_t slice) {
  return SliceSums<Word>(s, {p.sums + slice * p.slice_bytes});
}

float sum_of_lanes(const float* lanes) {
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
}

// [count] floats of slices begin .. end, summed to `to`: part(slice) is where one's lie.
template <typename Part>
void add_slices(float* to, int64_t begin, int64_t end, int64_t count, float factor, const Part& part) {
  for (int64_t i = 0; i < count; i += kWidth) {
    F sum = load(part(begin) + i);
    for (int64_t slice = begin + 1; slice < end; ++slice) sum = sum + load(part(slice) + i);
    store(to + i, sum * set(factor));
  }
}

template <typename T, typename Word>
void sum_tokens(const FusionAttentionParams& p, int64_t b, char* workspace) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const Tokens<Word> tokens = tokens_of(s, p, b);
  const SumBlock block(s, {workspace});
  const int64_t begin = b * p.slices, end = begin + p.slices, count = tokens.count;
  const int64_t entry = b * p.tokens * s.C;
  T* const grad_key = static_cast<T*>(p.grad_key) + entry;
  T* const grad_value = static_cast<T*>(p.grad_value) + entry;
  memset(grad_key, 0, static_cast<size_t>(p.tokens * s.C) * sizeof(T));
  memset(grad_value, 0, static_cast<size_t>(p.tokens * s.C) * sizeof(T));
  const float inverse_root = s.scale * kLn2;
  for (int64_t h = 0; h < s.H && count > 0; ++h) {
    const auto write = [&](T* grad) {
      copy(
          count, s.D, 1, [&](int64_t t) -> const float* { return block.first + t * s.head_floats; },
          [&](int64_t t, int64_t d) { return grad + (p.texts[b * p.tokens + t] * s.H + h) * s.D + d; });
    };
    if (!s.folded) {
      const int64_t at = h * s.T * s.head_floats, floats = count * s.head_floats;
      add_slices(block.first, begin, end, floats, kLn2,  // the query was times log2(e)
                 [&](int64_t slice) { return slice_sums(s, p, slice).key + at; });
      write(grad_key);
      add_slices(block.first, begin, end, floats, 1.0f,
                 [&](int64_t slice) { return slice_sums(s, p, slice).value + at; });
      write(grad_value);
      continue;
    }
    const int64_t row = h * tokens.padded;
    const SliceSums<Word> sums = slice_sums(s, p, begin);
    float* const by_unit = sums.by_unit + row * s.floats;
    float* const by_grad = sums.by_grad + row * s.floats;
    add_slices(by_unit, begin, end, count * s.floats, inverse_root,
               [&](int64_t slice) { return slice_sums(s, p, slice).by_unit + row * s.floats; });
    add_slices(by_grad, begin, end, count * s.floats, 1.0f,
               [&](int64_t slice) { return slice_sums(s, p, slice).by_grad + row * s.floats; });
    for (int64_t t = 0; t < count; ++t) {
      float sum = 0.0f;
      for (int64_t slice = begin; slice < end; ++slice)
        sum += sum_of_lanes(slice_sums(s, p, slice).of_rows + (row + t) * kWidth);
      tokens.grad_key_bias[row + t] = sum * inverse_root;
    }
    const auto to_panels = [&](float* panels, const float* rows) {
      copy(
          count, s.C, kWidth, [&](int64_t t) { return rows + t * s.floats; },
          [&](int64_t t, int64_t c) {
            const Column to = panel_column(c, s.C, count);
            return panels + h * s.T * s.floats + to.offset + t * to.stride;
          });
    };
    to_panels(tokens.grad_key, by_unit);
    to_panels(tokens.grad_value, by_grad);
    const int64_t at = h * s.C * s.head_floats;
    multiply(block.first, s.head_floats, by_unit, s.floats, count, w.query_columns + at, s.D, s.C, true);
    for (int64_t t = 0; t < count; ++t) {
      const float bias = tokens.grad_key_bias[row + t];
      for (int64_t d = 0; d < s.D; ++d)
        block.first[t * s.head_floats + d] += bias * w.query_shift[h * s.D + d];
    }
    write(grad_key);
    multiply(block.first, s.head_floats, by_grad, s.floats, count, w.output_columns + at, s.D, s.C, true);
    write(grad_value);
  }
}

template <typename T, typename Word>
void sum_head(const FusionAttentionParams& p, int64_t h, char* workspace) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const SumBlock block(s, {workspace});
  const HeadSums sums(s.floats, {p.sums + p.batch * p.slices * p.slice_bytes + h * p.head_bytes});
  float* const by_unit = block.first;
  float* const by_grad = block.second;
  T* const grad_bias = static_cast<T*>(p.grad_query_bias) + h * s.D;
  float* const bias = sums.bias;
  if (s.folded) {
    for (int64_t d = 0; d < s.D; ++d) bias[d] = 0.0f;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Tokens<Word> tokens = tokens_of(s, p, b);
      const int64_t columns = h * s.D * s.T, panels = h * s.T * s.floats;
      multiply(by_unit, s.floats, tokens.key_columns + columns, s.T, s.D, tokens.grad_key + panels, s.C,
               tokens.count, b == 0);
      multiply(by_grad, s.floats, tokens.value_columns + columns, s.T, s.D, tokens.grad_value + panels, s.C,
               tokens.count, b == 0);
      for (int64_t d = 0; d < s.D; ++d) {
        const float* const key = tokens.key_columns + columns + d * s.T;
        for (int64_t t = 0; t < tokens.count; ++t)
          bias[d] += key[t] * tokens.grad_key_bias[h * tokens.padded + t];
      }
    }
  } else {
    const int64_t slices = p.batch * p.slices, at = h * s.D * s.floats;
    add_slices(by_unit, 0, slices, s.D * s.floats, 1.0f,
               [&](int64_t slice) { return slice_sums(s, p, slice).by_unit + at; });
    add_slices(by_grad, 0, slices, s.D * s.floats, 1.0f,
               [&](int64_t slice) { return slice_sums(s, p, slice).by_grad + at; });
    for (int64_t d = 0; d < s.D; ++d) {
      bias[d] = 0.0f;
      for (int64_t slice = 0; slice < slices; ++slice)
        bias[d] += sum_of_lanes(slice_sums(s, p, slice).of_rows + (h * s.D + d) * kWidth);
    }
  }
  copy(
      1, s.D, 1, [&](int64_t) -> const float* { return bias; },
      [&](int64_t, int64_t d) { return grad_bias + d; });
  copy_transposed(
      s.D, s.C, 1, [&](int64_t d) -> const float* { return by_grad + d * s.floats; },
      [&](int64_t c, int64_t d) { return static_cast<T*>(p.grad_output_weight) + c * s.C + h * s.D + d; },
      1.0f, w.gate);
  for (int64_t c = 0; c < s.C; c += kWidth) {
    const Column column = panel_column(c, s.C, s.D);
    const float* const query = w.query_rows + h * s.D * s.floats + column.offset;
    const float* const output = w.output_rows + h * s.D * s.floats + column.offset;
    const F norm_weight = load_at_most(w.norm_weight + c, s.C - c);
    const F norm_bias = load_at_most(w.norm_bias + c, s.C - c);
    F grad_norm_weight = set(0.0f), grad_norm_bias = set(0.0f), grad_gate = set(0.0f);
    for (int64_t d = 0; d < s.D; ++d) {
      const F unit = load(by_unit + d * s.floats + c), of_query = load(query + d * column.stride);
      grad_norm_weight = mul_add(unit, of_query, grad_norm_weight);
      grad_norm_bias = mul_add(set(bias[d]), of_query, grad_norm_bias);
      grad_gate = mul_add(load(by_grad + d * s.floats + c), load(output + d * column.stride), grad_gate);
      store_at_most(static_cast<T*>(p.grad_query_weight) + (h * s.D + d) * s.C + c,
                    mul_add(unit, norm_weight, norm_bias * set(bias[d])), s.C - c);
    }
    store(sums.norm_weight + c, grad_norm_weight);
    store(sums.norm_bias + c, grad_norm_bias);
    store(sums.gate + c, grad_gate);
  }
}

template <typename T, typename Word>
void sum_vectors(const FusionAttentionParams& p) {
  const Shape<Word> s(p);
  const Weights<Word> w(s, p.backward, {p.shared});
  const int64_t slices = p.batch * p.slices;
  for (int64_t c = 0; c < s.C; c += kWidth) {
    const int64_t left = s.C - c;
    F grad = set(0.0f), norm_weight = set(0.0f), norm_bias = set(0.0f), gate = set(0.0f);
    for (int64_t slice = 0; slice < slices; ++slice) grad = grad + load(slice_sums(s, p, slice).grad + c);
    for (int64_t h = 0; h < s.H; ++h) {
      const HeadSums sums(s.floats, {p.sums + slices * p.slice_bytes + h * p.head_bytes});
      norm_weight = norm_weight + load(sums.norm_weight + c);
      norm_bias = norm_bias + load(sums.norm_bias + c);
      gate = gate + load(sums.gate + c);
    }
    store_at_most(static_cast<T*>(p.grad_norm_weight) + c, norm_weight, left);
    store_at_most(static_cast<T*>(p.grad_norm_bias) + c, norm_bias, left);
    store_at_most(static_cast<T*>(p.grad_gate) + c,
                  mul_add(grad, load_at_most(w.output_bias + c, left), gate), left);
    store_at_most(static_cast<T*>(p.grad_output_bias) + c, grad * load_at_most(w.gate + c, left), left);
  }
}

}  // namespace

void fusion_attention_sum_tokens(const FusionAttentionParams& params, int64_t begin, int64_t end,
                                 void* workspace) {
  with_element(params, [&](auto element, auto word) {
    for (int64_t b = begin; b < end; ++b)
      sum_tokens<decltype(element), decltype(word)>(params, b, static_cast<char*>(workspace));
  });
}

void fusion_attention_sum_head(const FusionAttentionParams& params, int64_t begin, int64_t end,
                               void* workspace) {
  with_element(params, [&](auto element, auto word) {
    for (int64_t h = begin; h < end; ++h)
      sum_head<decltype(element), decltype(word)>(params, h, static_cast<char*>(workspace));
  });
}

void fusion_attention_sum_vectors(const FusionAttentionParams& params) {
  with_element(params,
               [&](auto element, auto word) { sum_vectors<decltype(element), decltype(word)>(params); });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
