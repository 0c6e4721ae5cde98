// The Python module visionllm._core: one bind function per file.
#include <nanobind/nanobind.h>

#include "bind.h"

NB_MODULE(_core, m) {
  m.attr("version") = VISIONLLM_VERSION;
  visionllm::bind_cuda_device(m);
  visionllm::bind_isa(m);
  visionllm::bind_ms_deform_attn(m);
#ifdef VISIONLLM_BIND_LORA_LINEAR
  visionllm::bind_lora_linear(m);
#endif
#ifdef VISIONLLM_BIND_FUSION_ATTENTION
  visionllm::bind_fusion_attention(m);
#endif
#ifdef VISIONLLM_BIND_QUERY_ATTENTION
  visionllm::bind_query_attention(m);
#endif
#ifdef VISIONLLM_BIND_SLOT_HEAD
  visionllm::bind_slot_head(m);
#endif
}
