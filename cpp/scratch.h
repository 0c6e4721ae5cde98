// Memory that a call's threads work in.
#pragma once

#include <cstdint>
#include <new>

namespace visionllm {

// Uninitialised memory, aligned to a cache line; the parts are `bytes` long each.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes, int parts = 1) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ > 0)
      memory_ = ::operator new[](static_cast<std::size_t>(bytes_ * parts), std::align_val_t{64});
  }
  ~Scratch() {
    if (memory_ != nullptr) ::operator delete[](memory_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* part(int i = 0) const {
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<char*>(memory_) + i * bytes_);
  }

 private:
  std::int64_t bytes_;
  void* memory_ = nullptr;
};

}  // namespace visionllm
