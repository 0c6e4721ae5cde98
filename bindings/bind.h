// What the binding files share: how a C++ operator becomes two Python functions.
//
// The function named after the operator takes arrays of any library that speaks DLPack (NumPy, CuPy, JAX,
// torch). The one ending in `_raw` is torch's fast path: each tensor is the tuple (data_ptr, dtype, device,
// shape, strides), which costs a tenth of a DLPack exchange. Neither converts or copies: an array that does
// not fit the operator's contract is an error. Where the operator allows a tensor to be absent, None stands
// for it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

void bind_cuda_device(nanobind::module_& m);
void bind_isa(nanobind::module_& m);
void bind_ms_deform_attn(nanobind::module_& m);
void bind_lora_linear(nanobind::module_& m);
void bind_fusion_attention(nanobind::module_& m);
void bind_query_attention(nanobind::module_& m);
void bind_slot_head(nanobind::module_& m);

// ValueError for a bad argument, RuntimeError for what this build or machine cannot do.
void throw_if_failed(const Status& status);

namespace binding {

namespace nb = nanobind;

using Output = nb::ndarray<>;
using Input = nb::ndarray<nb::ro>;  // JAX's arrays, and some of NumPy's, are read-only

// An argument as an operator's binding lists it: "bias?" is optional.
struct Argument {
  std::string name;
  bool optional;
};

// Throw ValueError when the type, device or rank is not one that TensorView knows. None gives an absent tensor,
// or TypeError where the argument is not optional.
TensorView view_of(const Output& array, const char* op, const Argument& argument);
TensorView view_of(const Input& array, const char* op, const Argument& argument);
TensorView view_of(const nb::object& raw, const char* op, const Argument& argument);

inline std::int64_t view_of(std::int64_t value, const char*, const Argument&) { return value; }
inline double view_of(double value, const char*, const Argument&) { return value; }
inline bool view_of(bool value, const char*, const Argument&) { return value; }

enum class Way { dlpack, raw };

template <typename T>
inline constexpr bool is_tensor = std::is_same_v<std::decay_t<T>, TensorView>;

// Where kernels are built, a CUDA tensor needs a GPU that they fit; the operator's name begins the message.
Status check_gpu(const char* op);

inline bool on_gpu(const TensorView& tensor) { return !tensor.absent() && tensor.device == Device::cuda; }
template <typename T>
bool on_gpu(const T&) {
  return false;
}

// What Python passes for the C++ parameter T: every integer type is an int64, every floating type a double.
template <typename T, bool output, Way way>
using PythonType = std::conditional_t<
    is_tensor<T>, std::conditional_t<way == Way::raw, nb::object, std::conditional_t<output, Output, Input>>,
    std::conditional_t<std::is_same_v<std::decay_t<T>, bool>, bool,
                       std::conditional_t<std::is_floating_point_v<std::decay_t<T>>, double, std::int64_t>>>;

// What the C++ function receives from it.
template <typename T>
using ViewType = std::conditional_t<is_tensor<T>, TensorView, std::decay_t<T>>;

template <typename T>
const char* scalar_type_name() {
  using D = std::decay_t<T>;
  static_assert(std::is_arithmetic_v<D>, "operators take tensors, numbers and bool");
  return std::is_same_v<D, bool> ? "bool" : std::is_floating_point_v<D> ? "float" : "int";
}

// "def name(tensor: type, ..., number: int, *, threads: int = 1, stream: int = 0) -> None", for nb::sig.
// `types` has null for tensors.
std::string signature(const std::string& name, Way way, const std::vector<Argument>& arguments,
                      const std::vector<const char*>& types);

// None gets as far as view_of, which knows whether the argument is optional.
template <typename T>
auto python_argument(const Argument& argument) {
  if constexpr (is_tensor<T>) {
    return nb::arg(argument.name.c_str()).noconvert().none();
  } else {
    return nb::arg(argument.name.c_str());
  }
}

template <int outputs, Way way, typename... A, std::size_t... I>
void define(nb::module_& m, const char* name, Status (*function)(A...),
            const std::vector<Argument>& arguments, const char* doc, std::index_sequence<I...>) {
  using Parameters = std::tuple<A...>;
  const std::string python_name = std::string(name) + (way == Way::raw ? "_raw" : "");
  const std::vector<const char*> types = {
      (is_tensor<std::tuple_element_t<I, Parameters>>
           ? nullptr
           : scalar_type_name<std::conditional_t<is_tensor<std::tuple_element_t<I, Parameters>>, int,
                                                 std::tuple_element_t<I, Parameters>>>())...};
  const std::string text = signature(python_name, way, arguments, types);
  m.def(
      python_name.c_str(),
      [function, name, arguments](const PythonType<std::tuple_element_t<I, Parameters>,
                                                   (static_cast<int>(I) < outputs), way>&... values,
                                  int threads, std::uintptr_t stream) {
        const std::tuple<ViewType<std::tuple_element_t<I, Parameters>>...> views{
            static_cast<ViewType<std::tuple_element_t<I, Parameters>>>(
                view_of(values, name, arguments[I]))...};
        if ((on_gpu(std::get<I>(views)) || ...)) throw_if_failed(check_gpu(name));
        const Execution execution{threads, reinterpret_cast<void*>(stream)};
        Status status;
        {
          const nb::gil_scoped_release release;
          status = function(std::get<I>(views)..., execution);
        }
        throw_if_failed(status);
      },
      nb::sig(text.c_str()), python_argument<std::tuple_element_t<I, Parameters>>(arguments[I])...,
      nb::kw_only(), nb::arg("threads") = 1, nb::arg("stream") = 0, doc);
}

}  // namespace binding

// Binds `Status function(tensors and numbers..., const Execution&)` as `name` and `name_raw`. The first
// `outputs` parameters are tensors that are written to. `names` are those of all parameters but the last;
// tensors whose name ends in '?' may be None. Extra keyword arguments of both: threads, stream.
//
//   bind_operator<1>(m, "lora_linear", &lora_linear, {"output", "x", "weight", "bias?", "scaling"});
template <int outputs, std::size_t count, typename... A>
void bind_operator(nanobind::module_& m, const char* name, Status (*function)(A...),
                   const char* const (&names)[count]) {
  static_assert(count + 1 == sizeof...(A), "one name for each parameter but the Execution");
  static_assert(std::is_same_v<std::tuple_element_t<count, std::tuple<A...>>, const Execution&>,
                "the last parameter is const Execution&");
  std::vector<binding::Argument> arguments;
  for (std::string text : names) {
    const bool optional = text.back() == '?';
    if (optional) text.pop_back();
    arguments.push_back({std::move(text), optional});
  }
  const auto indices = std::make_index_sequence<count>{};
  binding::define<outputs, binding::Way::dlpack>(
      m, name, function, arguments,
      "Writes into the given output arrays; every array by DLPack. The contract is in the operator's header.",
      indices);
  binding::define<outputs, binding::Way::raw>(
      m, name, function, arguments,
      "The same for tensors given as (data_ptr, dtype, device, shape, strides).", indices);
}

}  // namespace visionllm
