// Warp operations, atomics, tensor-core products: the parts of the emulated CUDA that are no one-liners.
#include <algorithm>

#include "emulation/memory.h"
#include "emulation/mma.h"
#include "emulation/platform.h"

namespace visionllm::emulation {
namespace {

std::string lane_text(int lane) { return "lane " + std::to_string(lane); }

// One lane's part of a vote.
struct BallotLane {
  int predicate;
  unsigned result;
};

struct MmaLane {
  Element element;
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

struct LoadLane {
  std::uint32_t* registers;
  const char* row;
  int count;
  bool transposed;
};

// The element of a fragment's register: half 0 or 1 of 16-bit ones.
double element_of(Element element, std::uint32_t word, int half) {
  const auto bits = static_cast<std::uint16_t>(word >> 16 * half);
  switch (element) {
    case Element::bfloat16: return bfloat16_bits_to_float(bits);
    case Element::float16: return half_bits_to_float(bits);
    case Element::tf32: return bits_float(word & 0xffffe000u);  // 10 bits of mantissa, the rest is not read
  }
  return 0;
}

// Tensor cores cut off what does not fit in the accumulator; they do not round.
float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(x)) {
    return std::nextafterf(nearest, 0.0f);
  }
  return nearest;
}

void complete_mma(void* const (&lanes)[32], unsigned mask) {
  if (mask != 0xffffffffu) fail("a tensor-core product needs all 32 lanes of the warp");
  const auto lane = [&](int i) -> MmaLane& { return *static_cast<MmaLane*>(lanes[i]); };
  const Element element = lane(0).element;
  const bool wide = element == Element::tf32;
  const int depth = wide ? 8 : 16;
  double a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    for (int j = 0; j < 4; ++j) {
      const int row = g + 8 * (j % 2);
      if (wide) {
        a[row][t + 4 * (j / 2)] = element_of(element, lane(i).a[j], 0);
      } else {
        for (int half = 0; half < 2; ++half)
          a[row][2 * t + half + 8 * (j / 2)] = element_of(element, lane(i).a[j], half);
      }
    }
    for (int j = 0; j < 2; ++j) {
      if (wide) {
        b[t + 4 * j][g] = element_of(element, lane(i).b[j], 0);
      } else {
        for (int half = 0; half < 2; ++half)
          b[2 * t + half + 8 * j][g] = element_of(element, lane(i).b[j], half);
      }
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = i / 4 + 8 * (j / 2), column = 2 * (i % 4) + j % 2;
      double sum = lane(i).d[j];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      lane(i).d[j] = toward_zero(sum);
    }
  }
}

void complete_load(void* const (&lanes)[32], unsigned mask) {
  if (mask != 0xffffffffu) fail("ldmatrix needs all 32 lanes of the warp");
  const auto lane = [&](int i) -> LoadLane& { return *static_cast<LoadLane*>(lanes[i]); };
  const int count = lane(0).count, first_thread = thread_number() / 32 * 32;
  for (int matrix = 0; matrix < count; ++matrix) {
    std::uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const char* const pointer = lane(8 * matrix + row).row;
      const std::string from = lane_text(8 * matrix + row) + "'s row of ldmatrix ";
      if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail(from + "is not aligned to 16 bytes");
      bool inside;
      const Region* const region = memory().find(pointer, &inside);
      if (!memory().in_shared_range(pointer) || !inside || !region->holds(pointer + 15)) {
        fail(from + "lies outside shared memory: out of bounds");
      }
      std::memcpy(elements[row], pointer, 16);
    }
    for (int i = 0; i < 32; ++i) {
      const int major = i / 4, minor = 2 * (i % 4);
      const std::uint16_t low = lane(0).transposed ? elements[minor][major] : elements[major][minor];
      const std::uint16_t high = lane(0).transposed ? elements[minor + 1][major] : elements[major][minor + 1];
      lane(i).registers[matrix] = static_cast<std::uint32_t>(high) << 16 | low;
#ifdef VISIONLLM_EMULATION_CHECKED
      if (lane(0).transposed) {
        for (int j = 0; j < 2; ++j) {
          check_access(moment_of(first_thread + i), lane(8 * matrix + minor + j).row + 2 * major, 2,
                       AccessKind::read_padding, nullptr);
        }
      } else {
        check_access(moment_of(first_thread + i), lane(8 * matrix + major).row + 2 * minor, 4,
                     AccessKind::read_padding, nullptr);
      }
#else
      (void)first_thread;
#endif
    }
  }
}

// What follows begin_atomic(): nothing runs in between, so plain code is atomic.
template <typename T, typename Change>
T update(T* address, Change change) {
  begin_atomic(address, sizeof(T));
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace

void complete_shuffle(void* const (&lanes)[32], unsigned mask) {
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    const int source = lane.source < 0 ? i : lane.source;
    if (source > 31 || (mask >> source & 1u) == 0) {
      fail("a shuffle in which " + lane_text(i) + " reads " + lane_text(source) +
           ", which does not take part in it");
    }
    std::memcpy(lane.result, static_cast<ShuffleLane*>(lanes[source])->value, sizeof lane.result);
  }
}

