// Bindings of ms_deform_attn and its backward; the contract is in visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {
namespace {

template <typename T>
std::int64_t workspace(const T& value, const T& sampling_locations, bool deterministic) {
  constexpr const char* op = "ms_deform_attn_backward_workspace";
  return ms_deform_attn_backward_workspace(
      binding::view_of(value, op, {"value", false}),
      binding::view_of(sampling_locations, op, {"sampling_locations", false}), deterministic);
}

}  // namespace

void bind_ms_deform_attn(nb::module_& m) {
  bind_operator<1>(
      m, "ms_deform_attn", &ms_deform_attn,
      {"output", "value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"});
  bind_operator<4>(m, "ms_deform_attn_backward", &ms_deform_attn_backward,
                   {"grad_value", "grad_sampling_locations", "grad_attention_weights", "workspace?",
                    "grad_output", "value", "spatial_shapes", "level_start_index", "sampling_locations",
                    "attention_weights", "deterministic"});
  bind_operator<1>(m, "ms_deform_attn_fused", &ms_deform_attn_fused,
                   {"output", "value", "spatial_shapes", "level_start_index", "reference_points",
                    "sampling_offsets", "attention_logits"});
  bind_operator<5>(m, "ms_deform_attn_fused_backward", &ms_deform_attn_fused_backward,
                   {"grad_value", "grad_reference_points?", "grad_sampling_offsets", "grad_attention_logits",
                    "workspace?", "grad_output", "value", "spatial_shapes", "level_start_index",
                    "reference_points", "sampling_offsets", "attention_logits", "deterministic"});
  const char* const doc = "Numbers of type float32 that the backward's workspace needs on CUDA.";
  m.def("ms_deform_attn_backward_workspace", &workspace<binding::Input>, nb::arg("value"),
        nb::arg("sampling_locations"), nb::arg("deterministic"), doc);
  m.def("ms_deform_attn_backward_workspace_raw", &workspace<nb::object>, nb::arg("value"),
        nb::arg("sampling_locations"), nb::arg("deterministic"), doc);
}

}  // namespace visionllm
