#include "bind.h"

#include <stdexcept>

namespace nb = nanobind;

namespace visionllm {
namespace {

[[noreturn]] void bad(const char* name, const std::string& what) {
  throw nb::value_error((std::string(name) + " " + what).c_str());
}

std::int64_t item(PyObject* tuple, Py_ssize_t i) {
  const std::int64_t n = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
  if (n == -1 && PyErr_Occurred()) throw nb::python_error();
  return n;
}

template <typename T>
TensorView view_of_array(const T& array, const char* name) {
  TensorView view;
  view.data = const_cast<void*>(static_cast<const void*>(array.data()));  // the core writes to outputs only
  view.rank = static_cast<int>(array.ndim());
  if (view.rank > kMaxRank) bad(name, "must have at most 8 dimensions, got " + std::to_string(view.rank));
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = static_cast<std::int64_t>(array.shape(i));
    view.strides[i] = array.stride(i);
  }
  const nb::dlpack::dtype dtype = array.dtype();
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  if (code == nb::dlpack::dtype_code::Float && dtype.bits == 32 && dtype.lanes == 1) {
    view.dtype = DType::float32;
  } else if (code == nb::dlpack::dtype_code::Float && dtype.bits == 16 && dtype.lanes == 1) {
    view.dtype = DType::float16;
  } else if (code == nb::dlpack::dtype_code::Bfloat && dtype.bits == 16 && dtype.lanes == 1) {
    view.dtype = DType::bfloat16;
  } else if (code == nb::dlpack::dtype_code::Int && dtype.bits == 64 && dtype.lanes == 1) {
    view.dtype = DType::int64;
  } else {
    bad(name, "must be float32, bfloat16, float16 or int64, got DLPack type code " +
                  std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits");
  }
  switch (array.device_type()) {
    case nb::device::cpu::value: view.device = Device::cpu; break;
    case nb::device::cuda::value: view.device = Device::cuda; break;
    default:
      bad(name, "must be in CPU or CUDA memory, got DLPack device " + std::to_string(array.device_type()));
  }
  return view;
}

}  // namespace

std::string signature(const std::string& name, const char* type, std::initializer_list<const char*> tensors) {
  std::string text = "def " + name + "(";
  for (const char* const tensor : tensors) text += std::string(tensor) + ": " + type + ", ";
  return text + "*, threads: int = 1, stream: int = 0) -> None";
}

void throw_if_failed(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::invalid_argument) throw nb::value_error(status.message().c_str());
  throw std::runtime_error(status.message());
}

TensorView view_of(const Output& array, const char* name) { return view_of_array(array, name); }
TensorView view_of(const Input& array, const char* name) { return view_of_array(array, name); }

TensorView view_of(const nb::tuple& raw, const char* name) {
  PyObject* const fields = raw.ptr();
  if (PyTuple_GET_SIZE(fields) != 5) bad(name, "must be (data_ptr, dtype, device, shape, strides)");
  PyObject* const shape = PyTuple_GET_ITEM(fields, 3);
  PyObject* const strides = PyTuple_GET_ITEM(fields, 4);
  if (!PyTuple_Check(shape) || !PyTuple_Check(strides) ||
      PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides)) {
    bad(name, "must have a shape and strides of the same length");
  }
  TensorView view;
  view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
  if (view.data == nullptr && PyErr_Occurred()) throw nb::python_error();
  const std::int64_t dtype = item(fields, 1), device = item(fields, 2);
  if (dtype < 0 || dtype > 3) bad(name, "has unknown dtype number " + std::to_string(dtype));
  if (device < 0 || device > 1) bad(name, "has unknown device number " + std::to_string(device));
  view.dtype = static_cast<DType>(dtype);
  view.device = static_cast<Device>(device);
  if (PyTuple_GET_SIZE(shape) > kMaxRank) bad(name, "must have at most 8 dimensions");
  view.rank = static_cast<int>(PyTuple_GET_SIZE(shape));
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = item(shape, i);
    view.strides[i] = item(strides, i);
  }
  return view;
}

}  // namespace visionllm
