// From the checked arguments of multi-scale deformable attention to its launch on CUDA: what
// ms_deform_attn.cpp and its fused form have in common.
#pragma once

#include <cstdint>

#include "../cuda/ms_deform_attn.h"
#include "check.h"

namespace visionllm {

struct DeformSizes {
  std::int64_t B, S, H, D, Q, L, P;
};

// Each test bounds the next one's operands, so that nothing overflows.
inline bool level_fits(std::int64_t height, std::int64_t width, std::int64_t start, std::int64_t pixels) {
  return height >= 1 && width >= 1 && height <= pixels && width <= pixels && start >= 0 && start <= pixels &&
         height * width <= pixels - start;
}

inline Status bad_level(const char* op, std::int64_t level, std::int64_t height, std::int64_t width,
                        std::int64_t start, std::int64_t pixels) {
  return bad_argument(op, "level " + std::to_string(level) +
                              " must be at least 1 x 1 and lie within value's S = " + std::to_string(pixels) +
                              " pixels, got height " + std::to_string(height) + ", width " +
                              std::to_string(width) + ", level_start_index " + std::to_string(start));
}

// Parts of the backward's workspace, in floats from its beginning; each begins at a multiple of 16 bytes.
struct DeformWorkspace {
  std::int64_t sums = 0, samples = 0, bounds = 0, total = 0;

  DeformWorkspace(const DeformSizes& n, DType value, bool deterministic) {
    const auto padded = [](std::int64_t floats) { return (floats + 3) / 4 * 4; };
    // float32 gradients are summed where they go.
    if (value != DType::float32) total += padded(n.B * n.S * n.H * n.D);
    samples = total;
    if (deterministic) {
      const std::int64_t lists = n.B * n.H * n.L;
      total += padded(3 * lists * n.Q * n.P);
      bounds = total;
      total += 4 * lists * ((n.Q + 31) / 32);
    }
  }
};

inline void set_strides(const TensorView& tensor, std::int64_t* b, std::int64_t* second,
                        std::int64_t* third) {
  // A dimension of one element has any stride, which would spoil the test for aligned ones; and an empty tensor
  // has no address to add to.
  const bool empty = tensor.size() == 0;
  const auto stride = [&](int i) { return empty || tensor.shape[i] == 1 ? 0 : tensor.strides[i]; };
  *b = stride(0), *second = stride(1);
  if (third != nullptr) *third = stride(2);
}

// The inputs. Levels in host memory are checked.
inline Status make_cuda_params(const char* op, const TensorView& value, const TensorView& spatial_shapes,
                               const TensorView& level_start_index, const TensorView& locations,
                               const TensorView& attention, const DeformSizes& n,
                               cuda::MsDeformAttnParams* result) {
  if (n.L > cuda::kMaxLevels || n.P > cuda::kMaxPointsPerLevel) {
    return bad_argument(op, "on CUDA L must be at most " + std::to_string(cuda::kMaxLevels) +
                                " and P at most " + std::to_string(cuda::kMaxPointsPerLevel) +
                                ", got L = " + std::to_string(n.L) + ", P = " + std::to_string(n.P));
  }
  cuda::MsDeformAttnParams params{};
  params.batch = n.B, params.pixels = n.S, params.heads = n.H, params.channels = n.D, params.queries = n.Q;
  params.levels = static_cast<std::int32_t>(n.L), params.points = static_cast<std::int32_t>(n.P);
  params.value_dtype = value.dtype, params.attention_dtype = attention.dtype;
  const auto* shapes = static_cast<const std::int64_t*>(spatial_shapes.data);
  const auto* starts = static_cast<const std::int64_t*>(level_start_index.data);
  if (spatial_shapes.device == Device::cuda) {
    params.device_shapes = shapes, params.device_starts = starts;
  } else {
    std::int64_t next =
        0;  // first pixel behind the levels so far, -1 when they do not lie one after the other
    for (std::int64_t l = 0; l < n.L; ++l) {
      const std::int64_t height = shapes[2 * l], width = shapes[2 * l + 1], start = starts[l];
      if (!level_fits(height, width, start, n.S)) return bad_level(op, l, height, width, start, n.S);
      if (width > cuda::kMaxLevelWidth) {
        return bad_argument(op, "on CUDA a level must be at most " + std::to_string(cuda::kMaxLevelWidth) +
                                    " pixels wide, got " + std::to_string(width) + " of level " +
                                    std::to_string(l));
      }
      params.level[l] = {static_cast<std::int32_t>(height), static_cast<std::int32_t>(width),
                         static_cast<std::int32_t>(start)};
      next = start == next ? start + height * width : -1;
    }
    params.queries_are_pixels = n.Q == n.S && next == n.S;
  }
  params.value = value.data;
  set_strides(value, &params.value_stride_b, &params.value_stride_s, &params.value_stride_h);
  params.locations = static_cast<const float*>(locations.data);
  set_strides(locations, &params.locations_stride_b, &params.locations_stride_q, &params.locations_stride_h);
  params.attention = attention.data;
  set_strides(attention, &params.attention_stride_b, &params.attention_stride_q, &params.attention_stride_h);
  *result = params;
  return {};
}

inline Status set_workspace(const char* op, const TensorView& workspace, const TensorView& grad_value,
                            const DeformSizes& n, bool deterministic, cuda::MsDeformAttnParams* params) {
  const DeformWorkspace parts(n, grad_value.dtype, deterministic);
  if (parts.total > 0) {
    VISIONLLM_RETURN_IF_BAD(check_rank(op, "workspace", workspace, "[n]", 1));
    VISIONLLM_RETURN_IF_BAD(check_dtype(op, "workspace", workspace, DType::float32));
    VISIONLLM_RETURN_IF_BAD(check_contiguous(op, "workspace", workspace));
    if (workspace.shape[0] < parts.total || reinterpret_cast<std::uintptr_t>(workspace.data) % 16 != 0) {
      return bad_argument(op, "workspace must have at least " + std::to_string(parts.total) +
                                  " elements and be aligned to 16 bytes, got " + shape_text(workspace));
    }
  }
  auto* const memory = static_cast<float*>(workspace.data);
  params->deterministic = deterministic;
  params->grad_value = grad_value.data;
  params->grad_value_sums =
      grad_value.dtype == DType::float32 ? static_cast<float*>(grad_value.data) : memory + parts.sums;
  if (deterministic) {
    params->samples = memory + parts.samples;
    params->bounds = reinterpret_cast<std::int32_t*>(memory + parts.bounds);
  }
  return {};
}

}  // namespace visionllm
