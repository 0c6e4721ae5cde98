#include "check.h"

namespace visionllm {

Status bad_argument(const char* op, const std::string& what) {
  return Status::invalid_argument(std::string(op) + ": " + what);
}

std::string list_text(std::initializer_list<std::int64_t> numbers) {
  std::string text = "[";
  for (const std::int64_t n : numbers) text += (text.size() == 1 ? "" : ", ") + std::to_string(n);
  return text + "]";
}

Status check_shape(const char* op, const char* name, const TensorView& tensor, const char* letters,
                   std::initializer_list<std::int64_t> shape) {
  bool equal = !tensor.absent() && tensor.rank == static_cast<int>(shape.size());
  int i = 0;
  for (const std::int64_t n : shape) {
    equal = equal && tensor.shape[i] == n;
    ++i;
  }
  if (equal) return {};
  return bad_argument(op, std::string(name) + " must have shape " + letters + " = " + list_text(shape) +
                              ", got " + shape_text(tensor));
}

Status check_rank(const char* op, const char* name, const TensorView& tensor, const char* letters, int rank) {
  if (!tensor.absent() && tensor.rank == rank) return {};
  return bad_argument(op, std::string(name) + " must have shape " + letters + ", got " + shape_text(tensor));
}

Status check_inner_contiguous(const char* op, const char* name, const TensorView& tensor, int dimensions) {
  if (tensor.size() == 0) return {};
  std::int64_t expected = 1;
  for (int i = tensor.rank - 1; i >= 0 && i >= tensor.rank - dimensions; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) {
      return bad_argument(op, std::string(name) + " must be contiguous in its last " +
                                  std::to_string(dimensions) + " dimension(s), got stride " +
                                  std::to_string(tensor.strides[i]) + " in dimension " + std::to_string(i) +
                                  ", expected " + std::to_string(expected));
    }
    expected *= tensor.shape[i];
  }
  return {};
}

Status check_contiguous(const char* op, const char* name, const TensorView& tensor) {
  return check_inner_contiguous(op, name, tensor, tensor.rank);
}

Status check_dtype(const char* op, const char* name, const TensorView& tensor, DType expected) {
  if (!tensor.absent() && tensor.dtype == expected) return {};
  return bad_argument(op, std::string(name) + " must be " + dtype_name(expected) + ", got " +
                              (tensor.absent() ? "none" : dtype_name(tensor.dtype)));
}

bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

Status check_float(const char* op, const char* name, const TensorView& tensor) {
  if (!tensor.absent() && is_float(tensor.dtype)) return {};
  return bad_argument(op, std::string(name) + " must be float32, bfloat16 or float16, got " +
                              (tensor.absent() ? "none" : dtype_name(tensor.dtype)));
}

Status check_device(const char* op, std::initializer_list<NamedTensor> tensors, Device* device) {
  const auto text = [](Device d) { return d == Device::cuda ? "CUDA" : "CPU"; };
  const NamedTensor* first = nullptr;
  for (const NamedTensor& entry : tensors) {
    if (entry.tensor->absent()) continue;
    if (first == nullptr) first = &entry;
    if (entry.tensor->device != first->tensor->device) {
      return bad_argument(op, std::string(entry.name) + " must be in " + text(first->tensor->device) +
                                  " memory as " + first->name + " is, got " + text(entry.tensor->device) +
                                  " memory");
    }
  }
  *device = first == nullptr ? Device::cpu : first->tensor->device;
  return {};
}

Status no_cuda_kernels(const char* op) {
  return Status::unsupported(std::string(op) +
                             ": this build has no CUDA kernels, got CUDA tensors; build it with "
                             "-DVISIONLLM_CUDA=ON (needs nvcc 12 or newer)");
}

Status no_cpu_kernel(const char* op) {
  return Status::unsupported(std::string(op) + ": no CPU kernel in this version, got CPU tensors");
}

}  // namespace visionllm
