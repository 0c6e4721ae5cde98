// y = x W^T + bias + s B^T of lora_linear by tensor cores: lora_linear_gemm.cuh, not transposed.
#include "lora_linear_gemm.cuh"

namespace visionllm::cuda {

Status lora_gemm(const ProductParams& p, void* stream) { return launch_gemm<false>(p, stream); }

}  // namespace visionllm::cuda
