// VISIONLLM_FOR_EVERY_ISA(declarations): the same declarations in the namespace of each instruction set.
#pragma once

#define VISIONLLM_FOR_EVERY_ISA(...) \
  namespace scalar {                 \
  __VA_ARGS__                        \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512_bf16 {            \
  __VA_ARGS__                        \
  }                                  \
  namespace neon {                   \
  __VA_ARGS__                        \
  }
