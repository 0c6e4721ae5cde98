// The Python module visionllm._core: one bind function per file.
#include <nanobind/nanobind.h>

#include "bind.h"

NB_MODULE(_core, m) {
  m.attr("version") = VISIONLLM_VERSION;
  m.attr("cuda_architectures") = nanobind::make_tuple();  // no CUDA kernels in this version
  visionllm::bind_isa(m);
  visionllm::bind_ms_deform_attn(m);
}
