// One call of one operator with one fixed input, for bench/instruction_counts.py to count the instructions of.
//
//   instruction_driver                   lists the cases: name, unit of work, how many of them the call does
//   instruction_driver <case> <isa>      runs it on one thread; exit code 3 where there is no such kernel
//
// Valgrind is told to count in run_case, which is the operator's call and nothing else.
#include <visionllm/fusion_attention.h>
#include <visionllm/isa.h>
#include <visionllm/lora_linear.h>
#include <visionllm/ms_deform_attn.h>
#include <visionllm/query_attention.h>
#include <visionllm/slot_head.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

using visionllm::DType;
using visionllm::Status;
using visionllm::TensorView;

namespace {

const visionllm::Execution kOneThread{1, nullptr};

// Tensors of a case, with contents that are the same everywhere: a linear congruential sequence.
class Tensors {
 public:
  TensorView make(DType dtype, std::initializer_list<std::int64_t> shape, double low = -1, double high = 1) {
    TensorView view = empty(dtype, shape);
    for (std::int64_t i = 0; i < view.size(); ++i) set(view, i, low + (high - low) * next());
    return view;
  }

  // Whatever it holds is written by the call.
  TensorView empty(DType dtype, std::initializer_list<std::int64_t> shape) {
    TensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    int i = 0;
    for (const std::int64_t n : shape) view.shape[i++] = n;
    std::int64_t stride = 1;
    for (i = view.rank - 1; i >= 0; --i) {
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
    const std::size_t bytes = static_cast<std::size_t>(stride * visionllm::element_size(dtype));
    memory_.emplace_back(bytes + 64, '\0');
    auto address = reinterpret_cast<std::uintptr_t>(memory_.back().data());
    view.data = reinterpret_cast<void*>((address + 63) / 64 * 64);
    return view;
  }

  TensorView integers(const std::vector<std::int64_t>& values, std::initializer_list<std::int64_t> shape) {
    TensorView view = empty(DType::int64, shape);
    std::memcpy(view.data, values.data(), values.size() * sizeof(std::int64_t));
    return view;
  }

 private:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 40) / static_cast<double>(1u << 24);
  }

  static void set(const TensorView& view, std::int64_t i, double x) {
    const float number = static_cast<float>(x);
    std::uint32_t word;
    std::memcpy(&word, &number, 4);
    switch (view.dtype) {
      case DType::float32: static_cast<float*>(view.data)[i] = number; break;
      case DType::bfloat16:
        static_cast<std::uint16_t*>(view.data)[i] = static_cast<std::uint16_t>(word >> 16);
        break;
      case DType::int64: static_cast<std::int64_t*>(view.data)[i] = std::llround(x); break;
      case DType::int8: static_cast<std::int8_t*>(view.data)[i] = static_cast<std::int8_t>(x); break;
      default: static_cast<std::uint8_t*>(view.data)[i] = 1;
    }
  }

  std::uint64_t state_ = 1;
  std::deque<std::vector<char>> memory_;
};

struct Case {
  std::string name;
  std::string unit;
  double units;
  std::function<std::function<Status()>(Tensors&)> prepare;
};

// ---- ms_deform_attn: an encoder's layer of tiny's pyramid -------------------------------------------------

constexpr std::int64_t kLevels[4][2] = {{16, 20}, {8, 10}, {4, 5}, {2, 3}};
constexpr std::int64_t kPixels = 426, kHeads = 8, kChannels = 32, kPoints = 4;
constexpr double kRows = 4.0 * kPixels * kHeads * 4 * kPoints;  // corners of all points

struct Deformable {
  TensorView shapes, starts, value, reference, offsets, locations, attention, output;

