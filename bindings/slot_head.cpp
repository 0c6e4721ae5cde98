// Bindings of the slot head; the contract is in visionllm/slot_head.h.
#include "visionllm/slot_head.h"

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {

void bind_slot_head(nb::module_& m) {
  bind_operator<5>(m, "slot_head_predict", &slot_head_predict,
                   {"best", "probability", "logsumexp", "expectation?", "probabilities?", "workspace?",
                    "states", "rows", "valid?", "norm_weight?", "epsilon", "scale", "window", "offset"});
  bind_operator<4>(m, "slot_head_cross_entropy", &slot_head_cross_entropy,
                   {"loss", "logsumexp", "target_logsumexp", "workspace?", "states", "rows", "target",
                    "weight?", "valid?", "norm_weight?", "epsilon", "scale", "sigma"});
  bind_operator<4>(m, "slot_head_cross_entropy_backward", &slot_head_cross_entropy_backward,
                   {"grad_states", "grad_rows", "grad_norm_weight?", "workspace?", "grad_loss", "states",
                    "rows", "target", "weight?", "valid?", "norm_weight?", "logsumexp", "target_logsumexp",
                    "epsilon", "scale", "sigma", "slots_at_once"});
  bind_operator<5>(m, "slot_head_predict_int8", &slot_head_predict_int8,
                   {"best", "probability", "logsumexp", "expectation?", "probabilities?", "states", "rows",
                    "row_scale", "valid?", "norm_weight?", "epsilon", "scale", "window", "offset"});
  bind_operator<3>(m, "slot_head_cross_entropy_int8", &slot_head_cross_entropy_int8,
                   {"loss", "logsumexp", "target_logsumexp", "states", "rows", "row_scale", "target",
                    "weight?", "valid?", "norm_weight?", "epsilon", "scale", "sigma"});
  bind_operator<2>(m, "slot_head_cross_entropy_int8_backward", &slot_head_cross_entropy_int8_backward,
                   {"grad_states", "grad_norm_weight?", "grad_loss", "states", "rows", "row_scale", "target",
                    "weight?", "valid?", "norm_weight?", "logsumexp", "target_logsumexp", "epsilon", "scale",
                    "sigma", "slots_at_once"});
  bind_operator<6>(
      m, "slot_head_cross_entropy_sum", &slot_head_cross_entropy_sum,
      {"loss", "logsumexp", "target_logsumexp", "grad_states", "grad_rows", "grad_norm_weight?", "states",
       "rows", "target", "weight?", "valid?", "norm_weight?", "epsilon", "scale", "sigma", "slots_at_once"});
  m.def(
      "slot_head_workspace_bytes",
      [](int call, std::int64_t B, std::int64_t G, std::int64_t S, std::int64_t C, std::int64_t V,
         std::int64_t element_bytes, bool shared, bool masked, bool normed, std::int64_t window,
         std::int64_t slots_at_once) {
        return slot_head_workspace_bytes(static_cast<SlotHeadCall>(call), B, G, S, C, V, element_bytes,
                                         shared, masked, normed, window, slots_at_once);
      },
      nb::arg("call"), nb::arg("B"), nb::arg("G"), nb::arg("S"), nb::arg("C"), nb::arg("V"),
      nb::arg("element_bytes"), nb::arg("shared"), nb::arg("masked"), nb::arg("normed"), nb::arg("window"),
      nb::arg("slots_at_once"),
      "Bytes of workspace of a call (0: predict, 1: cross-entropy, 2: its backward); see "
      "visionllm/slot_head.h.");
}

}  // namespace visionllm
