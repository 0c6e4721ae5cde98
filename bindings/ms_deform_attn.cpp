// Bindings of ms_deform_attn and its backward; the contract is in visionllm/ms_deform_attn.h.
#include "visionllm/ms_deform_attn.h"

#include "bind.h"

namespace nb = nanobind;

namespace visionllm {
namespace {

// T is Array (DLPack) or nb::tuple (torch's fast path).
template <typename T>
void forward(const T& output, const T& value, const T& spatial_shapes, const T& level_start_index,
             const T& sampling_locations, const T& attention_weights, int threads, std::uintptr_t stream) {
  const TensorView views[] = {view_of(output, "output"),
                              view_of(value, "value"),
                              view_of(spatial_shapes, "spatial_shapes"),
                              view_of(level_start_index, "level_start_index"),
                              view_of(sampling_locations, "sampling_locations"),
                              view_of(attention_weights, "attention_weights")};
  const Execution execution{threads, reinterpret_cast<void*>(stream)};
  Status status;
  {
    const nb::gil_scoped_release release;
    status = ms_deform_attn(views[0], views[1], views[2], views[3], views[4], views[5], execution);
  }
  throw_if_failed(status);
}

template <typename T>
void backward(const T& grad_value, const T& grad_sampling_locations, const T& grad_attention_weights,
              const T& grad_output, const T& value, const T& spatial_shapes, const T& level_start_index,
              const T& sampling_locations, const T& attention_weights, int threads, std::uintptr_t stream) {
  const TensorView views[] = {view_of(grad_value, "grad_value"),
                              view_of(grad_sampling_locations, "grad_sampling_locations"),
                              view_of(grad_attention_weights, "grad_attention_weights"),
                              view_of(grad_output, "grad_output"),
                              view_of(value, "value"),
                              view_of(spatial_shapes, "spatial_shapes"),
                              view_of(level_start_index, "level_start_index"),
                              view_of(sampling_locations, "sampling_locations"),
                              view_of(attention_weights, "attention_weights")};
  const Execution execution{threads, reinterpret_cast<void*>(stream)};
  Status status;
  {
    const nb::gil_scoped_release release;
    status = ms_deform_attn_backward(views[0], views[1], views[2], views[3], views[4], views[5], views[6],
                                     views[7], views[8], execution);
  }
  throw_if_failed(status);
}

template <typename T>
void bind(nb::module_& m, const char* forward_name, const char* backward_name, const char* doc) {
  m.def(forward_name, &forward<T>, nb::arg("output").noconvert(), nb::arg("value").noconvert(),
        nb::arg("spatial_shapes").noconvert(), nb::arg("level_start_index").noconvert(),
        nb::arg("sampling_locations").noconvert(), nb::arg("attention_weights").noconvert(), nb::kw_only(),
        nb::arg("threads") = 1, nb::arg("stream") = 0, doc);
  m.def(backward_name, &backward<T>, nb::arg("grad_value").noconvert(),
        nb::arg("grad_sampling_locations").noconvert(), nb::arg("grad_attention_weights").noconvert(),
        nb::arg("grad_output").noconvert(), nb::arg("value").noconvert(),
        nb::arg("spatial_shapes").noconvert(), nb::arg("level_start_index").noconvert(),
        nb::arg("sampling_locations").noconvert(), nb::arg("attention_weights").noconvert(), nb::kw_only(),
        nb::arg("threads") = 1, nb::arg("stream") = 0, doc);
}

}  // namespace

void bind_ms_deform_attn(nb::module_& m) {
  bind<Array>(m, "ms_deform_attn", "ms_deform_attn_backward",
              "Writes into the given output arrays; every array by DLPack. See visionllm/ms_deform_attn.h.");
  bind<nb::tuple>(m, "ms_deform_attn_raw", "ms_deform_attn_backward_raw",
                  "The same for tensors given as (data_ptr, dtype, device, shape, strides).");
}

}  // namespace visionllm
