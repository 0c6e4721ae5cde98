// A view of memory that somebody else owns: address, element type, shape and strides. Nothing here allocates
// or frees.
#pragma once

#include <cstdint>
#include <string>

namespace visionllm {

// uint8 stands for boolean too: 0 and 1, a byte each.
enum class DType : std::int32_t {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  int64 = 3,
  int32 = 4,
  int8 = 5,
  uint8 = 6,
};
constexpr int kDTypes = 7;
enum class Device : std::int32_t { cpu = 0, cuda = 1 };

constexpr int kMaxRank = 8;

// Default-constructed it is an absent tensor, which optional arguments may be.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device = Device::cpu;
  int rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};  // in elements, not bytes; 0 for an expanded dimension

  // A scalar has rank 0 and an empty tensor no address; only an absent tensor has neither.
  bool absent() const { return data == nullptr && rank == 0; }

  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

const char* dtype_name(DType dtype);
std::int64_t element_size(DType dtype);            // bytes
std::string shape_text(const TensorView& tensor);  // "[2, 8, 32]"; "none" when absent

}  // namespace visionllm
