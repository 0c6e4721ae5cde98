// What the binding files share: tensor arguments and errors.
//
// Every operator is bound twice. The function named after the operator takes arrays of any library that
// speaks DLPack (NumPy, CuPy, JAX, torch). The one ending in `_raw` is torch's fast path: each tensor is the
// tuple (data_ptr, dtype, device, shape, strides), which costs a tenth of a DLPack exchange. Neither converts
// or copies: an array that does not fit the operator's contract is an error.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm {

void bind_isa(nanobind::module_& m);
void bind_ms_deform_attn(nanobind::module_& m);

using Output = nanobind::ndarray<>;
using Input = nanobind::ndarray<nanobind::ro>;  // JAX's arrays, and some of NumPy's, are read-only

// How the two kinds of tensor argument read in a signature.
inline constexpr const char* kArrayType = "object";
inline constexpr const char* kRawType = "tuple[int, int, int, tuple[int, ...], tuple[int, ...]]";

// "def name(tensor: type, ..., *, threads: int = 1, stream: int = 0) -> None", for nb::sig.
std::string signature(const std::string& name, const char* type, std::initializer_list<const char*> tensors);

// ValueError for a bad argument, RuntimeError for what this build or machine cannot do.
void throw_if_failed(const Status& status);

// Throw ValueError when the type, device or rank is not one that TensorView knows; `name` is "operator:
// argument".
TensorView view_of(const Output& array, const char* name);
TensorView view_of(const Input& array, const char* name);
TensorView view_of(const nanobind::tuple& raw, const char* name);

}  // namespace visionllm