  Deformable(Tensors& t, DType dtype) {
    std::vector<std::int64_t> sizes, firsts;
    std::int64_t first = 0;
    for (const auto& level : kLevels) {
      sizes.insert(sizes.end(), {level[0], level[1]});
      firsts.push_back(first);
      first += level[0] * level[1];
    }
    shapes = t.integers(sizes, {4, 2}), starts = t.integers(firsts, {4});
    value = t.make(dtype, {1, kPixels, kHeads, kChannels});
    reference = t.make(DType::float32, {1, kPixels, 4, 2}, 0, 1);
    offsets = t.make(DType::float32, {1, kPixels, kHeads, 4, kPoints, 2}, -4, 4);
    locations = t.make(DType::float32, {1, kPixels, kHeads, 4, kPoints, 2}, -0.05, 1.05);
    attention = t.make(dtype, {1, kPixels, kHeads, 4, kPoints}, 0, 0.1);
    output = t.make(dtype, {1, kPixels, kHeads * kChannels});
  }
};

Case deformable(const char* name, DType dtype) {
  return {name, "corner row of 32 channels", kRows, [dtype](Tensors& t) {
            const Deformable d(t, dtype);
            return [d] {
              return ms_deform_attn(d.output, d.value, d.shapes, d.starts, d.locations, d.attention,
                                    kOneThread);
            };
          }};
}

Case deformable_backward(const char* name, DType dtype) {
  return {name, "corner row of 32 channels", kRows, [dtype](Tensors& t) {
            const Deformable d(t, dtype);
            const TensorView grads[] = {t.empty(dtype, {1, kPixels, kHeads, kChannels}),
                                        t.empty(DType::float32, {1, kPixels, kHeads, 4, kPoints, 2}),
                                        t.empty(dtype, {1, kPixels, kHeads, 4, kPoints})};
            return [d, a = grads[0], b = grads[1], c = grads[2]] {
              return ms_deform_attn_backward(a, b, c, TensorView(), d.output, d.value, d.shapes, d.starts,
                                             d.locations, d.attention, false, kOneThread);
            };
          }};
}

Case deformable_fused(const char* name, DType dtype) {
  return {name, "corner row of 32 channels", kRows, [dtype](Tensors& t) {
            const Deformable d(t, dtype);
            return [d] {
              return ms_deform_attn_fused(d.output, d.value, d.shapes, d.starts, d.reference, d.offsets,
                                          d.attention, kOneThread);
            };
          }};
}

Case deformable_fused_backward(const char* name, DType dtype) {
  return {name, "corner row of 32 channels", kRows, [dtype](Tensors& t) {
            const Deformable d(t, dtype);
            const TensorView grads[] = {t.empty(dtype, {1, kPixels, kHeads, kChannels}),
                                        t.empty(DType::float32, {1, kPixels, kHeads, 4, kPoints, 2}),
                                        t.empty(dtype, {1, kPixels, kHeads, 4, kPoints})};
            return [d, a = grads[0], b = grads[1], c = grads[2]] {
              return ms_deform_attn_fused_backward(a, TensorView(), b, c, TensorView(), d.output, d.value,
                                                   d.shapes, d.starts, d.reference, d.offsets, d.attention,
                                                   false, kOneThread);
            };
          }};
}

// ---- lora_linear: 64 rows, 256 to 256, rank 16 ------------------------------------------------------------

constexpr std::int64_t kT = 64, kK = 256, kN = 256, kR = 16;
constexpr double kLinear = static_cast<double>(kT) * (kK * kN + kR * (kK + kN));

struct Lora {
  TensorView x, weight, weight_scale, bias, a, b, low_rank, output;

  Lora(Tensors& t, DType dtype, bool int8) {
    x = t.make(dtype, {kT, kK}), bias = t.make(dtype, {kN});
    weight = int8 ? t.make(DType::int8, {kN, kK}, -127, 127) : t.make(dtype, {kN, kK});
    if (int8) weight_scale = t.make(DType::float32, {kN}, 0.01, 0.02);
    a = t.make(dtype, {1, kR, kK}), b = t.make(dtype, {1, kN, kR});
    low_rank = t.make(DType::float32, {kT, kR}), output = t.make(dtype, {kT, kN});
  }
};

