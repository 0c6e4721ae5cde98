// Instruction sets: which are built, which can run here, which is in use.
#include "visionllm/isa.h"

#include <nanobind/stl/string.h>

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {

void bind_isa(nb::module_& m) {
  const auto names = [](const std::vector<Isa>& isas) {
    nb::list list;
    for (const Isa isa : isas) list.append(isa_name(isa));
    return nb::tuple(list);
  };
  m.def("built_isas", [names] { return names(built_isas()); }, "Instruction sets compiled into this build.");
  m.def(
      "available_isas", [names] { return names(available_isas()); },
      "Of those, the ones this machine can run.");
  m.def(
      "active_isa",
      [] {
        Isa isa;
        throw_if_failed(active_isa(&isa));
        return std::string(isa_name(isa));
      },
      "The instruction set in use. RuntimeError when VISIONLLM_ISA asks for one that cannot be used.");
  m.def(
      "set_isa", [](const std::string& name) { throw_if_failed(set_isa(name)); }, nb::arg("name"),
      "Use this instruction set in the whole process from now on; '' returns to the best one.");
}

}  // namespace visionllm
