// Bindings of ms_deform_attn and its backward; the contract is in visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include "bind.h"

namespace visionllm {

void bind_ms_deform_attn(nanobind::module_& m) {
  bind_operator<1>(
      m, "ms_deform_attn", &ms_deform_attn,
      {"output", "value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"});
  bind_operator<3>(m, "ms_deform_attn_backward", &ms_deform_attn_backward,
                   {"grad_value", "grad_sampling_locations", "grad_attention_weights", "grad_output", "value",
                    "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"});
}

}  // namespace visionllm
