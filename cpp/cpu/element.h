// Element types of kernels that take several.
#pragma once

#include <stdint.h>

namespace visionllm::cpu {

enum class Element : int32_t { float32, bfloat16, float16, int8 };

constexpr int64_t element_bytes(Element element) {
  return element == Element::float32 ? 4 : element == Element::int8 ? 1 : 2;
}

}  // namespace visionllm::cpu
