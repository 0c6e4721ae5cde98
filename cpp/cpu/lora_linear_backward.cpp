// Backward of the linear layer with low-rank adapters: see lora_linear.h for what each kernel computes.
//
//   g[t]      = factor_a * grad_y[t] B[a]            grad_x[t] = grad_y[t] W + g[t] A[a]
//   grad_A[a] = sum over its rows t of g[t] x[t]     grad_B[a] = sum over its rows t of grad_y[t] s[t]
//
// g and s stay in float32, so grad_A and grad_B are products in float32.
#include "lora_linear.h"
#include "lora_linear_product.h"

namespace visionllm::cpu::VISIONLLM_ISA {
namespace {

// PackedFor: the type whose words the product is in, T or float.
template <typename PackedFor, typename T, typename TW>
void grad_x_columns(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  const LoraOperand<T> grad{at<T>(p.grad_output, 0), p.grad_output_stride, p.N, p.weight_scale};
  adapted_product<typename WordOf<PackedFor>::type>(
      p, grad, p.grad_low_rank, nullptr, begin, end, workspace,
      [&](void* packed, int64_t k, int64_t columns, int64_t n, int64_t count) {
        pack_b_transposed<PackedFor>(packed, at<TW>(p.weight, n * p.weight_stride + k), p.weight_stride,
                                     columns, count);
      },
      [&](void* packed, int64_t e, int64_t k, int64_t columns) {
        pack_b_transposed<float>(packed, at<T>(p.a, e * p.R * p.K + k), p.K, columns, p.R);
      },
      [&](int64_t row, int64_t k, F sum, int lanes) {
        store_first(static_cast<T*>(p.grad_x) + row * p.grad_x_stride + k, sum, lanes);
      });
}

// For each adapter e and the columns begin .. end of `rows` [T, columns]: out(e, column, sums) with the sums over e's
// rows t of factors[t, r] rows[t, column + lane]: those of r lie kLoraSumStride apart.
template <typename T, typename Out>
void outer_product(const LoraLinearParams& p, const float* factors, const T* rows, int64_t stride,
                   int64_t begin, int64_t end, void* workspace, const Out& out) {
  const LoraWorkspace w(p, workspace);
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t first = p.rows.segments[e], count = p.rows.segments[e + 1] - first;
    const int64_t ld = (count + 15) / 16 * 16;
    for (int64_t t = 0; t < count; ++t) {  // w.adapter [R, ld]: the factors, transposed
      const float* from = factors + row_of(p.rows, first + t) * p.R;
      for (int64_t r = 0; r < p.R; ++r) w.adapter[r * ld + t] = from[r];
    }
    for (int64_t c = begin; c < end; c += kLoraBlockColumns) {
      const int64_t columns = smaller(end - c, kLoraBlockColumns);
      for (int64_t t = 0; t < count || t == 0; t += kLoraBlockDepth) {
        const int64_t depth = smaller(count - t, kLoraBlockDepth);
        pack_b_transposed<float>(w.packed, rows + c, stride, columns, depth,
                                 [&](int64_t k) { return row_of(p.rows, first + t + k); });
        multiply_panels(w.sums, w.adapter + t, ld, p.R, static_cast<const float*>(w.packed), columns, depth,
                        t == 0);
      }
      out(e, c, columns, w.sums);
    }
  }
}

}  // namespace

void lora_grad_low_rank_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    const LoraOperand<T> grad{at<T>(p.grad_output, 0), p.grad_output_stride, p.N, nullptr};
    low_rank_product(p, grad, p.grad_low_rank, begin, end, workspace,
                     [&](void* packed, int64_t e, int64_t n, int64_t count) {
                       pack_b_transposed<T>(packed, at<T>(p.b, (e * p.N + n) * p.R), p.R, p.R, count);
                     });
  });
}

void lora_grad_x_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    // The scales of int8 rows lie along the sum here: they go into grad_output, which then has to be float.
    p.int8 ? grad_x_columns<float, T, int8_t>(p, begin, end, workspace)
           : grad_x_columns<T, T, T>(p, begin, end, workspace);
  });
}

void lora_grad_a_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    outer_product(p, p.grad_low_rank, at<T>(p.x, 0), p.x_stride, begin, end, workspace,
                  [&](int64_t e, int64_t k, int64_t columns, const float* sums) {
                    for (int64_t r = 0; r < p.R; ++r) {
                      T* to = static_cast<T*>(p.grad_a) + (e * p.R + r) * p.K + k;
                      for (int64_t c = 0; c < columns; c += kWidth)
                        store_first(to + c, load(sums + r * kLoraSumStride + c), columns - c);
                    }
                  });
  });
}

void lora_grad_b_kernel(const LoraLinearParams& p, int64_t begin, int64_t end, void* workspace) {
  with_element(p.element, [&](auto element) {
    using T = decltype(element);
    outer_product(p, p.low_rank, at<T>(p.grad_output, 0), p.grad_output_stride, begin, end, workspace,
                  [&](int64_t e, int64_t n, int64_t columns, const float* sums) {
                    T* to = static_cast<T*>(p.grad_b) + (e * p.N + n) * p.R;
                    for (int64_t c = 0; c < columns; ++c) {
                      for (int64_t r = 0; r < p.R; r += kWidth) {
                        float lanes[kWidth] = {};
                        const int64_t left = smaller(p.R - r, kWidth);
                        for (int64_t i = 0; i < left; ++i) lanes[i] = sums[(r + i) * kLoraSumStride + c];
                        store_first(to + c * p.R + r, load(lanes), left);
                      }
                    }
                  });
  });
}

}  // namespace visionllm::cpu::VISIONLLM_ISA
