// Which instruction set the CPU kernels use. Every kernel is compiled once per instruction set; the best one
// that the machine has is chosen at the first use. The environment variable
// VISIONLLM_ISA=scalar|avx2|avx512|avx512_bf16|neon forces one.
#pragma once

#include <string>
#include <vector>

#include "visionllm/status.h"

namespace visionllm {

enum class Isa { scalar, avx2, avx512, avx512_bf16, neon };

const char* isa_name(Isa isa);
std::vector<Isa> built_isas();      // compiled into this library, slowest first
std::vector<Isa> available_isas();  // of those, what this machine can run

// The instruction set in use. Fails when VISIONLLM_ISA names one that is unknown, not built or not on this
// machine.
Status active_isa(Isa* isa);

// Overrides the choice for the whole process from now on; "" returns to the automatic choice. Not for use
// while kernels run.
Status set_isa(const std::string& name);

}  // namespace visionllm