Case lora(const char* name, DType dtype, bool int8) {
  return {name, "multiply-add", kLinear, [=](Tensors& t) {
            const Lora l(t, dtype, int8);
            return [l] {
              return lora_linear(l.output, l.low_rank, TensorView(), l.x, l.weight, l.weight_scale, l.bias,
                                 l.a, l.b, TensorView(), TensorView(), 2.0, kOneThread);
            };
          }};
}

Case lora_backward(const char* name, DType dtype) {
  return {name, "multiply-add of the forward", kLinear, [=](Tensors& t) {
            const Lora l(t, dtype, false);
            const TensorView grads[] = {t.empty(dtype, {kT, kK}), t.empty(dtype, {1, kR, kK}),
                                        t.empty(dtype, {1, kN, kR})};
            return [l, x = grads[0], a = grads[1], b = grads[2]] {
              return lora_linear_backward(x, a, b, TensorView(), l.output, l.x, l.weight, TensorView(), l.a,
                                          l.b, TensorView(), TensorView(), l.low_rank, 2.0, kOneThread);
            };
          }};
}

// ---- fusion_attention: 256 positions of 128 channels, 48 tokens, 8 heads ----------------------------------

constexpr std::int64_t kPositions = 256, kC = 128, kTokens = 48, kD = kC / kHeads;
constexpr double kFusion = static_cast<double>(kPositions) * 2 * (kC * kC + kC * kTokens);

struct Fusion {
  TensorView x, norm_weight, norm_bias, query_weight, query_bias, key, value, mask, output_weight,
      output_bias, gate, output;

  Fusion(Tensors& t, DType dtype) {
    x = t.make(dtype, {1, kPositions, kC}), output = t.make(dtype, {1, kPositions, kC});
    norm_weight = t.make(dtype, {kC}), norm_bias = t.make(dtype, {kC});
    query_weight = t.make(dtype, {kC, kC}), query_bias = t.make(dtype, {kC});
    key = t.make(dtype, {1, kTokens, kHeads, kD}), value = t.make(dtype, {1, kTokens, kHeads, kD});
    mask = t.make(DType::uint8, {1, kTokens});
    output_weight = t.make(dtype, {kC, kC}), output_bias = t.make(dtype, {kC}), gate = t.make(dtype, {kC});
  }
};

Case fusion(const char* name, DType dtype) {
  return {name, "multiply-add, weights not folded", kFusion, [=](Tensors& t) {
            const Fusion f(t, dtype);
            return [f] {
              return fusion_attention(f.output, f.x, f.norm_weight, f.norm_bias, f.query_weight, f.query_bias,
                                      f.key, f.value, f.mask, f.output_weight, f.output_bias, f.gate, 1e-5,
                                      kOneThread);
            };
          }};
}

Case fusion_backward(const char* name, DType dtype) {
  return {name, "multiply-add of the forward, weights not folded", kFusion, [=](Tensors& t) {
            const Fusion f(t, dtype);
            std::vector<TensorView> g;
            for (int i = 0; i < 5; ++i) g.push_back(t.empty(dtype, {kC}));
            const TensorView x = t.empty(dtype, {1, kPositions, kC}), q = t.empty(dtype, {kC, kC}),
                             o = t.empty(dtype, {kC, kC}), k = t.empty(dtype, {1, kTokens, kHeads, kD}),
                             v = t.empty(dtype, {1, kTokens, kHeads, kD}),
                             workspace = t.empty(DType::float32, {0});
            return [=] {
              return fusion_attention_backward(x, g[0], g[1], q, g[2], k, v, o, g[3], g[4], workspace,
                                               f.output, f.x, f.norm_weight, f.norm_bias, f.query_weight,
                                               f.query_bias, f.key, f.value, f.mask, f.output_weight,
                                               f.output_bias, f.gate, 1e-5, kOneThread);
            };
          }};
}

// ---- query_attention: 20 groups of 5 slots, 8 heads of 64 over 2 KV heads, a prefix of 200 ----------------

constexpr std::int64_t kM = 20, kS = 5, kH = 8, kHkv = 2, kHead = 64, kPrefix = 200;
constexpr double kQuery = 2.0 * kM * kS * kH * kHead * (kPrefix + (kS + 1) / 2.0);

