// Which instruction set's kernel runs.
//
//   Isa isa;
//   VISIONLLM_RETURN_IF_BAD(active_isa(&isa));
//   const cpu::SomeKernel kernel = VISIONLLM_KERNEL(isa, some_kernel);   // cpu::scalar::some_kernel, cpu::avx2::...
//
// Kernels that this build lacks are not named, so nothing has to define them.
#pragma once

#include "visionllm/isa.h"

#ifdef VISIONLLM_HAVE_AVX2
#define VISIONLLM_KERNEL_AVX2(isa, name) (isa) == ::visionllm::Isa::avx2 ? &::visionllm::cpu::avx2::name:
#else
#define VISIONLLM_KERNEL_AVX2(isa, name)
#endif
#ifdef VISIONLLM_HAVE_AVX512
#define VISIONLLM_KERNEL_AVX512(isa, name) \
  (isa) == ::visionllm::Isa::avx512 ? &::visionllm::cpu::avx512::name:
#else
#define VISIONLLM_KERNEL_AVX512(isa, name)
#endif
#ifdef VISIONLLM_HAVE_AVX512_BF16
#define VISIONLLM_KERNEL_AVX512_BF16(isa, name) \
  (isa) == ::visionllm::Isa::avx512_bf16 ? &::visionllm::cpu::avx512_bf16::name:
#else
#define VISIONLLM_KERNEL_AVX512_BF16(isa, name)
#endif
#ifdef VISIONLLM_HAVE_NEON
#define VISIONLLM_KERNEL_NEON(isa, name) (isa) == ::visionllm::Isa::neon ? &::visionllm::cpu::neon::name:
#else
#define VISIONLLM_KERNEL_NEON(isa, name)
#endif

#define VISIONLLM_KERNEL(isa, name)                                          \
  (VISIONLLM_KERNEL_NEON(isa, name) VISIONLLM_KERNEL_AVX512_BF16(isa, name)  \
       VISIONLLM_KERNEL_AVX512(isa, name) VISIONLLM_KERNEL_AVX2(isa, name) & \
   ::visionllm::cpu::scalar::name)
