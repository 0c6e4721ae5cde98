// Size of a matrix packed for cpu/matmul.h; no instruction set is needed to know it.
#pragma once

#include <stdint.h>

namespace visionllm::cpu {

// Bytes of B [N, K] packed, for every element type and instruction set; the memory is aligned to 64 bytes. Static:
// see simd.h.
static inline constexpr int64_t packed_bytes(int64_t N, int64_t K) {
  return (N + 15) / 16 * 16 * ((K + 1) / 2 * 2) * 4;
}

}  // namespace visionllm::cpu