struct Query {
  TensorView q, k, v, prefix_k, prefix_v, length, cosine, sine, output, logsumexp;

  Query(Tensors& t, DType dtype) {
    q = t.make(dtype, {1, kM, kS, kH, kHead}), k = t.make(dtype, {1, kM, kS, kHkv, kHead});
    v = t.make(dtype, {1, kM, kS, kHkv, kHead});
    prefix_k = t.make(dtype, {1, kPrefix, kHkv, kHead}), prefix_v = t.make(dtype, {1, kPrefix, kHkv, kHead});
    length = t.integers({kPrefix}, {1});
    cosine = t.make(DType::float32, {kPrefix + kS, kHead / 2});
    sine = t.make(DType::float32, {kPrefix + kS, kHead / 2});
    output = t.make(dtype, {1, kM, kS, kH, kHead}), logsumexp = t.make(DType::float32, {1, kM, kS, kH}, 5, 6);
  }
};

Case query(const char* name, DType dtype) {
  return {name, "multiply-add", kQuery, [=](Tensors& t) {
            const Query a(t, dtype);
            return [a] {
              return query_attention(a.output, a.logsumexp, TensorView(), a.q, a.k, a.v, a.prefix_k,
                                     a.prefix_v, a.length, a.cosine, a.sine, kOneThread);
            };
          }};
}

Case query_backward(const char* name, DType dtype) {
  return {name, "multiply-add of the forward", kQuery, [=](Tensors& t) {
            const Query a(t, dtype);
            const TensorView q = t.empty(dtype, {1, kM, kS, kH, kHead}),
                             k = t.empty(dtype, {1, kM, kS, kHkv, kHead}),
                             v = t.empty(dtype, {1, kM, kS, kHkv, kHead}),
                             pk = t.empty(dtype, {1, kPrefix, kHkv, kHead}),
                             pv = t.empty(dtype, {1, kPrefix, kHkv, kHead}),
                             workspace = t.empty(DType::float32, {1, kM, kS, kH}),
                             grad = t.make(dtype, {1, kM, kS, kH, kHead});
            return [=] {
              return query_attention_backward(q, k, v, pk, pv, workspace, grad, a.output, a.logsumexp, a.q,
                                              a.k, a.v, a.prefix_k, a.prefix_v, a.length, a.cosine, a.sine,
                                              kOneThread);
            };
          }};
}

// ---- slot_head: 100 slots of 128 channels against 300 rows ------------------------------------------------

constexpr std::int64_t kGroups = 20, kSlots = 5, kStates = 128, kVocabulary = 300;
constexpr double kSlotHead = static_cast<double>(kGroups) * kSlots * kStates * kVocabulary;

struct Slots {
  TensorView states, rows, norm, target, weight, loss, logsumexp, target_logsumexp;

  Slots(Tensors& t, DType dtype) {
    states = t.make(dtype, {1, kGroups, kSlots, kStates}), rows = t.make(dtype, {1, kVocabulary, kStates});
    norm = t.make(dtype, {kStates}), target = t.make(DType::int64, {1, kGroups, kSlots}, 0, kVocabulary - 1);
    weight = t.make(DType::float32, {1, kGroups, kSlots}, 0.5, 1);
    loss = t.make(DType::float32, {1, kGroups, kSlots}),
    logsumexp = t.make(DType::float32, {1, kGroups, kSlots}, 8, 9);
    target_logsumexp = t.make(DType::float32, {1, kGroups, kSlots}, 0, 0);
  }
};

Case slots_predict(const char* name, DType dtype) {
  return {name, "multiply-add", kSlotHead, [=](Tensors& t) {
            const Slots s(t, dtype);
            const TensorView best = t.empty(DType::int64, {1, kGroups, kSlots});
            const TensorView expectation = t.empty(DType::float32, {1, kGroups, kSlots});
            return [=] {
              return slot_head_predict(best, s.loss, s.logsumexp, expectation, TensorView(), TensorView(),
                                       s.states, s.rows, TensorView(), s.norm, 1e-5, 1.0, 4, 0.0, kOneThread);
            };
          }};
}

