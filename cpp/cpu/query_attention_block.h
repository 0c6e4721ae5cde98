// What the forward and backward kernels of batched query decoding share. Included by the kernel sources only,
// once per instruction set (simd.h).
//
// A block is kRows query rows (slots and heads) of one KV head. In its products with the prefix the lanes are
// rows: scores^T [key, row] = K q^T, output^T [channel, row] = V^T weights^T. So softmax needs no sum over
// lanes, and the maximum, the sum and the logsumexp of the rows are vectors. K, V and their transposes are
// packed once per item, for all its blocks.
//
// Keys of a row's own group are few and differ from row to row: their scores are sums over the channels, and
// their values are added to the finished rows, one row after the other.
#pragma once

#include "cpu/exp2.h"
#include "cpu/matmul.h"
#include "cpu/query_attention.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

constexpr int64_t kRows = kPanel;
constexpr int64_t kKeys = kQueryAttentionKeys;
static_assert(kQueryAttentionRows % kRows == 0 && kQueryAttentionChannels % kWidth == 0, "padding fits");

using Params = QueryAttentionParams;

// The type rows are kept in before they become words.
template <typename Word>
struct StagedOf {
  using type = float;
};
template <>
struct StagedOf<PairWord> {
  using type = bfloat16;
};

VISIONLLM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
VISIONLLM_INLINE F load_some(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_partial(p, static_cast<int>(n));
}
template <typename T>
VISIONLLM_INLINE void store_some(T* p, F v, int64_t n) {
  n >= kWidth ? store(p, v) : store_partial(p, v, static_cast<int>(n));
}

// Slices of a workspace, aligned to 64 bytes. Without a workspace it only counts.
struct Slices {
  void* workspace;
  int64_t bytes = 0;

  template <typename T>
  T* take(int64_t count) {
    T* slice = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(workspace) + static_cast<uintptr_t>(bytes));
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return slice;
  }
};

// A query row of a KV head: group, slot, and head among those that share the KV head; in this order.
struct Row {
  int64_t group, slot, head;
};
struct RowOrder {
  int64_t slots, heads;

  explicit RowOrder(const Params& p) : slots(p.slots), heads(p.heads / p.kv_heads) {}
  Row at(int64_t i) const { return {i / (slots * heads), i / heads % slots, i % heads}; }
  void advance(Row* row) const {
    if (++row->head < heads) return;
    row->head = 0;
    if (++row->slot < slots) return;
    row->slot = 0;
    ++row->group;
  }
};

// One (batch, KV head).
struct Head {
  int64_t b, g, length;

  Head(const Params& p, int64_t i) : b(i / p.kv_heads), g(i % p.kv_heads) {
    const int64_t given = p.prefix_length[b];
    length = given < 0 ? 0 : given > p.prefix ? p.prefix : given;
  }
};

template <typename T>
VISIONLLM_INLINE const T* slot_row(const SlotRows& rows, int64_t b, int64_t group, int64_t slot,
                                   int64_t head) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + group * rows.stride_m + slot * rows.stride_s +
         head * rows.stride_h;
}

template <typename T>
VISIONLLM_INLINE const T* prefix_head(const PrefixRows& rows, const Head& head) {
  return static_cast<const T*>(rows.data) + head.b * rows.stride_b + head.g * rows.stride_h;
}

// Where a row lies in contiguous [B, M, S, H].
VISIONLLM_INLINE int64_t row_number(const Params& p, const Head& head, const Row& row) {
  const int64_t query_head = head.g * (p.heads / p.kv_heads) + row.head;
  return ((head.b * p.groups + row.group) * p.slots + row.slot) * p.heads + query_head;
}

// to = factor * (from turned by the angles of a position), both [D]. Without tables it is not turned.
// direction -1 turns back.
template <typename From, typename To>
VISIONLLM_INLINE void rotate(const Params& p, int64_t position, float direction, float factor,
                             const From* from, To* to) {
  const F scale = set(factor);
  if (p.cosine == nullptr) {
    for (int64_t d = 0; d < p.channels; d += kWidth)
      store_some(to + d, load_some(from + d, p.channels - d) * scale, p.channels - d);
    return;
  }
  const int64_t half = p.channels / 2;
  const float* cosines = p.cosine + position * half;
  const float* sines = p.sine + position * half;
  const F sign = set(direction * factor);
  for (int64_t d = 0; d < half; d += kWidth) {
    const int64_t n = half - d;
    const F low = load_some(from + d, n), high = load_some(from + half + d, n);
    const F cosine = load_some(cosines + d, n) * scale, sine = load_some(sines + d, n) * sign;
    store_some(to + d, low * cosine - high * sine, n);
    store_some(to + half + d, mul_add(low, sine, high * cosine), n);
  }
}

// Rows of the prefix as words: to [count][ld], zeros behind D.
template <typename Word, typename T>
void pack_rows(const T* from, int64_t stride, int64_t count, int64_t channels, Word* to, int64_t ld) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += ld) {
    for (int64_t d = 0; d < channels; d += kWidth * kPerWord<Word>)
      store_words(to + d / kPerWord<Word>, load_words(to, from + d, channels - d));
  }
}

// One word per channel of a row, or of two rows: pairs of bfloat16 along the rows.
template <typename T>
VISIONLLM_INLINE F words_of_rows(const float*, const T* row, const T*, int64_t n) {
  return load_some(row, n);
}
#ifdef __AVX512BF16__
template <typename T>
VISIONLLM_INLINE F words_of_rows(const PairWord*, const T* row, const T* next, int64_t n) {
  const F high = next == nullptr ? set(0.0f) : load_some(next, n);
  return {_mm512_castsi512_ps(pair_bfloat16(load_some(row, n), high).v)};
}
#endif