unsigned ballot(const char* what, const char* file, int line, unsigned mask, int predicate) {
  BallotLane self{predicate, 0};
  warp_collective({{what, file, line},
                   mask,
                   [](void* const(&lanes)[32], unsigned present) {
                     unsigned result = 0;
                     for (int i = 0; i < 32; ++i) {
                       if ((present >> i & 1u) != 0 && static_cast<BallotLane*>(lanes[i])->predicate != 0) {
                         result |= 1u << i;
                       }
                     }
                     for (int i = 0; i < 32; ++i) {
                       if ((present >> i & 1u) != 0) static_cast<BallotLane*>(lanes[i])->result = result;
                     }
                   },
                   &self});
  return self.result;
}

void mma(Element element, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b, Site site) {
  MmaLane self{element, d, a, b};
  warp_collective({site, 0xffffffffu, complete_mma, &self});
}

void load_matrices(std::uint32_t* registers, int count, bool transposed, const void* shared_row, Site site) {
  LoadLane self{registers, static_cast<const char*>(shared_row), count, transposed};
  warp_collective({site, 0xffffffffu, complete_load, &self});
}

}  // namespace visionllm::emulation

using visionllm::emulation::update;

float atomicAdd(float* p, float v) {
  return update(p, [v](float x) { return x + v; });
}
double atomicAdd(double* p, double v) {
  return update(p, [v](double x) { return x + v; });
}
int atomicAdd(int* p, int v) {
  return update(p,
                [v](int x) { return static_cast<int>(static_cast<unsigned>(x) + static_cast<unsigned>(v)); });
}
unsigned atomicAdd(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return x + v; });
}
unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return update(p, [v](unsigned long long x) { return x + v; });
}
__half atomicAdd(__half* p, __half v) {
  return update(p, [v](__half x) { return x + v; });
}
__nv_bfloat16 atomicAdd(__nv_bfloat16* p, __nv_bfloat16 v) {
  return update(p, [v](__nv_bfloat16 x) { return x + v; });
}
__half2 atomicAdd(__half2* p, __half2 v) {
  return update(p, [v](__half2 x) { return __hadd2(x, v); });
}
__nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 v) {
  return update(p, [v](__nv_bfloat162 x) { return __hadd2(x, v); });
}
int atomicSub(int* p, int v) {
  return update(p,
                [v](int x) { return static_cast<int>(static_cast<unsigned>(x) - static_cast<unsigned>(v)); });
}
unsigned atomicSub(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return x - v; });
}
int atomicMax(int* p, int v) {
  return update(p, [v](int x) { return std::max(x, v); });
}
unsigned atomicMax(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return std::max(x, v); });
}
unsigned long long atomicMax(unsigned long long* p, unsigned long long v) {
  return update(p, [v](unsigned long long x) { return std::max(x, v); });
}
int atomicMin(int* p, int v) {
  return update(p, [v](int x) { return std::min(x, v); });
}
unsigned atomicMin(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return std::min(x, v); });
}
unsigned long long atomicMin(unsigned long long* p, unsigned long long v) {
  return update(p, [v](unsigned long long x) { return std::min(x, v); });
}
unsigned atomicInc(unsigned* p, unsigned limit) {
  return update(p, [limit](unsigned x) { return x >= limit ? 0u : x + 1; });
}
int atomicOr(int* p, int v) {
  return update(p, [v](int x) { return x | v; });
}
unsigned atomicOr(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return x | v; });
}
unsigned atomicAnd(unsigned* p, unsigned v) {
  return update(p, [v](unsigned x) { return x & v; });
}
float atomicExch(float* p, float v) {
  return update(p, [v](float) { return v; });
}
int atomicExch(int* p, int v) {
  return update(p, [v](int) { return v; });
}
unsigned atomicExch(unsigned* p, unsigned v) {
  return update(p, [v](unsigned) { return v; });
}
unsigned long long atomicExch(unsigned long long* p, unsigned long long v) {
  return update(p, [v](unsigned long long) { return v; });
}
int atomicCAS(int* p, int compare, int v) {
  return update(p, [=](int x) { return x == compare ? v : x; });
}
unsigned atomicCAS(unsigned* p, unsigned compare, unsigned v) {
  return update(p, [=](unsigned x) { return x == compare ? v : x; });
}
unsigned short atomicCAS(unsigned short* p, unsigned short compare, unsigned short v) {
  return update(p, [=](unsigned short x) { return x == compare ? v : x; });
}
unsigned long long atomicCAS(unsigned long long* p, unsigned long long compare, unsigned long long v) {
  return update(p, [=](unsigned long long x) { return x == compare ? v : x; });
}

cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t) {
  using namespace visionllm::emulation;
  if (bytes == 0) return cudaSuccess;
  bool inside;
  Region* const region = memory().find(target, &inside);
  const auto* const last = static_cast<const char*>(target) + bytes - 1;
  if (!inside || !region->holds(last) || region->role == Role::input) {
    report("cudaMemsetAsync of " + std::to_string(bytes) + " bytes that are not all of one writable tensor");
    return cudaErrorInvalidValue;
  }
  std::memset(target, value, bytes);
  region->mark_initial(static_cast<const char*>(target) - region->begin, bytes);
  return cudaSuccess;
}
