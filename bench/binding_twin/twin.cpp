// ms_deform_attn bound with pybind11, for bench/binding_cost.py: the same arguments and the same C++ function as
// bindings/ms_deform_attn.cpp, whose checks of each number it leaves out.
#include <pybind11/pybind11.h>

#include "visionllm/execution.h"
#include "visionllm/ms_deform_attn.h"

namespace py = pybind11;

namespace {

// (data_ptr, dtype, device, shape, strides)
visionllm::TensorView view_of(const py::tuple& raw) {
  visionllm::TensorView view;
  view.data = reinterpret_cast<void*>(raw[0].cast<std::uintptr_t>());
  view.dtype = static_cast<visionllm::DType>(raw[1].cast<int>());
  view.device = static_cast<visionllm::Device>(raw[2].cast<int>());
  const py::tuple shape = raw[3], strides = raw[4];
  view.rank = static_cast<int>(shape.size());
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = shape[i].cast<std::int64_t>();
    view.strides[i] = strides[i].cast<std::int64_t>();
  }
  return view;
}

void ms_deform_attn(const py::tuple& output, const py::tuple& value, const py::tuple& shapes,
                    const py::tuple& starts, const py::tuple& locations, const py::tuple& weights,
                    int threads) {
  visionllm::Status status;
  const visionllm::TensorView views[] = {view_of(output), view_of(value),     view_of(shapes),
                                         view_of(starts), view_of(locations), view_of(weights)};
  {
    const py::gil_scoped_release release;
    status = visionllm::ms_deform_attn(views[0], views[1], views[2], views[3], views[4], views[5],
                                       visionllm::Execution{threads, nullptr});
  }
  if (!status.ok()) throw py::value_error(status.message());
}

}  // namespace

PYBIND11_MODULE(twin, m) { m.def("ms_deform_attn", &ms_deform_attn); }
