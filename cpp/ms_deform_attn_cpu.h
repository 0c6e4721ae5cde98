// How multi-scale deformable attention runs on the CPU: tables of the levels, memory to work in, what is shared
// out to threads. Included by ms_deform_attn.cpp only; arguments are checked already.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/ms_deform_attn.h"
#include "dispatch.h"
#include "ms_deform_attn_cuda.h"  // level_fits
#include "parallel.h"
#include "scratch.h"

namespace visionllm {
namespace {

// Copying a head's rows together costs about as much as this many gathered rows per row copied.
constexpr std::int64_t kGathersPerCopy = 2;

// In the backward pass of 16-bit values, copies of those rows alone that are looked at pay up to this many
// gathered rows for two pixels: 100 queries at 22223 pixels take 1.6 ms instead of 4.7.
constexpr std::int64_t kGathersForTwoPixels = 3;

// One thread per this many corner rows at least: about 100 us of work, five times what starting a thread
// costs.
constexpr std::int64_t kRowsPerThread = 100000;

// Per point: its level's size, first pixel and number, padded to whole chunks with a 1 x 1 level at 0.
struct LevelTable {
  std::vector<float> width, height, number;
  std::vector<std::int32_t> width_int, height_int, start;

  Status fill(const char* op, const TensorView& spatial_shapes, const TensorView& level_start_index,
              const DeformSizes& n) {
    const std::int64_t points = n.L * n.P;
    const std::int64_t padded = (points + cpu::kPointChunk - 1) / cpu::kPointChunk * cpu::kPointChunk;
    width.assign(padded, 1.0f), height.assign(padded, 1.0f), number.assign(padded, 0.0f);
    width_int.assign(padded, 1), height_int.assign(padded, 1), start.assign(padded, 0);
    const auto* shapes = static_cast<const std::int64_t*>(spatial_shapes.data);
    const auto* starts = static_cast<const std::int64_t*>(level_start_index.data);
    for (std::int64_t l = 0; l < n.L; ++l) {
      const std::int64_t h = shapes[2 * l], w = shapes[2 * l + 1], first = starts[l];
      if (!level_fits(h, w, first, n.S)) return bad_level(op, l, h, w, first, n.S);
      for (std::int64_t p = l * n.P; p < (l + 1) * n.P; ++p) {
        width[p] = static_cast<float>(w), height[p] = static_cast<float>(h);
        width_int[p] = static_cast<std::int32_t>(w), height_int[p] = static_cast<std::int32_t>(h);
        start[p] = static_cast<std::int32_t>(first), number[p] = static_cast<float>(l);
      }
    }
    return {};
  }
};

cpu::Element element(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return cpu::Element::bfloat16;
    case DType::float16: return cpu::Element::float16;
    default: return cpu::Element::float32;
  }
}

// The tensors of a call; outputs of other calls are absent. Fused, there is a reference, and locations and
// attention are offsets and logits.
struct DeformCall {
  const TensorView& value;
  const TensorView& spatial_shapes;
  const TensorView& level_start_index;
  const TensorView& locations;
  const TensorView& attention;
  const TensorView& reference;
};

struct DeformGradients {
  const TensorView& value;
  const TensorView& locations;
  const TensorView& attention;
  const TensorView& reference;
};

cpu::MsDeformAttnParams make_params(const DeformCall& call, const LevelTable& levels, const DeformSizes& n) {
  const TensorView &value = call.value, &locations = call.locations, &attention = call.attention;
  cpu::MsDeformAttnParams params{};
  params.batch = n.B, params.queries = n.Q, params.heads = n.H, params.channels = n.D, params.pixels = n.S;
  params.levels = static_cast<std::int32_t>(n.L);
  params.points = static_cast<std::int32_t>(n.L * n.P);
  params.padded_points = static_cast<std::int32_t>(levels.width.size());
  params.level_width = levels.width.data(), params.level_height = levels.height.data();
  params.level_width_int = levels.width_int.data(), params.level_height_int = levels.height_int.data();
  params.level_start = levels.start.data(), params.level_number = levels.number.data();
  params.element = element(value.dtype);
  params.value = value.data;
  params.value_stride_b = value.strides[0], params.value_stride_s = value.strides[1];
  params.value_stride_h = value.strides[2];
  params.locations = static_cast<const float*>(locations.data);
  params.locations_stride_b = locations.strides[0], params.locations_stride_q = locations.strides[1];
  params.locations_stride_h = locations.strides[2];
  params.attention_element = element(attention.dtype);
  params.attention = attention.data;
  params.attention_stride_b = attention.strides[0], params.attention_stride_q = attention.strides[1];
  params.attention_stride_h = attention.strides[2];
  if (!call.reference.absent()) {
    const TensorView& reference = call.reference;
    params.reference = static_cast<const float*>(reference.data);
    params.reference_stride_b = reference.strides[0], params.reference_stride_q = reference.strides[1];
    params.reference_stride_l = n.L == 1 ? 0 : reference.strides[2];
    params.reference_size = static_cast<std::int32_t>(reference.shape[3]);
    params.half_over_points = 0.5f / static_cast<float>(n.P);
  }
  return params;
}

struct Kernels {
  cpu::MsDeformAttnForward forward;
  cpu::MsDeformAttnBackward backward;
};

Status choose_kernels(Kernels* kernels) {
  Isa isa;
  VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
  kernels->forward = VISIONLLM_KERNEL(isa, ms_deform_attn_kernel);
  kernels->backward = VISIONLLM_KERNEL(isa, ms_deform_attn_backward_kernel);
  return {};
}

void fill_zero(const TensorView& tensor) {  // contiguous
  if (tensor.size() > 0)
    std::memset(tensor.data, 0, static_cast<std::size_t>(tensor.size() * element_size(tensor.dtype)));
}

bool copying_pays(const DeformSizes& n) { return n.H > 1 && 4 * n.Q * n.L * n.P >= kGathersPerCopy * n.S; }

int useful_threads(const DeformSizes& n, const Execution& execution) {
  const double rows = 4.0 * static_cast<double>(n.B) * n.Q * n.H * n.L * n.P * (n.D + 15) / 16;
  return static_cast<int>(std::clamp<double>(rows / kRowsPerThread, 1.0, std::max(execution.threads, 1)));
}

Status run_on_cpu(const char* op, const TensorView& output, const DeformCall& call, const DeformSizes& n,
                  const Execution& execution) {
  LevelTable levels;
  VISIONLLM_RETURN_IF_BAD(levels.fill(op, call.spatial_shapes, call.level_start_index, n));
  Kernels kernels;
  VISIONLLM_RETURN_IF_BAD(choose_kernels(&kernels));
  if (output.size() == 0) return {};
  if (n.L * n.P == 0) {
    fill_zero(output);
    return {};
  }

  cpu::MsDeformAttnParams params = make_params(call, levels, n);
  params.output = output.data;
  params.output_stride_b = n.Q * n.H * n.D, params.output_stride_q = n.H * n.D;
  const int threads = useful_threads(n, execution);
  const Scratch workspace(cpu::ms_deform_attn_workspace_bytes(params), threads);
  const Scratch value_rows(copying_pays(n) ? (n.S + 1) * n.D * 4 : 0, threads);
  parallel_for(n.B * n.H * n.Q, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernels.forward(params, begin, end, workspace.part<void>(worker), value_rows.part<float>(worker));
  });
  return {};
}

