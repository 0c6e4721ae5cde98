// Detection and choice of the CPU instruction set.
#include "visionllm/isa.h"

#include <cstdlib>
#include <mutex>

namespace visionllm {
namespace {

std::mutex mutex;
Status choice_status;  // outcome of the last choice
Isa choice = Isa::scalar;
bool chosen = false;

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             machine_has(Isa::avx2);
    case Isa::avx512_bf16: return __builtin_cpu_supports("avx512bf16") && machine_has(Isa::avx512);
#elif defined(__aarch64__)
    case Isa::neon: return true;
#endif
    default: return false;
  }
}

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (const Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Status choose(const std::string& name, const std::string& source) {
  if (name.empty()) {
    choice = available_isas().back();
    return {};
  }
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) {
      choice = isa;
      return {};
    }
  }
  bool built = false;
  for (const Isa isa : built_isas()) built = built || name == isa_name(isa);
  return Status::unsupported(source + " asks for instruction set '" + name + "', which " +
                             (built ? "this machine lacks" : "this build does not have") +
                             "; it can use: " + names(available_isas()));
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

std::vector<Isa> built_isas() {
  return {
      Isa::scalar,
#ifdef VISIONLLM_HAVE_AVX2
      Isa::avx2,
#endif
#ifdef VISIONLLM_HAVE_AVX512
      Isa::avx512,
#endif
#ifdef VISIONLLM_HAVE_AVX512_BF16
      Isa::avx512_bf16,
#endif
#ifdef VISIONLLM_HAVE_NEON
      Isa::neon,
#endif
  };
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : built_isas()) {
    if (machine_has(isa)) isas.push_back(isa);
  }
  return isas;
}

Status active_isa(Isa* isa) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!chosen) {
    const char* environment = std::getenv("VISIONLLM_ISA");
    choice_status = choose(environment == nullptr ? "" : environment, "VISIONLLM_ISA");
    chosen = true;
  }
  *isa = choice;
  return choice_status;
}

Status set_isa(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Isa before = choice;
  const Status status = choose(name, "set_isa");
  if (!status.ok()) {
    choice = before;  // a refused request changes nothing
    return status;
  }
  choice_status = status;
  chosen = true;
  return status;
}

}  // namespace visionllm
