// Bindings of lora_linear and its backward; the contract is in visionllm/lora_linear.h.
#include "visionllm/lora_linear.h"

#include "bind.h"

namespace visionllm {

void bind_lora_linear(nanobind::module_& m) {
  namespace nb = nanobind;
  bind_operator<3>(m, "lora_linear", &lora_linear,
                   {"output", "low_rank?", "workspace?", "x", "weight", "weight_scale?", "bias?", "lora_a?",
                    "lora_b?", "scale?", "adapter_index?", "scaling"});
  bind_operator<4>(
      m, "lora_linear_backward", &lora_linear_backward,
      {"grad_x?", "grad_a?", "grad_b?", "workspace?", "grad_output", "x?", "weight", "weight_scale?",
       "lora_a?", "lora_b?", "scale?", "adapter_index?", "low_rank?", "scaling"});
  const auto dtype = [](std::int64_t element_bytes) {
    return element_bytes == 4 ? DType::float32 : DType::float16;
  };
  m.def(
      "lora_linear_workspace_bytes",
      [dtype](std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R, std::int64_t element_bytes) {
        return lora_linear_workspace_bytes(T, K, N, R, dtype(element_bytes));
      },
      nb::arg("T"), nb::arg("K"), nb::arg("N"), nb::arg("R"), nb::arg("element_bytes"),
      "Bytes of workspace that lora_linear needs where x's elements have 2 or 4 bytes.");
  m.def(
      "lora_linear_backward_workspace_bytes",
      [dtype](std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R, std::int64_t element_bytes) {
        return lora_linear_backward_workspace_bytes(T, K, N, R, dtype(element_bytes));
      },
      nb::arg("T"), nb::arg("K"), nb::arg("N"), nb::arg("R"), nb::arg("element_bytes"),
      "Bytes of workspace that lora_linear_backward needs where x's elements have 2 or 4 bytes.");
}

}  // namespace visionllm
