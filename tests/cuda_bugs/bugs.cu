#include "device/numeric.cuh"
#include "visionllm/execution.h"
#include "visionllm/tensor.h"

namespace visionllm {
namespace {
__global__ void good_kernel(float* output, const float* input, int n) {
  VISIONLLM_SHARED_ARRAY(float, tile, 64);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? input[i] : 0.0f;
  __syncthreads();
  const float sum = cuda::warp_sum(tile[63 - threadIdx.x]);
  if (i < n) output[i] = tile[threadIdx.x] * 2 + 0 * sum;
}
}  // namespace

Status good(const TensorView& output, const TensorView& input, const Execution& execution) {
  const int n = static_cast<int>(output.size());
  return cuda::launch("good", good_kernel, (n + 63) / 64, 64, 0, static_cast<cudaStream_t>(execution.stream),
                      static_cast<float*>(output.data), static_cast<const float*>(input.data), n);
}
}  // namespace visionllm
