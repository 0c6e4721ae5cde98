// What device/mma.cuh has as inline PTX, on the CPU, with PTX's fragment layouts.
#pragma once

#include <cstdint>

#include "emulation/platform.h"

namespace visionllm::emulation {

enum class Element { bfloat16, float16, tf32 };

void mma(Element element, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b, Site site);
void load_matrices(std::uint32_t* registers, int count, bool transposed, const void* shared_row, Site site);

}  // namespace visionllm::emulation

namespace visionllm::cuda {

#define VISIONLLM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                        __nv_bfloat16, VISIONLLM_SITE) {
  emulation::mma(emulation::Element::bfloat16, d, a, b, {"mma_16x8x16", file, line});
}
inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half,
                        VISIONLLM_SITE) {
  emulation::mma(emulation::Element::float16, d, a, b, {"mma_16x8x16", file, line});
}
inline void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                            VISIONLLM_SITE) {
  emulation::mma(emulation::Element::tf32, d, a, b, {"mma_16x8x8_tf32", file, line});
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row, VISIONLLM_SITE) {
  emulation::load_matrices(r, 4, false, shared_row, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row, VISIONLLM_SITE) {
  emulation::load_matrices(r, 4, true, shared_row, {"ldmatrix_x4_trans", file, line});
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row, VISIONLLM_SITE) {
  emulation::load_matrices(r, 2, false, shared_row, {"ldmatrix_x2", file, line});
}
inline void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* shared_row, VISIONLLM_SITE) {
  emulation::load_matrices(r, 2, true, shared_row, {"ldmatrix_x2_trans", file, line});
}

#undef VISIONLLM_SITE

}  // namespace visionllm::cuda
