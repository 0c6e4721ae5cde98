// Where language fusion's CPU kernels keep what they prepare, work on and sum.
#pragma once

#include "cpu/exp2.h"
#include "cpu/fusion_attention.h"
#include "cpu/matmul.h"
#include "cpu/simd.h"

namespace visionllm::cpu::VISIONLLM_ISA {

constexpr int kBlock = kPanel;  // positions that are worked on together

VISIONLLM_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Memory handed out piece by piece, or, from null, only counted.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// Words of a plain row, and where its row begins.
template <typename Word>
constexpr int kPlain = kBlock / kPerWord<Word>;

// Memory for plain rows: a strip's own where words are floats.
template <typename Word>
Word* plain_rows(Arena* arena, Word* strip, int64_t rows) {
  if constexpr (kPerWord<Word> == 1) return strip;
  return arena->take<Word>(rows * kPlain<Word>);
}

// ---- sizes and where things are ---------------------------------------------------------------------------

template <typename Word>
struct Shape {
  int64_t C, D, H;
  int64_t T;             // most tokens of a batch entry
  int64_t Cw, Dw, Tw;    // words that hold them
  int64_t Tp;            // T in whole words
  int64_t across;        // row stride of word matrices with C columns, of those with H heads' D,
  int64_t across_heads;  // and of those with all heads' tokens: not a multiple of the cache's period
  int64_t across_tokens;
  int64_t floats, head_floats;  // C and D in whole vectors
  float scale;                  // log2(e) / sqrt(D): what scores are multiplied by
  // For short texts, weights and tokens are multiplied first: the scores of head h are normed K'^T with
  // K' [T, C] = K_h W_q,h, and the output is the sum over heads of weights V' with V' [T, C] = V_h W_o,h^T.
  // That is 2 C H T products for a row instead of 2 C (C + T).
  bool folded;

  explicit Shape(const FusionAttentionParams& p)
      : C(p.channels), D(p.head_channels), H(p.heads), T(p.most_tokens) {
    Cw = words_of<Word>(C), Dw = words_of<Word>(D), Tw = words_of<Word>(T);
    Tp = Tw * kPerWord<Word>;
    across = Cw + 16, across_heads = H * Dw + 16, across_tokens = H * Tw + 16;
    floats = round_up(C, kWidth), head_floats = round_up(D, kWidth);
    scale = kLog2E / sqrtf(static_cast<float>(D));
    folded = H * T <= C + T;
  }
};

template <typename Word>
struct Weights {
  float *norm_weight, *norm_bias, *gate, *output_bias, *gated_bias;  // [C]; gate * output_bias
  float* query_bias;                                                 // [C], times scale
  // Not folded:
  Word* query;              // [C, across]
  Word* output;             // [C, across_heads]
  Word* query_transposed;   // [C, across_heads], backward only
  Word* output_transposed;  // [C, across], backward only
  // Folded or backward, panels for each head:
  float* query_rows;   // [D, C] of query_weight
  float* output_rows;  // [D, C] of output_weight's transpose
  // Folded backward, panels for each head:
  float* query_columns;   // [C, D] of query_weight's transpose * norm_weight
  float* output_columns;  // [C, D] of output_weight * gate
  float* query_shift;     // [C] query_weight norm_bias + query_bias

