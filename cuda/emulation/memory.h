// Memory that emulated kernels may touch, and who touched it last.
//
// Tensors lie in exact-size buffers of one address range, arrays in shared memory in another; in both, buffers
// are apart from each other. With VISIONLLM_EMULATION_CHECKED every load and store of a kernel calls
// check_access (the compiler's own instrumentation for thread sanitizing, whose runtime memory_hooks.cpp
// replaces). It knows the buffer, whether the bytes were ever written, and the last accesses to them, and so
// finds
//   - accesses outside every buffer, in a gap between a strided tensor's elements, or writing to an input;
//   - reads of memory that nothing has written;
//   - two threads at one element, one of them writing, without a barrier in between (happens-before, so that
//     no particular order of threads is needed); between blocks, without an atomic;
//   - reads of what an asynchronous copy has not brought yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace visionllm::emulation {

// host: an input that operators read on the host; kernels must not.
enum class Role { input, output, workspace, updated, host };

// read_padding: a read whose value may be garbage, as where a whole tile is loaded of which the rest is not used.
enum class AccessKind : std::uint8_t { read, read_padding, write, atomic, copy_begin, copy_end };

// The latest accesses of one kind to one granule. "Same interval": between the same two block barriers.
struct Access {
  std::uint32_t interval = 0;  // numbers block intervals in the order they ran; 0: never
  std::uint32_t lanes = 0;     // threads of `warp` with this access in the interval
  std::uint32_t stamp = 0;     // number of the latest __syncwarp of one of them before it
  std::uint8_t warp = 0;
  bool atomic = false;
  bool copying = false;     // an asynchronous copy is on its way
  bool many_warps = false;  // other warps too, in the same interval
  bool other_blocks : 1;    // other blocks of the same launch too
  bool initial : 1;         // set by the host, before any launch
  Access() : other_blocks(false), initial(false) {}
};

// One buffer: a tensor or a shared array.
struct Region {
  std::string name;
  char* begin = nullptr;
  std::size_t bytes = 0;
  bool shared = false;
  Role role = Role::input;
  std::size_t item_bytes = 1;
  std::vector<std::int64_t> shape, strides;  // in elements; empty for shared memory
  std::vector<bool> member;                  // per element, when strides leave gaps; empty: all belong
  std::size_t granule = 4;                   // bytes that one record stands for; refined when needed
  std::vector<Access> writes, reads;         // empty for inputs
  const void* site = nullptr;                // the declaration, of a shared array
  std::uint32_t used_in_block = 0;           // the latest block that declared it, by its first interval

  bool holds(const char* p) const { return p >= begin && p < begin + bytes; }
  bool tracked() const { return !writes.empty(); }
  bool comes_back() const { return role == Role::output || role == Role::updated; }
  void track();                                              // starts records
  void mark_initial(std::size_t offset, std::size_t bytes);  // have been set between launches
  std::string place(std::size_t offset) const;               // "'value' element 17 (byte 68 of 128)"
};

class Memory {
 public:
  Memory();

  // ---- tensors
  void clear_tensors();
  // The buffer's address has `offset` bytes over a multiple of 256. Filled with bytes 0xff: NaN in every
  // floating-point type.
  Region& add_tensor(std::size_t bytes, std::size_t offset);
  std::vector<Region*>& tensors() { return tensors_; }

  // ---- shared memory of the running block
  void begin_launch();
  void begin_block();
  // Filled with bytes 0xff at its first declaration in a block; null when there is no room.
  Region* shared_array(const void* site, const char* name, std::size_t bytes, std::size_t alignment);
  // Static bytes that the block has declared so far. (An alignment of 128 means the dynamic array.)
  std::size_t static_shared_bytes() const { return shared_used_; }

  // The buffer that holds the address; the nearest one below it within reach when none does.
  Region* find(const void* address, bool* inside);
  bool in_shared_range(const void* address) const;
  bool in_tensor_range(const void* address) const;

 private:
  char* tensor_base_;
  std::size_t tensor_used_ = 0;
  std::vector<Region*> tensors_;
  std::vector<std::uint16_t> tensor_of_page_;  // number + 1
  char* shared_base_;
  std::size_t shared_top_ = 0, shared_used_ = 0;
  std::vector<Region*> shared_;  // of the launch
};

Memory& memory();

// An access of a kernel's thread (or, outside kernels, of host code) to any memory: the compiler's instrumentation
// comes here. `pc` is where it stands, for the message.
void check_access(const void* address, std::size_t bytes, AccessKind kind, const void* pc);

// The same of a thread other than the running one, to memory that is not its own stack.
struct Moment;
void check_access(const Moment& who, const void* address, std::size_t bytes, AccessKind kind, const void* pc);

}  // namespace visionllm::emulation
