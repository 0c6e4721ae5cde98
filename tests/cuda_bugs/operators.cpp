// The functions of bugs.cu and operations.cu that tests/test_cuda_emulation.py calls.
#include "emulation/operators.h"

namespace visionllm {

Status good(const TensorView& output, const TensorView& input, const Execution& execution);

}  // namespace visionllm

VISIONLLM_OPERATOR(good, ">output input")