  Weights(const Shape<Word>& s, bool backward, Arena arena, int64_t* bytes = nullptr) {
    norm_weight = arena.take<float>(s.C), norm_bias = arena.take<float>(s.C), gate = arena.take<float>(s.C);
    output_bias = arena.take<float>(s.C), gated_bias = arena.take<float>(s.C);
    query_bias = arena.take<float>(s.C);
    query = arena.take<Word>(s.folded ? 0 : s.C * s.across);
    output = arena.take<Word>(s.folded ? 0 : s.C * s.across_heads);
    query_transposed = arena.take<Word>(s.folded || !backward ? 0 : s.C * s.across_heads);
    output_transposed = arena.take<Word>(s.folded || !backward ? 0 : s.C * s.across);
    query_rows = arena.take<float>(s.folded || backward ? s.C * s.floats : 0);
    output_rows = arena.take<float>(s.folded || backward ? s.C * s.floats : 0);
    query_columns = arena.take<float>(s.folded && backward ? s.H * s.C * s.head_floats : 0);
    output_columns = arena.take<float>(s.folded && backward ? s.H * s.C * s.head_floats : 0);
    query_shift = arena.take<float>(s.folded && backward ? s.C : 0);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// Of one batch entry; "tokens" are those that are text. Rows of a head's tokens follow each other without a
// gap but for the last word's.
template <typename Word>
struct Tokens {
  int64_t count;   // of tokens
  int64_t padded;  // in whole words
  int64_t words;
  // Folded:                                    else:
  Word* key;               // [H * padded, across] K'     [H, T, Dw]
  Word* value_transposed;  // [C, across_tokens] V'       [H, D, Tw]
  Word* key_transposed;    // [C, across_tokens] K'       [H, D, Tw], backward only
  Word* value;             // [H * padded, across] V'     [H, T, Dw], backward only
  float* key_bias;         // [H * padded], folded only: what query_bias adds to the scores
  // Folded: the tokens themselves, one head's [T, D] for prepare_tokens, all [H, D, T] for the backward.
  float* rows;
  float *key_columns, *value_columns;
  // Folded backward, panels for each head, of sums over positions; sum_tokens writes them.
  float* grad_key;       // [T, C] gradient of K' where normed is not scaled and shifted
  float* grad_value;     // [T, C] gradient of V' without the gate
  float* grad_key_bias;  // [H * padded] gradient of the scores

  Tokens(const Shape<Word>& s, bool backward, int64_t tokens, Arena arena, int64_t* bytes = nullptr)
      : count(tokens), words(words_of<Word>(tokens)) {
    padded = words * kPerWord<Word>;
    const int64_t all = s.H * s.Tp;
    const int64_t by_token = s.folded ? all * s.across : s.H * s.T * s.Dw;
    const int64_t by_channel = s.folded ? s.C * s.across_tokens : s.C * s.Tw;
    key = arena.take<Word>(by_token);
    value_transposed = arena.take<Word>(by_channel);
    key_transposed = arena.take<Word>(backward ? by_channel : 0);
    value = arena.take<Word>(backward ? by_token : 0);
    key_bias = arena.take<float>(s.folded ? all : 0);
    rows = arena.take<float>(s.folded ? s.T * s.D : 0);
    key_columns = arena.take<float>(s.folded && backward ? s.C * s.T : 0);
    value_columns = arena.take<float>(s.folded && backward ? s.C * s.T : 0);
    // Before sum_tokens the same memory holds, for prepare_tokens, one head's product [T, C].
    grad_key = arena.take<float>(s.folded ? (backward ? s.H : 1) * s.T * s.floats : 0);
    grad_value = arena.take<float>(s.folded && backward ? s.H * s.T * s.floats : 0);
    grad_key_bias = arena.take<float>(s.folded && backward ? all : 0);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

template <typename Word>
Tokens<Word> tokens_of(const Shape<Word>& s, const FusionAttentionParams& p, int64_t b) {
  return Tokens<Word>(s, p.backward, p.counts[b], {p.entries + b * p.entry_bytes});
}

// ---- a thread's workspace, and the sums of the backward ----------------------------------------------------

template <typename Word>
struct ForwardBlock {
  float *columns, *mean, *inverse;
  Word* normed;
  Word* query;  // of one head; as scores and weights, unless it is folded: then they are of all heads
  float* scores;
  Word* weights;
  Word* attended;

  ForwardBlock(const Shape<Word>& s, Arena arena, int64_t* bytes = nullptr) {
    const int64_t rows = s.folded ? s.H * s.Tp : s.Tp;
    columns = arena.take<float>(s.floats * kBlock);
    mean = arena.take<float>(kBlock), inverse = arena.take<float>(kBlock);
    normed = arena.take<Word>(s.Cw * kBlock);
    query = arena.take<Word>(s.folded ? 0 : s.Dw * kBlock);
    scores = arena.take<float>(rows * kBlock);
    weights = arena.take<Word>(rows * kPlain<Word>);
    attended = arena.take<Word>(s.folded ? 0 : s.H * s.Dw * kBlock);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

template <typename Word>
struct BackwardBlock {
  float *columns, *grad_columns, *mean, *inverse;
  Word *normed, *unit, *grad, *gated;  // strip; panels of (x - mean) * inverse and of grad_output; strip of
                                       // grad_output * gate
  // Of one head; folded: of all heads, and no query and grad_attended.
  float *head_columns, *scores, *grad_weights;
  Word *query, *query_panels, *grad_attended, *grad_attended_panels, *attended;
  Word *weights, *weights_plain, *grad_scores, *grad_scores_plain;
  // Not folded: of all heads, and of one.
  Word *grad_query, *grad_query_plain;
  float *factor, *mean_grad, *mean_product;  // [kBlock]

  BackwardBlock(const Shape<Word>& s, Arena arena, int64_t* bytes = nullptr) {
    const int64_t rows = s.folded ? s.H * s.Tp : s.Tp;
    const int64_t D = s.folded ? 0 : s.D, Dw = s.folded ? 0 : s.Dw;
    const int64_t head_floats = s.folded ? 0 : s.head_floats;
    columns = arena.take<float>(s.floats * kBlock), grad_columns = arena.take<float>(s.floats * kBlock);
    mean = arena.take<float>(kBlock), inverse = arena.take<float>(kBlock);
    factor = arena.take<float>(kBlock);
    mean_grad = arena.take<float>(kBlock), mean_product = arena.take<float>(kBlock);
    normed = arena.take<Word>(s.Cw * kBlock), gated = arena.take<Word>(s.Cw * kBlock);
    unit = arena.take<Word>(s.floats * kPlain<Word>), grad = arena.take<Word>(s.floats * kPlain<Word>);
    head_columns = arena.take<float>(head_floats * kBlock);
    scores = arena.take<float>(rows * kBlock), grad_weights = arena.take<float>(rows * kBlock);
    query = arena.take<Word>(Dw * kBlock), grad_attended = arena.take<Word>(Dw * kBlock);
    query_panels = arena.take<Word>(head_floats * kPlain<Word>);
    grad_attended_panels = arena.take<Word>(head_floats * kPlain<Word>);
    attended = arena.take<Word>(D * kPlain<Word>);
    weights = arena.take<Word>(rows * kPlain<Word>), grad_scores = arena.take<Word>(rows * kPlain<Word>);
    weights_plain = plain_rows(&arena, weights, rows);
    grad_scores_plain = plain_rows(&arena, grad_scores, rows);
    grad_query = arena.take<Word>(s.H * Dw * kBlock);
    grad_query_plain = arena.take<Word>(D * kPlain<Word>);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// Sums over the positions of a slice. The product sums are written by the slice's first block, not added to.
template <typename Word>
struct SliceSums {
  // Not folded [C, floats]; folded [H * padded, floats]:
  float* by_unit;      // grad_query^T unit                 grad_scores^T unit
  float* by_grad;      // attended^T grad_output            weights^T grad_output
  float* of_rows;      // [rows of the above, kWidth] grad_query or grad_scores, to be summed over the lanes
  float* grad;         // [floats] grad_output
  float *key, *value;  // [H, T, head_floats] grad_scores^T query and weights^T grad_attended, not folded only

  SliceSums(const Shape<Word>& s, Arena arena, int64_t* bytes = nullptr) {
    const int64_t rows = s.folded ? s.H * s.Tp : s.C;
    by_unit = arena.take<float>(rows * s.floats), by_grad = arena.take<float>(rows * s.floats);
    of_rows = arena.take<float>(rows * kWidth), grad = arena.take<float>(s.floats);
    key = arena.take<float>(s.folded ? 0 : s.H * s.T * s.head_floats);
    value = arena.take<float>(s.folded ? 0 : s.H * s.T * s.head_floats);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// What sum_tokens and sum_head need of their own.
struct SumBlock {
  float *first, *second;  // [T or D, floats or head_floats]

  template <typename Word>
  SumBlock(const Shape<Word>& s, Arena arena, int64_t* bytes = nullptr) {
    const int64_t by_head = s.D * s.floats, by_token = s.T * s.head_floats;
    first = arena.take<float>(by_head > by_token ? by_head : by_token);
    second = arena.take<float>(by_head);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// A head's part of the gradients of [C].
struct HeadSums {
  float *norm_weight, *norm_bias, *gate;  // [floats]
  float* bias;                            // of the head's channels of query_bias

  explicit HeadSums(int64_t floats, Arena arena, int64_t* bytes = nullptr) {
    norm_weight = arena.take<float>(floats), norm_bias = arena.take<float>(floats);
    gate = arena.take<float>(floats), bias = arena.take<float>(floats);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

}  // namespace visionllm::cpu::VISIONLLM_ISA
