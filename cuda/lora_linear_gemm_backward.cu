// dx = dy W + ds A of lora_linear by tensor cores: lora_linear_gemm.cuh, transposed.
#include "lora_linear_gemm.cuh"

namespace visionllm::cuda {

Status lora_gemm_transposed(const ProductParams& p, void* stream) { return launch_gemm<true>(p, stream); }

}  // namespace visionllm::cuda