Case slots_loss(const char* name, DType dtype) {
  return {name, "multiply-add", kSlotHead, [=](Tensors& t) {
            const Slots s(t, dtype);
            return [s] {
              return slot_head_cross_entropy(s.loss, s.logsumexp, s.target_logsumexp, TensorView(), s.states,
                                             s.rows, s.target, s.weight, TensorView(), s.norm, 1e-5, 1.0, 1.0,
                                             kOneThread);
            };
          }};
}

Case slots_backward(const char* name, DType dtype) {
  return {name, "multiply-add of the forward", kSlotHead, [=](Tensors& t) {
            const Slots s(t, dtype);
            const TensorView states = t.empty(dtype, {1, kGroups, kSlots, kStates}),
                             rows = t.empty(dtype, {1, kVocabulary, kStates}),
                             norm = t.empty(dtype, {kStates});
            return [=] {
              return slot_head_cross_entropy_backward(
                  states, rows, norm, TensorView(), s.loss, s.states, s.rows, s.target, s.weight,
                  TensorView(), s.norm, s.logsumexp, s.target_logsumexp, 1e-5, 1.0, 1.0, 0, kOneThread);
            };
          }};
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      deformable("ms_deform_attn", DType::float32),
      deformable("ms_deform_attn.bfloat16", DType::bfloat16),
      deformable_backward("ms_deform_attn_backward", DType::float32),
      deformable_backward("ms_deform_attn_backward.bfloat16", DType::bfloat16),
      deformable_fused("ms_deform_attn_fused", DType::float32),
      deformable_fused("ms_deform_attn_fused.bfloat16", DType::bfloat16),
      deformable_fused_backward("ms_deform_attn_fused_backward", DType::float32),
      deformable_fused_backward("ms_deform_attn_fused_backward.bfloat16", DType::bfloat16),
      lora("lora_linear", DType::float32, false),
      lora("lora_linear.bfloat16", DType::bfloat16, false),
      lora("lora_linear.int8", DType::float32, true),
      lora_backward("lora_linear_backward", DType::float32),
      lora_backward("lora_linear_backward.bfloat16", DType::bfloat16),
      fusion("fusion_attention", DType::float32),
      fusion("fusion_attention.bfloat16", DType::bfloat16),
      fusion_backward("fusion_attention_backward", DType::float32),
      fusion_backward("fusion_attention_backward.bfloat16", DType::bfloat16),
      query("query_attention", DType::float32),
      query("query_attention.bfloat16", DType::bfloat16),
      query_backward("query_attention_backward", DType::float32),
      query_backward("query_attention_backward.bfloat16", DType::bfloat16),
      slots_predict("slot_head_predict", DType::float32),
      slots_predict("slot_head_predict.bfloat16", DType::bfloat16),
      slots_loss("slot_head_cross_entropy", DType::float32),
      slots_loss("slot_head_cross_entropy.bfloat16", DType::bfloat16),
      slots_backward("slot_head_cross_entropy_backward", DType::float32),
      slots_backward("slot_head_cross_entropy_backward.bfloat16", DType::bfloat16),
  };
  return all;
}

}  // namespace

// Valgrind counts from here (--toggle-collect).
extern "C" __attribute__((noinline)) void run_case(const std::function<Status()>& call, Status* status) {
  *status = call();
}

int main(int argc, char** argv) {
  if (argc != 3) {
    for (const Case& c : cases()) std::printf("%s\t%s\t%.0f\n", c.name.c_str(), c.unit.c_str(), c.units);
    return 0;
  }
  Status status = visionllm::set_isa(argv[2]);
  for (const Case& c : cases()) {
    if (c.name != argv[1] || !status.ok()) continue;
    Tensors tensors;
    const std::function<Status()> call = c.prepare(tensors);
    run_case(call, &status);
    if (!status.ok()) break;
    return 0;
  }
  std::fprintf(stderr, "%s\n", status.ok() ? "no such case" : status.message().c_str());
  return status.ok() ? 2 : 3;
}
