// Checks of arguments that the operators share. Each returns a Status that names the operator, the argument,
// what was expected and what came. An absent tensor fails every check of shape, type or layout.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

#define VISIONLLM_RETURN_IF_BAD(expression)                                        \
  do {                                                                             \
    if (::visionllm::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

struct NamedTensor {
  const char* name;
  const TensorView* tensor;
};

Status bad_argument(const char* op, const std::string& what);

// "[2, 8, 32]"
std::string list_text(std::initializer_list<std::int64_t> numbers);

// Exactly this shape; `letters` says in the operator's shape letters what it is: "[B, Q, H * D]".
Status check_shape(const char* op, const char* name, const TensorView& tensor, const char* letters,
                   std::initializer_list<std::int64_t> shape);

Status check_rank(const char* op, const char* name, const TensorView& tensor, const char* letters, int rank);

// Elements of the last `dimensions` dimensions lie one after the other.
Status check_inner_contiguous(const char* op, const char* name, const TensorView& tensor, int dimensions);

Status check_contiguous(const char* op, const char* name, const TensorView& tensor);

Status check_dtype(const char* op, const char* name, const TensorView& tensor, DType expected);

// float32, bfloat16 or float16
bool is_float(DType dtype);
Status check_float(const char* op, const char* name, const TensorView& tensor);

// All present tensors are in the same kind of memory, which *device becomes. (Which one of several GPUs a
// tensor lies on is the caller's to see to: a view does not say it.)
Status check_device(const char* op, std::initializer_list<NamedTensor> tensors, Device* device);

// What to return where the kernels are not there.
Status no_cuda_kernels(const char* op);
Status no_cpu_kernel(const char* op);

}  // namespace visionllm
