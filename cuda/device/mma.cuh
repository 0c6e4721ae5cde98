// Tensor-core products of one warp and the loads of their operands (PTX ISA, "Matrix multiply-accumulate
// instructions"). All 32 lanes call together. With g = lane / 4 and t = lane % 4, a register that holds two
// 16-bit elements has the one with the lower index in its low half:
//
//   16x8x16, 16-bit elements    A is [16, 16] by rows: a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]
//                                                      a[2] = A[g][2t+8, 2t+9]  a[3] = A[g+8][2t+8, 2t+9]
//                               B is [16, 8]:          b[0] = B[2t, 2t+1][g]    b[1] = B[2t+8, 2t+9][g]
//   16x8x8, tf32                A is [16, 8] by rows:  a[0] = A[g][t]  a[1] = A[g+8][t]  a[2] = A[g][t+4]
//                                                      a[3] = A[g+8][t+4]
//                               B is [8, 8]:           b[0] = B[t][g]  b[1] = B[t+4][g]
//   both                        D is [16, 8]:          d[0], d[1] = D[g][2t, 2t+1]
//                                                      d[2], d[3] = D[g+8][2t, 2t+1]
#pragma once

#include "device/platform.cuh"

#ifdef VISIONLLM_EMULATION
#include "emulation/mma.h"
#endif

namespace visionllm::cuda {

// Two 16-bit elements in one register, `low` having the lower index.
template <typename T>
__device__ __forceinline__ std::uint32_t pack2(T low, T high) {
  static_assert(sizeof(T) == 2, "pack2 takes 16-bit elements");
  union Both {
    T elements[2];
    std::uint32_t word;
    __device__ Both() {}
  } both;
  both.elements[0] = low;
  both.elements[1] = high;
  return both.word;
}

#ifndef VISIONLLM_EMULATION

// d += a * b with float32 accumulation; the last argument only names the element type.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for float32 bits of which the tensor core reads the upper 19: it truncates, it does not round.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane i points to row i % 8 of matrix
// i / 8: 8 elements, aligned to 16 bytes. Register j of lane i gets matrix j's row i / 4, elements
// 2 (i % 4) and the next; with _trans it gets the transposed matrix's. _x2 loads two and uses the pointers of
// lanes 0-15 only. Not a barrier: what other lanes wrote needs __syncwarp or __syncthreads in between.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

#endif

}  // namespace visionllm::cuda
