// Bindings of ms_deform_attn and its backward; the contract is in visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {
namespace {

// Out and In are Output and Input (DLPack), or both nb::tuple (torch's fast path).
template <typename Out, typename In>
void forward(const Out& output, const In& value, const In& spatial_shapes, const In& level_start_index,
             const In& sampling_locations, const In& attention_weights, int threads, std::uintptr_t stream) {
  const TensorView views[] = {view_of(output, "ms_deform_attn: output"),
                              view_of(value, "ms_deform_attn: value"),
                              view_of(spatial_shapes, "ms_deform_attn: spatial_shapes"),
                              view_of(level_start_index, "ms_deform_attn: level_start_index"),
                              view_of(sampling_locations, "ms_deform_attn: sampling_locations"),
                              view_of(attention_weights, "ms_deform_attn: attention_weights")};
  const Execution execution{threads, reinterpret_cast<void*>(stream)};
  Status status;
  {
    const nb::gil_scoped_release release;
    status = ms_deform_attn(views[0], views[1], views[2], views[3], views[4], views[5], execution);
  }
  throw_if_failed(status);
}

template <typename Out, typename In>
void backward(const Out& grad_value, const Out& grad_sampling_locations, const Out& grad_attention_weights,
              const In& grad_output, const In& value, const In& spatial_shapes, const In& level_start_index,
              const In& sampling_locations, const In& attention_weights, int threads, std::uintptr_t stream) {
  const TensorView views[] = {
      view_of(grad_value, "ms_deform_attn_backward: grad_value"),
      view_of(grad_sampling_locations, "ms_deform_attn_backward: grad_sampling_locations"),
      view_of(grad_attention_weights, "ms_deform_attn_backward: grad_attention_weights"),
      view_of(grad_output, "ms_deform_attn_backward: grad_output"),
      view_of(value, "ms_deform_attn_backward: value"),
      view_of(spatial_shapes, "ms_deform_attn_backward: spatial_shapes"),
      view_of(level_start_index, "ms_deform_attn_backward: level_start_index"),
      view_of(sampling_locations, "ms_deform_attn_backward: sampling_locations"),
      view_of(attention_weights, "ms_deform_attn_backward: attention_weights")};
  const Execution execution{threads, reinterpret_cast<void*>(stream)};
  Status status;
  {
    const nb::gil_scoped_release release;
    status = ms_deform_attn_backward(views[0], views[1], views[2], views[3], views[4], views[5], views[6],
                                     views[7], views[8], execution);
  }
  throw_if_failed(status);
}

template <typename Out, typename In>
void bind(nb::module_& m, const std::string& suffix, const char* type, const char* doc) {
  const std::string forward_signature = signature(
      "ms_deform_attn" + suffix, type,
      {"output", "value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"});
  m.def(("ms_deform_attn" + suffix).c_str(), &forward<Out, In>, nb::sig(forward_signature.c_str()),
        nb::arg("output").noconvert(), nb::arg("value").noconvert(), nb::arg("spatial_shapes").noconvert(),
        nb::arg("level_start_index").noconvert(), nb::arg("sampling_locations").noconvert(),
        nb::arg("attention_weights").noconvert(), nb::kw_only(), nb::arg("threads") = 1,
        nb::arg("stream") = 0, doc);
  const std::string backward_signature =
      signature("ms_deform_attn_backward" + suffix, type,
                {"grad_value", "grad_sampling_locations", "grad_attention_weights", "grad_output", "value",
                 "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"});
  m.def(("ms_deform_attn_backward" + suffix).c_str(), &backward<Out, In>, nb::sig(backward_signature.c_str()),
        nb::arg("grad_value").noconvert(), nb::arg("grad_sampling_locations").noconvert(),
        nb::arg("grad_attention_weights").noconvert(), nb::arg("grad_output").noconvert(),
        nb::arg("value").noconvert(), nb::arg("spatial_shapes").noconvert(),
        nb::arg("level_start_index").noconvert(), nb::arg("sampling_locations").noconvert(),
        nb::arg("attention_weights").noconvert(), nb::kw_only(), nb::arg("threads") = 1,
        nb::arg("stream") = 0, doc);
}

}  // namespace

void bind_ms_deform_attn(nb::module_& m) {
  bind<Output, Input>(
      m, "", kArrayType,
      "Writes into the given output arrays; every array by DLPack. See visionllm/ms_deform_attn.h.");
  bind<nb::tuple, nb::tuple>(m, "_raw", kRawType,
                             "The same for tensors given as (data_ptr, dtype, device, shape, strides).");
}

}  // namespace visionllm
