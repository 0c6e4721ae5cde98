// The kernels' name of an element type.
#pragma once

#include "cpu/element.h"
#include "visionllm/tensor.h"

namespace visionllm {

// Of a floating-point type or int8.
inline cpu::Element element_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return cpu::Element::bfloat16;
    case DType::float16: return cpu::Element::float16;
    case DType::int8: return cpu::Element::int8;
    default: return cpu::Element::float32;
  }
}

}  // namespace visionllm