// Fused: sums the locations' gradients over heads and points, in a fixed order, and turns them into those of
// the offsets.
void reference_gradients(const cpu::MsDeformAttnParams& params, const DeformSizes& n, const DeformCall& call,
                         float* grad_reference, int threads) {
  const auto* const offsets = static_cast<const float*>(call.locations.data);
  const auto* const shapes = static_cast<const std::int64_t*>(call.spatial_shapes.data);
  const std::int64_t size = params.reference_size;
  parallel_for(n.B * n.Q, threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t b = i / n.Q, q = i % n.Q;
      for (std::int64_t l = 0; l < n.L; ++l) {
        const float* const reference = params.reference + b * params.reference_stride_b +
                                       q * params.reference_stride_q + l * params.reference_stride_l;
        float slope_x = 1.0f / static_cast<float>(shapes[2 * l + 1]);
        float slope_y = 1.0f / static_cast<float>(shapes[2 * l]);
        if (size == 4) slope_x = params.half_over_points * reference[2];
        if (size == 4) slope_y = params.half_over_points * reference[3];
        float sum[4] = {};
        for (std::int64_t h = 0; h < n.H; ++h) {
          float* grad = params.grad_locations + ((i * n.H + h) * n.L + l) * n.P * 2;
          const float* offset = offsets + b * params.locations_stride_b + q * params.locations_stride_q +
                                h * params.locations_stride_h + l * n.P * 2;
          for (std::int64_t p = 0; p < n.P; ++p, grad += 2, offset += 2) {
            // A point without a gradient may have an offset that is not finite.
            if (grad[0] == 0.0f && grad[1] == 0.0f) continue;
            sum[0] += grad[0], sum[1] += grad[1];
            sum[2] += grad[0] * offset[0] * params.half_over_points;
            sum[3] += grad[1] * offset[1] * params.half_over_points;
            grad[0] *= slope_x, grad[1] *= slope_y;
          }
        }
        std::copy(sum, sum + size, grad_reference + (i * n.L + l) * size);
      }
    }
  });
}

