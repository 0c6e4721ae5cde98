// Forward of the linear layer with low-rank adapters: see lora_linear.h for what each kernel computes.
//
// Few rows: dot products over the weights as they lie, each weight read once (matmul_stream.h), with the adapters'
// term in the same sums. More rows: blocks of packed weights (lora_linear_product.h), with the rows of each
// adapter side by side.
#include "lora_linear.h"

#include "lora_linear_product.h"
#include "matmul_stream.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// Sums and bias to the output's row.
template <typename T>
VISIONLLM_INLINE void finish(const LoraLinearParams& p, int64_t row, int64_t n, F sum, int64_t lanes) {
  if (p.bias != nullptr) sum = sum + load_first(at<T>(p.bias, n), lanes);
  store_first(static_cast<T*>(p.output) + row * p.output_stride + n, sum, lanes);
}

template <typename T>
void stream_low_rank(const LoraLinearParams& p, int64_t begin, int64_t end) {
  const T* x[kLoraStreamRows];
  const auto adapter = [&](int64_t row) {
    const int64_t e = p.index == nullptr ? 0 : p.index[row];
    return e >= 0 && e < p.E ? e : -1;
  };
  for (int64_t row = begin, next; row < end; row = next) {
    const int64_t e = adapter(row);
    next = row;
    do {
      x[next - row] = at<T>(p.x, next * p.x_stride);
      ++next;
    } while (next < end && adapter(next) == e);
    float* out = p.low_rank + row * p.R;
    const int64_t count = (next - row) * p.R;
    if (e >= 0)
      matmul_stream(out, p.R, x, next - row, at<T>(p.a, e * p.R * p.K), p.K, 0, p.R, p.K, nullptr,
                    static_cast<const StreamAdapter<T>*>(nullptr), 0);
    for (int64_t i = 0; i < count; ++i) out[i] = e >= 0 ? out[i] * p.factor[e] : 0.0f;
  }
}

template <typename T, typename TW>
void stream_columns(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  const T* x[kLoraStreamRows];
  StreamAdapter<T> adapters[kLoraStreamRows];
  for (int64_t row = 0; row < p.T; ++row) {
    x[row] = at<T>(p.x, row * p.x_stride);
    const int64_t e = p.index == nullptr ? 0 : p.index[row];
    const bool adapted = e >= 0 && e < p.E;
    adapters[row].factors = adapted ? p.low_rank + row * p.R : nullptr;
    adapters[row].b = adapted ? at<T>(p.b, e * p.N * p.R) : nullptr;
  }
  const LoraWorkspace w(p, workspace);
  for (int64_t n = begin; n < end; n += kLoraBlockColumns) {
    const int64_t columns = smaller(end - n, kLoraBlockColumns);
    matmul_stream(w.sums, kLoraSumStride, x, p.T, at<TW>(p.weight, 0), p.weight_stride, n, columns, p.K,
                  p.weight_scale, p.R > 0 ? adapters : nullptr, p.R);
    for (int64_t row = 0; row < p.T; ++row) {
      for (int64_t c = 0; c < columns; c += kWidth)
        finish<T>(p, row, n + c, load(w.sums + row * kLoraSumStride + c), columns - c);
    }
  }
}

template <typename T, typename TW>
void block_columns(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  using Word = typename WordOf<T>::type;
  const LoraOperand<T> x{at<T>(p.x, 0), p.x_stride, p.K, nullptr};
  adapted_product<Word>(
      p, x, p.low_rank, p.weight_scale, begin, end, workspace,
      [&](void* packed, int64_t n, int64_t columns, int64_t k, int64_t count) {
        pack_b<T>(packed, at<TW>(p.weight, n * p.weight_stride + k), p.weight_stride, columns, count);
      },
      [&](void* packed, int64_t e, int64_t n, int64_t columns) {
        pack_b<float>(packed, at<T>(p.b, (e * p.N + n) * p.R), p.R, columns, p.R);
      },
      [&](int64_t row, int64_t n, F sum, int lanes) { finish<T>(p, row, n, sum, lanes); });
}

}  // namespace

void lora_low_rank_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    if (p.T <= kLoraStreamRows) return stream_low_rank<T>(p, begin, end);
    const LoraOperand<T> x{at<T>(p.x, 0), p.x_stride, p.K, nullptr};
    low_rank_product(p, x, p.low_rank, begin, end, workspace,
                     [&](void* packed, int64_t e, int64_t k, int64_t count) {
                       pack_b<T>(packed, at<T>(p.a, e * p.R * p.K + k), p.K, p.R, count);
                     });
  });
}

void lora_columns_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    if (p.T <= kLoraStreamRows) {
      return p.int8 ? stream_columns<T, int8_t>(p, begin, end, workspace)
                    : stream_columns<T, T>(p, begin, end, workspace);
    }
    return p.int8 ? block_columns<T, int8_t>(p, begin, end, workspace)
                  : block_columns<T, T>(p, begin, end, workspace);
  });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
