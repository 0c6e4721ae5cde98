#include "emulation/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define VISIONLLM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VISIONLLM_ASAN 1
#endif
#endif

#ifdef VISIONLLM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// VISIONLLM_EMULATION_UCONTEXT chooses the portable switch on these machines too.
#if defined(__x86_64__) && !defined(VISIONLLM_EMULATION_UCONTEXT)
#define VISIONLLM_SWITCH_X86_64 1
#elif defined(__aarch64__) && !defined(VISIONLLM_EMULATION_UCONTEXT)
#define VISIONLLM_SWITCH_AARCH64 1
#else
#include <ucontext.h>
#endif

namespace visionllm::emulation {
namespace {

constexpr std::size_t kGuardBytes = 64 * 1024;  // a multiple of every page size in use
#ifdef VISIONLLM_ASAN
constexpr std::size_t kStackBytes = 512 * 1024;  // its red zones make frames several times as large
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif

}  // namespace

#if defined(VISIONLLM_SWITCH_X86_64)

// void visionllm_switch(void** save_stack_pointer, void* stack_pointer): System V, so rdi and rsi.
asm(R"(
.text
.globl visionllm_switch
.type visionllm_switch, @function
visionllm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size visionllm_switch, .-visionllm_switch
)");
extern "C" void visionllm_switch(void** save, void* to);

static void* initial_stack(char* top, void (*entry)()) {
  auto* words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // entry() finds the stack as after a call: 8 bytes off 16-byte alignment
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  return words;
}

#elif defined(VISIONLLM_SWITCH_AARCH64)

asm(R"(
.text
.globl visionllm_switch
.type visionllm_switch, %function
visionllm_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size visionllm_switch, .-visionllm_switch
)");
extern "C" void visionllm_switch(void** save, void* to);

static void* initial_stack(char* top, void (*entry)()) {
  auto* words = reinterpret_cast<void**>(top - 160);
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(entry);  // x30, where ret goes
  return words;
}

#else

// Slow but everywhere: the context lies at the top of the stack it describes.
static ucontext_t* scheduler_context() {
  static ucontext_t context;
  return &context;
}

static void visionllm_switch(void** save, void* to) {
  if (*save == nullptr) *save = scheduler_context();
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(to));
}

static void* initial_stack(char* top, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = top - kStackBytes;
  context->uc_stack.ss_size =
      static_cast<std::size_t>(reinterpret_cast<char*>(context) - (top - kStackBytes));
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

void switch_context(Context& from, Context& to, bool last) {
#ifdef VISIONLLM_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
  visionllm_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  (void)last;
  visionllm_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

void enter_fiber() {
#ifdef VISIONLLM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void describe_own_stack(Context& context) {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
  pthread_attr_getstack(&attributes, &context.stack_bottom, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
}

FiberStacks::~FiberStacks() {
  for (char* const stack : stacks_) munmap(stack, kGuardBytes + kStackBytes);
}

void FiberStacks::reserve(int count) {
  while (static_cast<int>(stacks_.size()) < count) {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("emulation: no memory for the stacks of CUDA threads");
      std::abort();
    }
    stacks_.push_back(static_cast<char*>(memory));
  }
}

void FiberStacks::prepare(int i, Context& context, void (*entry)()) {
  char* const bottom = stacks_[i] + kGuardBytes;
  context = Context{};
  context.stack_bottom = bottom;
  context.stack_bytes = kStackBytes;
  context.stack_pointer = initial_stack(bottom + kStackBytes, entry);
}

void FiberStacks::clear_abandoned() {
#ifdef VISIONLLM_ASAN
  for (char* const stack : stacks_) __asan_unpoison_memory_region(stack + kGuardBytes, kStackBytes);
#endif
}

int FiberStacks::overflowed(const void* address) const {
  const char* const p = static_cast<const char*>(address);
  for (int i = 0; i < static_cast<int>(stacks_.size()); ++i) {
    if (p >= stacks_[i] && p < stacks_[i] + kGuardBytes) return i;
  }
  return -1;
}

}  // namespace visionllm::emulation
