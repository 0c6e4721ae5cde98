#include "bind.h"

#include <stdexcept>

#include "visionllm/cuda_device.h"

namespace visionllm {

void throw_if_failed(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::invalid_argument) throw nanobind::value_error(status.message().c_str());
  throw std::runtime_error(status.message());
}

namespace binding {
namespace {

[[noreturn]] void bad(const char* op, const Argument& argument, const std::string& what) {
  throw nb::value_error((std::string(op) + ": " + argument.name + " " + what).c_str());
}

[[noreturn]] void wrong_type(const char* op, const Argument& argument, const char* expected) {
  throw nb::type_error((std::string(op) + ": " + argument.name + " must be " + expected).c_str());
}

std::int64_t item(PyObject* tuple, Py_ssize_t i) {
  const std::int64_t n = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
  if (n == -1 && PyErr_Occurred()) throw nb::python_error();
  return n;
}

DType dtype_of(const nb::dlpack::dtype& dtype, bool* known) {
  using nb::dlpack::dtype_code;
  const struct {
    dtype_code code;
    int bits;
    DType dtype;
  } table[] = {
      {dtype_code::Float, 32, DType::float32}, {dtype_code::Bfloat, 16, DType::bfloat16},
      {dtype_code::Float, 16, DType::float16}, {dtype_code::Int, 64, DType::int64},
      {dtype_code::Int, 32, DType::int32},     {dtype_code::Int, 8, DType::int8},
      {dtype_code::UInt, 8, DType::uint8},     {dtype_code::Bool, 8, DType::uint8},
  };
  for (const auto& row : table) {
    if (dtype.code == static_cast<std::uint8_t>(row.code) && dtype.bits == row.bits && dtype.lanes == 1) {
      *known = true;
      return row.dtype;
    }
  }
  *known = false;
  return DType::float32;
}

template <typename T>
TensorView view_of_array(const T& array, const char* op, const Argument& argument) {
  TensorView view;
  if (!array.is_valid()) {  // None
    if (!argument.optional) wrong_type(op, argument, "an array");
    return view;
  }
  view.data = const_cast<void*>(static_cast<const void*>(array.data()));  // the core writes to outputs only
  view.rank = static_cast<int>(array.ndim());
  if (view.rank > kMaxRank) {
    bad(op, argument, "must have at most 8 dimensions, got " + std::to_string(view.rank));
  }
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = static_cast<std::int64_t>(array.shape(i));
    view.strides[i] = array.stride(i);
  }
  const nb::dlpack::dtype dtype = array.dtype();
  bool known;
  view.dtype = dtype_of(dtype, &known);
  if (!known) {
    bad(op, argument,
        "must be float32, bfloat16, float16, int64, int32, int8, uint8 or boolean, got DLPack type code " +
            std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits");
  }
  switch (array.device_type()) {
    case nb::device::cpu::value: view.device = Device::cpu; break;
    case nb::device::cuda::value: view.device = Device::cuda; break;
    default:
      bad(op, argument,
          "must be in CPU or CUDA memory, got DLPack device " + std::to_string(array.device_type()));
  }
  return view;
}

}  // namespace

Status check_gpu(const char* op) {
  if (built_cuda_architectures().empty()) return {};  // the operator itself says what to build
  const Status status = cuda_device_status();
  if (status.ok()) return {};
  return {status.code(), std::string(op) + ": " + status.message()};
}

std::string signature(const std::string& name, Way way, const std::vector<Argument>& arguments,
                      const std::vector<const char*>& types) {
  const std::string tensor =
      way == Way::dlpack ? "object" : "tuple[int, int, int, tuple[int, ...], tuple[int, ...]]";
  std::string text = "def " + name + "(";
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    text += arguments[i].name + ": " + (types[i] == nullptr ? tensor : types[i]);
    text += arguments[i].optional ? " | None, " : ", ";
  }
  return text + "*, threads: int = 1, stream: int = 0) -> None";
}

TensorView view_of(const Output& array, const char* op, const Argument& argument) {
  return view_of_array(array, op, argument);
}

TensorView view_of(const Input& array, const char* op, const Argument& argument) {
  return view_of_array(array, op, argument);
}

TensorView view_of(const nb::object& raw, const char* op, const Argument& argument) {
  PyObject* const fields = raw.ptr();
  if (argument.optional && fields == Py_None) return {};
  if (!PyTuple_Check(fields)) {
    wrong_type(op, argument, "a tuple");
  }
  if (PyTuple_GET_SIZE(fields) != 5) bad(op, argument, "must be (data_ptr, dtype, device, shape, strides)");
  PyObject* const shape = PyTuple_GET_ITEM(fields, 3);
  PyObject* const strides = PyTuple_GET_ITEM(fields, 4);
  if (!PyTuple_Check(shape) || !PyTuple_Check(strides) ||
      PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides)) {
    bad(op, argument, "must have a shape and strides of the same length");
  }
  TensorView view;
  view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
  if (view.data == nullptr && PyErr_Occurred()) throw nb::python_error();
  const std::int64_t dtype = item(fields, 1), device = item(fields, 2);
  if (dtype < 0 || dtype >= kDTypes) bad(op, argument, "has unknown dtype number " + std::to_string(dtype));
  if (device < 0 || device > 1) bad(op, argument, "has unknown device number " + std::to_string(device));
  view.dtype = static_cast<DType>(dtype);
  view.device = static_cast<Device>(device);
  if (PyTuple_GET_SIZE(shape) > kMaxRank) bad(op, argument, "must have at most 8 dimensions");
  view.rank = static_cast<int>(PyTuple_GET_SIZE(shape));
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = item(shape, i);
    view.strides[i] = item(strides, i);
  }
  return view;
}

}  // namespace binding
}  // namespace visionllm
