// A view of memory that somebody else owns: address, element type, shape and strides. Nothing here allocates
// or frees.
#pragma once

#include <cstdint>
#include <string>

namespace visionllm {

enum class DType : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2, int64 = 3 };
enum class Device : std::int32_t { cpu = 0, cuda = 1 };

constexpr int kMaxRank = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device = Device::cpu;
  int rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};  // in elements, not bytes; 0 for an expanded dimension

  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

const char* dtype_name(DType dtype);
std::string shape_text(const TensorView& tensor);  // "[2, 8, 32]"

}  // namespace visionllm
