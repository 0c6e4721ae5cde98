// How a call runs.
#pragma once

namespace visionllm {

// At most `threads` CPU threads (1: the caller's only), or the CUDA stream to launch on.
struct Execution {
  int threads = 1;
  void* stream = nullptr;  // a cudaStream_t; null is CUDA's default stream
};

}  // namespace visionllm
