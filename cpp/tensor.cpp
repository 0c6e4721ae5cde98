#include "visionllm/tensor.h"

namespace visionllm {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::int64: return "int64";
    case DType::int32: return "int32";
    case DType::int8: return "int8";
    case DType::uint8: return "uint8";
  }
  return "unknown";
}

std::int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::bfloat16:
    case DType::float16: return 2;
    case DType::int8:
    case DType::uint8: return 1;
  }
  return 0;
}

std::string shape_text(const TensorView& tensor) {
  if (tensor.absent()) return "none";
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  return text + "]";
}

}  // namespace visionllm
