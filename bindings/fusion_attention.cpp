// Bindings of fusion_attention and its backward; the contract is in visionllm/fusion_attention.h.
#include "visionllm/fusion_attention.h"

#include "bind.h"

namespace visionllm {

void bind_fusion_attention(nanobind::module_& m) {
  namespace nb = nanobind;
  bind_operator<1>(m, "fusion_attention", &fusion_attention,
                   {"output", "x", "norm_weight", "norm_bias", "query_weight", "query_bias", "key", "value",
                    "mask", "output_weight", "output_bias", "gate", "epsilon"});
  bind_operator<10>(m, "fusion_attention_backward", &fusion_attention_backward,
                    {"grad_x",
                     "grad_norm_weight",
                     "grad_norm_bias",
                     "grad_query_weight",
                     "grad_query_bias",
                     "grad_key",
                     "grad_value",
                     "grad_output_weight",
                     "grad_output_bias",
                     "grad_gate",
                     "workspace",
                     "grad_output",
                     "x",
                     "norm_weight",
                     "norm_bias",
                     "query_weight",
                     "query_bias",
                     "key",
                     "value",
                     "mask",
                     "output_weight",
                     "output_bias",
                     "gate",
                     "epsilon"});
  m.def("fusion_attention_backward_workspace_bytes", &fusion_attention_backward_workspace_bytes, nb::arg("B"),
        nb::arg("N"), nb::arg("C"), nb::arg("T"), nb::arg("H"), nb::arg("element_bytes"),
        "Bytes of workspace that fusion_attention_backward needs for elements of 2 or 4 bytes.");
}

}  // namespace visionllm
