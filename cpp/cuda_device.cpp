#include "visionllm/cuda_device.h"

#include <cstdlib>
#include <mutex>

#ifdef VISIONLLM_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace visionllm {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t comma = text.find(',', begin);
    const std::size_t end = comma == std::string::npos ? text.size() : comma;
    words.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

#ifdef VISIONLLM_HAVE_CUDA

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// Clears CUDA's own record of the error, so that a later launch does not report it again.
Status cuda_failure(const char* what, cudaError_t error) {
  (void)cudaGetLastError();
  return Status::cuda_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(error) + ": " +
                            cudaGetErrorString(error));
}

Status find_device_status(int device) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return cuda_failure("no usable driver or GPU", error);
  }
  if (cuda_architecture_fits(built_cuda_architectures(), properties.major, properties.minor)) return {};
  const std::string capability = std::to_string(properties.major) + std::to_string(properties.minor);
  return Status::unsupported(std::string("CUDA: this build has kernels for ") +
                             joined(built_cuda_architectures()) + ", none of which fits " + properties.name +
                             " (sm_" + capability +
                             "); build it with -DVISIONLLM_CUDA=ON "
                             "-DCMAKE_CUDA_ARCHITECTURES=" +
                             capability + "-real");
}

#endif

}  // namespace

const std::vector<std::string>& built_cuda_architectures() {
#ifdef VISIONLLM_HAVE_CUDA
  static const std::vector<std::string> architectures = split(VISIONLLM_CUDA_ARCHITECTURES);
#else
  static const std::vector<std::string> architectures = split("");
#endif
  return architectures;
}

bool cuda_architecture_fits(const std::vector<std::string>& architectures, int major, int minor) {
  for (const std::string& architecture : architectures) {
    const bool machine_code = architecture.rfind("sm_", 0) == 0;
    const int number = std::atoi(architecture.c_str() + (machine_code ? 3 : 8));
    const int built_major = number / 10, built_minor = number % 10;
    const char last = architecture.back();
    if (last == 'a') {  // for this very chip, PTX too
      if (major == built_major && minor == built_minor) return true;
    } else if (machine_code || last == 'f') {  // for the family: the same major number, this minor or later
      if (major == built_major && minor >= built_minor) return true;
    } else if (major > built_major || (major == built_major && minor >= built_minor)) {
      return true;
    }
  }
  return false;
}

Status cuda_device_status() {
#ifdef VISIONLLM_HAVE_CUDA
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return cuda_failure("no usable driver or GPU", error);
  }
  static std::mutex mutex;
  static std::vector<Status> found;  // by device
  static std::vector<bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::size_t count = static_cast<std::size_t>(device) + 1;
  if (known.size() < count) found.resize(count), known.resize(count, false);
  if (!known[device]) found[device] = find_device_status(device), known[device] = true;
  return found[device];
#else
  return Status::unsupported(
      "this build has no CUDA kernels; build it with -DVISIONLLM_CUDA=ON (needs nvcc 12 or newer)");
#endif
}

}  // namespace visionllm
