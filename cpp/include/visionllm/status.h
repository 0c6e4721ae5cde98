// Outcome of a library call. The library neither throws on bad arguments nor prints nor exits: it returns a
// Status.
#pragma once

#include <string>
#include <utility>

namespace visionllm {

enum class StatusCode {
  ok,
  invalid_argument,  // the caller's tensors do not meet the operator's contract
  unsupported,       // this build or machine has no kernel for what was asked
  cuda_error,  // CUDA refused or failed: no device, a launch that did not start, an error of earlier work
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status invalid_argument(std::string message) {
    return {StatusCode::invalid_argument, std::move(message)};
  }
  static Status unsupported(std::string message) { return {StatusCode::unsupported, std::move(message)}; }
  static Status cuda_error(std::string message) { return {StatusCode::cuda_error, std::move(message)}; }

  bool ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }  // "operator: argument, expected, got"

 private:
  StatusCode code_ = StatusCode::ok;
  std::string message_;
};

}  // namespace visionllm
