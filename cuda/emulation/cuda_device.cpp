// The emulator in place of cpp/cuda_device.cpp: there is always a device, and every build fits it.
#include "visionllm/cuda_device.h"

namespace visionllm {

const std::vector<std::string>& built_cuda_architectures() {
  static const std::vector<std::string> architectures{"emulation"};
  return architectures;
}

bool cuda_architecture_fits(const std::vector<std::string>&, int, int) { return true; }

Status cuda_device_status() { return {}; }

}  // namespace visionllm
