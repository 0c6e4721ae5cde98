// Which GPUs this library's CUDA kernels are built for, and whether the current one is among them.
#pragma once

#include <string>
#include <vector>

#include "visionllm/status.h"

namespace visionllm {

// As in "sm_90a" (machine code for one chip) and "compute_90" (PTX, which the driver compiles for chips that
// are newer); empty for a build without CUDA kernels.
const std::vector<std::string>& built_cuda_architectures();

// Whether code built for `architectures` runs on a GPU of compute capability major.minor.
bool cuda_architecture_fits(const std::vector<std::string>& architectures, int major, int minor);

// Whether kernels can run on the thread's current CUDA device; says what is missing otherwise: the build's
// kernels, a driver, a GPU, or kernels for this GPU. The answer for a device is found once.
Status cuda_device_status();

}  // namespace visionllm
