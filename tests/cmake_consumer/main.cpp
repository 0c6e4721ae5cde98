// Runs ms_deform_attn, forward and backward, on every instruction set of this machine and compares with the
// formula in double; also on a bad argument. Prints what it did; exit code 1 when anything differs.
#include <visionllm/isa.h>
#include <visionllm/ms_deform_attn.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int B = 2, H = 3, D = 21, Q = 40, L = 2, P = 3;
constexpr int kHeight[L] = {5, 2}, kWidth[L] = {7, 3}, kStart[L] = {0, 35}, S = 41;

template <typename T>
visionllm::TensorView view(std::vector<T>& data, visionllm::DType dtype,
                           std::initializer_list<std::int64_t> shape) {
  visionllm::TensorView tensor;
  tensor.data = data.data();
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(shape.size());
  int i = 0;
  for (const std::int64_t n : shape) tensor.shape[i++] = n;
  std::int64_t stride = 1;
  for (i = tensor.rank - 1; i >= 0; --i) {
    tensor.strides[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

struct Problem {
  std::vector<float> value = std::vector<float>(B * S * H * D),
                     locations = std::vector<float>(B * Q * H * L * P * 2),
                     weights = std::vector<float>(B * Q * H * L * P),
                     grad_output = std::vector<float>(B * Q * H * D);
  std::vector<std::int64_t> shapes{kHeight[0], kWidth[0], kHeight[1], kWidth[1]},
      starts{kStart[0], kStart[1]};

  Problem() {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> wide(-0.2f, 1.2f), unit(-1.0f, 1.0f);
    for (float& x : value) x = unit(random);
    for (float& x : locations) x = wide(random);
    for (float& x : weights) x = unit(random);
    for (float& x : grad_output) x = unit(random);
  }
};

struct Result {
  std::vector<float> output = std::vector<float>(B * Q * H * D, NAN),
                     grad_value = std::vector<float>(B * S * H * D, NAN),
                     grad_locations = std::vector<float>(B * Q * H * L * P * 2, NAN),
                     grad_weights = std::vector<float>(B * Q * H * L * P, NAN);
};

// The formula, one corner at a time.
Result expected(const Problem& in) {
  Result out;
  std::vector<double> output(in.grad_output.size()), grad_value(in.value.size()),
      grad_locations(in.locations.size()), grad_weights(in.weights.size());
  for (int b = 0; b < B; ++b) {
    for (int q = 0; q < Q; ++q) {
      for (int h = 0; h < H; ++h) {
        const int head = (b * Q + q) * H + h;
        for (int l = 0; l < L; ++l) {
          for (int p = 0; p < P; ++p) {
            const int point = (head * L + l) * P + p;
            const double x = in.locations[2 * point] * static_cast<double>(kWidth[l]) - 0.5;
            const double y = in.locations[2 * point + 1] * static_cast<double>(kHeight[l]) - 0.5;
            const int x0 = static_cast<int>(std::floor(x)), y0 = static_cast<int>(std::floor(y));
            for (int corner = 0; corner < 4; ++corner) {
              const int dx = corner & 1, dy = corner >> 1, column = x0 + dx, line = y0 + dy;
              if (column < 0 || column >= kWidth[l] || line < 0 || line >= kHeight[l]) continue;
              const double wx = dx ? x - x0 : 1 - (x - x0), wy = dy ? y - y0 : 1 - (y - y0);
              const int row = ((b * S + kStart[l] + line * kWidth[l] + column) * H + h) * D;
              double dot = 0;
              for (int d = 0; d < D; ++d) {
                output[head * D + d] += in.weights[point] * wx * wy * in.value[row + d];
                grad_value[row + d] += in.weights[point] * wx * wy * in.grad_output[head * D + d];
                dot += static_cast<double>(in.grad_output[head * D + d]) * in.value[row + d];
              }
              grad_weights[point] += wx * wy * dot;
              grad_locations[2 * point] += in.weights[point] * kWidth[l] * (dx ? 1 : -1) * wy * dot;
              grad_locations[2 * point + 1] += in.weights[point] * kHeight[l] * (dy ? 1 : -1) * wx * dot;
            }
          }
        }
      }
    }
  }
  out.output.assign(output.begin(), output.end());
  out.grad_value.assign(grad_value.begin(), grad_value.end());
  out.grad_locations.assign(grad_locations.begin(), grad_locations.end());
  out.grad_weights.assign(grad_weights.begin(), grad_weights.end());
  return out;
}

bool close(const char* isa, const char* name, const std::vector<float>& got, const std::vector<float>& want) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i] - want[i]) <= 1e-4f * (1.0f + std::fabs(want[i])))) {
      std::printf("%s: %s[%zu] is %g, expected %g\n", isa, name, i, got[i], want[i]);
      return false;
    }
  }
  return true;
}

