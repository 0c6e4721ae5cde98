// Runs kernels: one fiber for each CUDA thread, block after block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulation/types.h"

namespace visionllm::emulation {

enum class Order : std::uint32_t { seeded = 0, forward = 1, reversed = 2 };

struct Options {
  std::uint64_t seed = 0;
  Order block_order = Order::seeded;   // in which the blocks of a launch run
  Order thread_order = Order::seeded;  // in which the threads of a block run between barriers; seeded: drawn
                                       // anew each time
  int max_shared_bytes = 101376;       // of one block: what sm_89 and sm_120 have
  int multiprocessors = 4;
};

// What was launched, for tests that count launches.
struct LaunchRecord {
  std::string name;
  dim3 grid, block;
  std::size_t dynamic_shared_bytes = 0, static_shared_bytes = 0;
};

// Where something stands in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// A call that all lanes of a mask make together. The last one to arrive runs complete(), which sees every
// lane's payload (null for lanes that are not in the mask).
struct Collective {
  Site site;
  unsigned mask;
  void (*complete)(void* const (&payloads)[32], unsigned mask);
  void* payload;
};

// ---- called by the driver
void configure(const Options& options);
const Options& options();
std::vector<LaunchRecord>& launches();
// The first bug found since the last clear_error(); empty when none was.
const std::string& error();
void clear_error();
// Names the operator in messages.
void set_operator(const std::string& name);
// "kernel 'x', block (0, 0, 0), thread (1, 0, 0)", for signal handlers and sanitizers; empty outside kernels.
const char* position_text();

// Below the stack of a CUDA thread?
bool on_guard_page(const void* address);

// ---- called by launch()
// Where it puts the kernel's parameters: 4096 bytes, which kernels may read.
void* parameter_space();
// False after a bug (see error()).
bool run_kernel(const char* name, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                std::size_t parameter_bytes, void (*body)(const void* closure), const void* closure);

// ---- called by kernels
// Ends the launch with this error, after naming kernel, block and thread.
[[noreturn]] void fail(const std::string& what);
// Reports from outside kernels too; returns only there.
void report(const std::string& what);

enum class Vote { none, any, all, count };
int block_barrier(Site site, Vote vote, int predicate);
void warp_collective(const Collective& collective);
void warp_barrier(Site site, unsigned mask);
void thread_fence();
int lane_number();
int thread_number();
void* shared_array(const void* site, const char* name, std::size_t bytes, std::size_t alignment);
void* dynamic_shared(Site site);

// Bounds and records of an atomic operation that follows.
void begin_atomic(const void* address, std::size_t bytes);

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int open_groups);

// ---- what memory.cpp asks about the running block

// One CUDA thread, and when: intervals are the times between barriers of a block, numbered in the order in which
// they run, over all blocks and launches.
struct Moment {
  int thread = 0;  // linear number in the block
  std::uint8_t warp = 0;
  std::uint32_t lane_bit = 0;
  std::uint32_t stamp = 0;  // number of its latest __syncwarp
  const std::uint32_t* known =
      nullptr;                 // [32]: of each lane of its warp, the latest __syncwarp known to be over
  std::uint32_t interval = 0;  // the running one
  std::uint32_t block = 0, launch = 0;  // the first of the running block and launch
};

struct Running {
  bool active = false;  // inside a kernel
  Moment moment;
  const char* stack = nullptr;
  std::size_t stack_bytes = 0;
};

// The running thread; looked at by every load and store.
extern Running running;

// The same for another thread of the block.
Moment moment_of(int thread);

// Has the running block synchronised with the block that this interval belongs to, by __threadfence and an
// atomic?
bool acquired(std::uint32_t interval);
bool acquired_any();
std::string thread_text(int thread);             // "thread (1, 0, 0)"
std::string block_text(std::uint32_t interval);  // "block (0, 0, 0)"

}  // namespace visionllm::emulation
