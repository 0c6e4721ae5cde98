// The Python module visionllm._core: one bind function per file.
#include <nanobind/nanobind.h>

#include "bind.h"

NB_MODULE(_core, m) {
  m.attr("version") = VISIONLLM_VERSION;
  visionllm::bind_cuda_device(m);
  visionllm::bind_isa(m);
  visionllm::bind_ms_deform_attn(m);
  visionllm::bind_lora_linear(m);
  visionllm::bind_fusion_attention(m);
  visionllm::bind_query_attention(m);
  visionllm::bind_slot_head(m);
}
