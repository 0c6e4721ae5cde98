// How the driver calls a public operator: from its C++ signature, and one line in operators.cpp that names its
// tensors.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "emulation/memory.h"
#include "visionllm/execution.h"
#include "visionllm/status.h"
#include "visionllm/tensor.h"

namespace visionllm::emulation {

// The arguments of one call as they came from the test.
struct Arguments {
  std::vector<TensorView> tensors;
  std::vector<std::int64_t> integers;  // every scalar as an integer and as a number
  std::vector<double> numbers;
  const Execution* execution;
};

struct Operator {
  const char* name;
  // One word for each tensor, in order: its name, after '>' for an output, '~' for workspace, '&' for a tensor
  // that is updated in place; an input has no mark.
  const char* tensors;
  int tensor_count, scalar_count;
  Status (*call)(const Arguments& arguments);
};

std::vector<Operator>& operators();

template <typename T>
struct ArgumentReader {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>,
                "operators take TensorViews, numbers and an Execution");
  static T read(const Arguments& all, int&, int& scalar) {
    const int i = scalar++;
    if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(all.numbers[i]);
    } else {
      return static_cast<T>(all.integers[i]);
    }
  }
};
template <>
struct ArgumentReader<TensorView> {
  static const TensorView& read(const Arguments& all, int& tensor, int&) { return all.tensors[tensor++]; }
};
template <>
struct ArgumentReader<Execution> {
  static const Execution& read(const Arguments& all, int&, int&) { return *all.execution; }
};

template <auto Function>
struct Caller;
template <typename... Parameters, Status (*Function)(Parameters...)>
struct Caller<Function> {
  template <typename P>
  using Plain = std::remove_cv_t<std::remove_reference_t<P>>;
  static constexpr int kTensors = ((std::is_same_v<Plain<Parameters>, TensorView> ? 1 : 0) + ... + 0);
  static constexpr int kScalars = static_cast<int>(sizeof...(Parameters)) - kTensors -
                                  ((std::is_same_v<Plain<Parameters>, Execution> ? 1 : 0) + ... + 0);

  // Arguments in braces are evaluated from left to right.
  struct Call {
    Status status;
    Call(Parameters... parameters) : status(Function(static_cast<Parameters>(parameters)...)) {}
  };
  static Status call(const Arguments& all) {
    int tensor = 0, scalar = 0;
    return Call{ArgumentReader<Plain<Parameters>>::read(all, tensor, scalar)...}.status;
  }
};

// `words`: see Operator::tensors. The driver refuses a call when their number is not that of the function's
// tensors.
template <auto Function>
bool add_operator(const char* name, const char* words) {
  using C = Caller<Function>;
  operators().push_back({name, words, C::kTensors, C::kScalars, C::call});
  return true;
}

}  // namespace visionllm::emulation

// One for each public function; overloaded names do not work.
#define VISIONLLM_OPERATOR(function, tensors) \
  static const bool function##_added =        \
      ::visionllm::emulation::add_operator<&::visionllm::function>(#function, tensors);