bool run(const char* isa, Problem& in, const Result& want) {
  using visionllm::DType;
  Result got;
  const auto value = view(in.value, DType::float32, {B, S, H, D});
  const auto shapes = view(in.shapes, DType::int64, {L, 2}), starts = view(in.starts, DType::int64, {L});
  const auto locations = view(in.locations, DType::float32, {B, Q, H, L, P, 2});
  const auto weights = view(in.weights, DType::float32, {B, Q, H, L, P});
  visionllm::Execution execution;
  execution.threads = 2;
  visionllm::Status status = visionllm::ms_deform_attn(view(got.output, DType::float32, {B, Q, H * D}), value,
                                                       shapes, starts, locations, weights, execution);
  if (status.ok()) {
    status = visionllm::ms_deform_attn_backward(view(got.grad_value, DType::float32, {B, S, H, D}),
                                                view(got.grad_locations, DType::float32, {B, Q, H, L, P, 2}),
                                                view(got.grad_weights, DType::float32, {B, Q, H, L, P}),
                                                visionllm::TensorView(),  // no workspace on the CPU
                                                view(in.grad_output, DType::float32, {B, Q, H * D}), value,
                                                shapes, starts, locations, weights, false, execution);
  }
  if (!status.ok()) {
    std::printf("%s: %s\n", isa, status.message().c_str());
    return false;
  }
  return close(isa, "output", got.output, want.output) &&
         close(isa, "grad_value", got.grad_value, want.grad_value) &&
         close(isa, "grad_locations", got.grad_locations, want.grad_locations) &&
         close(isa, "grad_weights", got.grad_weights, want.grad_weights);
}

bool refuses_bad_argument(Problem& in) {
  using visionllm::DType;
  Result got;
  const visionllm::Status status = visionllm::ms_deform_attn(
      view(got.output, DType::float32, {B, Q, H * D - 1}), view(in.value, DType::float32, {B, S, H, D}),
      view(in.shapes, DType::int64, {L, 2}), view(in.starts, DType::int64, {L}),
      view(in.locations, DType::float32, {B, Q, H, L, P, 2}),
      view(in.weights, DType::float32, {B, Q, H, L, P}), {});
  const char* expected =
      "ms_deform_attn: output must have shape [B, Q, H * D] = [2, 40, 63], got [2, 40, 62]";
  if (status.code() == visionllm::StatusCode::invalid_argument && status.message() == expected) return true;
  std::printf("bad output shape: got '%s', expected '%s'\n", status.message().c_str(), expected);
  return false;
}

}  // namespace

int main() {
  Problem problem;
  const Result want = expected(problem);
  bool good = refuses_bad_argument(problem);
  for (const visionllm::Isa isa : visionllm::available_isas()) {
    const char* name = visionllm::isa_name(isa);
    const visionllm::Status status = visionllm::set_isa(name);
    const bool same = status.ok() && run(name, problem, want);
    std::printf("%s: %s\n", name, same ? "ok" : "FAILED");
    good = good && same;
  }
  return good ? 0 : 1;
}
