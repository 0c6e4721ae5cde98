// Bindings of query_attention, its backward and its number of splits; the contract is in
// visionllm/query_attention.h.
#include "visionllm/query_attention.h"

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {

void bind_query_attention(nb::module_& m) {
  bind_operator<3>(m, "query_attention", &query_attention,
                   {"output", "logsumexp", "workspace?", "q", "k", "v", "prefix_k", "prefix_v",
                    "prefix_length", "cosine?", "sine?"});
  bind_operator<6>(
      m, "query_attention_backward", &query_attention_backward,
      {"grad_q", "grad_k", "grad_v", "grad_prefix_k", "grad_prefix_v", "workspace", "grad_output", "output",
       "logsumexp", "q", "k", "v", "prefix_k", "prefix_v", "prefix_length", "cosine?", "sine?"});
  m.def("query_attention_splits", &query_attention_splits, nb::arg("B"), nb::arg("M"), nb::arg("S"),
        nb::arg("H"), nb::arg("Hkv"), nb::arg("P"),
        "Into how many parts the keys should be divided among CUDA blocks; 1 needs no workspace.");
}

}  // namespace visionllm