Status run_backward_on_cpu(const char* op, const DeformGradients& grads, const TensorView& grad_output,
                           const DeformCall& call, const DeformSizes& n, const Execution& execution) {
  LevelTable levels;
  VISIONLLM_RETURN_IF_BAD(levels.fill(op, call.spatial_shapes, call.level_start_index, n));
  Kernels kernels;
  VISIONLLM_RETURN_IF_BAD(choose_kernels(&kernels));
  if (grad_output.size() == 0 || n.L * n.P == 0) {
    fill_zero(grads.value);
    fill_zero(grads.locations);
    fill_zero(grads.attention);
    if (!grads.reference.absent()) fill_zero(grads.reference);
    return {};
  }

  cpu::MsDeformAttnParams params = make_params(call, levels, n);
  params.grad_output = grad_output.data;
  params.grad_output_stride_b = grad_output.strides[0], params.grad_output_stride_q = grad_output.strides[1];
  params.grad_value = grads.value.data;
  params.grad_locations = static_cast<float*>(grads.locations.data);
  params.grad_attention = grads.attention.data;
  params.by_location = !grads.reference.absent();
  // Low precision sums in float32, so it needs rows of its own in any case: all, or those that are looked at.
  const bool low = call.value.dtype != DType::float32;
  const bool met = low && 2 * 4 * n.Q * n.L * n.P < kGathersForTwoPixels * n.S;
  const bool copying = !met && (low || copying_pays(n));
  const std::int64_t rows = copying ? n.S + 1 : met ? cpu::ms_deform_attn_most_rows(params) : 0;
  const int threads = static_cast<int>(std::min<std::int64_t>(useful_threads(n, execution), n.B * n.H));
  const Scratch workspace(cpu::ms_deform_attn_workspace_bytes(params), threads);
  const Scratch value_rows(rows * n.D * 4, threads);
  const Scratch grad_rows(rows * n.D * 4, threads);
  const Scratch slots(met ? (n.S + 1 + rows) * 4 : 0, threads);
  if (!copying) fill_zero(grads.value);  // all of it at once: four times as fast as head by head
  parallel_for(n.B * n.H, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
    kernels.backward(params, begin, end, workspace.part<void>(worker), value_rows.part<float>(worker),
                     grad_rows.part<float>(worker), slots.part<std::int32_t>(worker));
  });
  if (params.by_location)
    reference_gradients(params, n, call, static_cast<float*>(grads.reference.data), threads);
  return {};
}

}  // namespace
}  // namespace visionllm
