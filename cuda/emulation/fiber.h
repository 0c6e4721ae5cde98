// Fibers: functions with stacks of their own that one operating-system thread switches between.
//
// The C library's swapcontext calls the kernel at each switch to save the signal mask; the switch here saves the
// registers that a call preserves and nothing else.
#pragma once

#include <cstddef>
#include <vector>

namespace visionllm::emulation {

// The place where one fiber, or the scheduler, was left.
struct Context {
  void* stack_pointer = nullptr;
  void* stack_bottom = nullptr;  // lowest address; what AddressSanitizer is told at each switch
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Leaves `from` and goes on in `to`; returns when somebody switches back. `from` is never entered again when
// `last` is set.
void switch_context(Context& from, Context& to, bool last = false);

// Stacks with an unmapped page below each, so that overflowing one is a fault and not silent damage.
class FiberStacks {
 public:
  FiberStacks() = default;
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;
  ~FiberStacks();

  // At least `count` stacks.
  void reserve(int count);

  // Sets up stack `i` so that the first switch to the context calls entry(), which never returns.
  void prepare(int i, Context& context, void (*entry)());

  // To be called when fibers were abandoned: AddressSanitizer still guards the frames they left.
  void clear_abandoned();

  // The number of the stack whose guard pages hold the address, or -1: an overflow.
  int overflowed(const void* address) const;

 private:
  std::vector<char*> stacks_;
};

// To be called first in entry(): finishes the switch into the fiber.
void enter_fiber();

// Names the stack that the scheduler itself runs on.
void describe_own_stack(Context& context);

}  // namespace visionllm::emulation
