// What the build's CUDA kernels are for, and whether they can run here.
#include "visionllm/cuda_device.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {

void bind_cuda_device(nb::module_& m) {
  nb::list architectures;
  for (const std::string& name : built_cuda_architectures()) architectures.append(name);
  m.attr("cuda_architectures") = nb::tuple(architectures);
  m.def(
      "cuda_problem", [] { return cuda_device_status().message(); },
      "Why CUDA kernels cannot run on the current CUDA device; '' when they can.");
  m.def("cuda_architecture_fits", &cuda_architecture_fits, nb::arg("architectures"), nb::arg("major"),
        nb::arg("minor"), "Whether code built for these ('sm_90a', 'compute_90') runs on such a GPU.");
}

}  // namespace visionllm