// Words along the rows: to [D][ld], zeros behind `count` up to a whole vector.
template <typename Word, typename T>
void pack_columns(const T* from, int64_t stride, int64_t count, int64_t channels, Word* to, int64_t ld) {
  constexpr int64_t kPer = kPerWord<Word>;
  for (int64_t i = 0; i < count; i += kWidth * kPer) {
    for (int64_t d = 0; d < channels; d += kWidth) {
      F rows[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        const int64_t row = i + j * kPer;
        const T* p = from + row * stride + d;
        rows[j] = row < count ? words_of_rows(to, p, row + 1 < count ? p + stride : nullptr, channels - d)
                              : set(0.0f);
      }
      transpose(rows);
      for (int j = 0; j < kWidth; ++j) {
        if (d + j < channels) store_words(to + (d + j) * ld + i / kPer, rows[j]);
      }
    }
  }
}

// Rows of a block [kRows][ld] to words of channels [words][kRows].
template <typename Word, typename Staged>
void rows_to_lanes(const Staged* rows, int64_t ld, int64_t words, Word* to) {
  for (int64_t lane = 0; lane < kRows; lane += kWidth) {
    for (int64_t w = 0; w < words; w += kWidth) {
      F block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] = load_words(to, rows + (lane + i) * ld + w * kPerWord<Word>, kWidth * kPerWord<Word>);
      transpose(block);
      for (int i = 0; i < kWidth; ++i) {
        if (w + i < words) store_words(to + (w + i) * kRows + lane, block[i]);
      }
    }
  }
}

// And back: [D][kRows] to rows [kRows][ld]; zeros behind D up to a whole vector.
VISIONLLM_INLINE void lanes_to_rows(const float* from, int64_t channels, float* rows, int64_t ld) {
  for (int64_t lane = 0; lane < kRows; lane += kWidth) {
    for (int64_t d = 0; d < channels; d += kWidth) {
      F block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] = d + i < channels ? load(from + (d + i) * kRows + lane) : set(0.0f);
      transpose(block);
      for (int i = 0; i < kWidth; ++i) store(rows + (lane + i) * ld + d, block[i]);
    }
  }
}

// Dot products that are stored one by one. kWidth of them share the sums over lanes.
class Dots {
 public:
  // *to = the sum over the lanes
  VISIONLLM_INLINE void add(F lanes, float* to) {
    sums_[count_] = lanes;
    to_[count_] = to;
    if (++count_ == kWidth) finish();
  }
  VISIONLLM_INLINE void add(const float* a, const float* b, int64_t padded, float* to) {
    F lanes = load(a) * load(b);
    for (int64_t d = kWidth; d < padded; d += kWidth) lanes = mul_add(load(a + d), load(b + d), lanes);
    add(lanes, to);
  }
  VISIONLLM_INLINE void finish() {
    float dots[kWidth];
    for (int i = count_; i < kWidth; ++i) sums_[i] = set(0.0f);
    store(dots, sum_rows(sums_));
    for (int i = 0; i < count_; ++i) *to_[i] = dots[i];
    count_ = 0;
  }

 private:
  F sums_[kWidth];
  float* to_[kWidth];
  int count_ = 0;
};

// Keys of a chunk's groups, rotated and in float: to [groups * S][ld]. Behind D stand zeros already.
template <typename T>
void own_keys(const Params& p, const Head& head, int64_t first, int64_t groups, float* to, int64_t ld) {
  for (int64_t m = first; m < first + groups; ++m) {
    for (int64_t s = 0; s < p.slots; ++s, to += ld)
      rotate(p, head.length + s, 1.0f, 1.0f, slot_row<T>(p.k, head.b, m, s, head.g), to);
  }
}

// What forward and backward have of a block's rows: q rotated and scaled so that 2^score is its weight.
template <typename T>
struct Queries {
  using Word = typename WordOf<T>::type;
  using Staged = typename StagedOf<Word>::type;
  float* rows;     // [kRows][ld]; zeros behind D and behind the last row
  Staged* staged;  // the same rounded; rows themselves where that is float
  Word* lanes;     // [words][kRows]

  void take(Slices* slices, int64_t ld, int64_t channels) {
    rows = slices->take<float>(kRows * ld);
    staged = kSame<Staged, float> ? reinterpret_cast<Staged*>(rows) : slices->take<Staged>(kRows * ld);
    lanes = slices->take<Word>(words_of<Word>(channels) * kRows);
  }

  // After rows [0, count) have been written.
  void spread(int64_t count, int64_t ld, int64_t channels) {
    memset(rows + count * ld, 0, static_cast<size_t>((kRows - count) * ld) * sizeof(float));
    if constexpr (!kSame<Staged, float>) {
      for (int64_t i = 0; i < kRows * ld; i += kWidth) store(staged + i, load(rows + i));
    }
    rows_to_lanes(staged, ld, words_of<Word>(channels), lanes);
  }

  void load_rotated(const Params& p, const Head& head, const RowOrder& order, Row row, int64_t count,
                    int64_t ld, float factor) {
    const int64_t query_head = head.g * order.heads;
    for (int64_t i = 0; i < count; ++i, order.advance(&row)) {
      rotate(p, head.length + row.slot, 1.0f, factor,
             slot_row<T>(p.q, head.b, row.group, row.slot, query_head + row.head), rows + i * ld);
    }
    spread(count, ld, p.channels);
  }
};

// The factor that makes 2^(factor q . k) = exp(q . k / sqrt(D)).
VISIONLLM_INLINE float score_factor(const Params& p) {
  return kLog2E / sqrtf(static_cast<float>(p.channels));
}

}  // namespace
}  // namespace visionllm::cpu::VISIONLLM_ISA
