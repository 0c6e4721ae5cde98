// How lora_linear divides its work and its workspace. Plain C++, a function of the sizes only: the workspace
// can be sized without a device, and sums have the same order on every device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace visionllm::cuda {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Up to this many rows the product streams W through registers; above, it is tiled in shared memory. Each row
// tile of the latter reads x once for 128 outputs, so one that is half empty still loses to the former at 32.
constexpr std::int64_t kStreamRows = 32;

// Blocks that a grid should have at least: the multiprocessors of an H100. Tests under emulation reach every
// plan with small matrices; fewer blocks wanted need no more workspace.
#ifdef VISIONLLM_EMULATION
constexpr std::int64_t kBlocksWanted = 4;
#else
constexpr std::int64_t kBlocksWanted = 132;
#endif

constexpr int kGemmColumns = 128;  // of a tile of the tensor-core product
constexpr int kGemmDepth = 32;     // elements of the sum per stage
constexpr int kSimtRows = 64;      // of a tile of the float32 product
constexpr int kSimtColumns = 64;
constexpr int kSimtDepth = 16;

struct GemmPlan {
  int tile_rows;              // 64 or 128
  int splits;                 // parts of the sum, each by its own blocks; 1: written directly
  std::int64_t split_length;  // elements of each part, a multiple of the stage depth
};

// Of an [M, N] product over sums of `length` elements.
inline GemmPlan gemm_plan(std::int64_t M, std::int64_t N, std::int64_t length, bool float32) {
  GemmPlan plan{64, 1, std::max<std::int64_t>(length, 1)};
  const std::int64_t columns = float32 ? kSimtColumns : kGemmColumns;
  // The large tile reads a third less shared memory per product; the small one fills the device sooner.
  if (!float32 && blocks_of(M, 128) * blocks_of(N, columns) >= kBlocksWanted) plan.tile_rows = 128;
  const std::int64_t tiles = blocks_of(M, plan.tile_rows) * blocks_of(N, columns);
  if (tiles == 0) return plan;
  // At least 512 elements each: fewer do not pay for the partial sums written and read.
  const std::int64_t splits = std::min<std::int64_t>({kBlocksWanted / tiles, length / 512, 8});
  if (splits > 1) {
    plan.split_length = round_up(blocks_of(length, splits), kGemmDepth);
    plan.splits = static_cast<int>(blocks_of(length, plan.split_length));
  }
  return plan;
}

// Elements of a row of the low-rank state in x's type: [high part | low part], each R rounded up to 16 with
// zeros. High and low part together have twice the mantissa.
constexpr std::int64_t half_row(std::int64_t R) { return round_up(R, 16); }

// Byte offsets in the workspace; absent parts have no length.
struct Workspace {
  std::int64_t low_rank;       // float32 [T, R]: of the gradient, in the backward
  std::int64_t low_rank_half;  // x's type [T, 2 half_row(R)]
  std::int64_t partial;        // float32 [splits, T, output columns]
  std::int64_t bytes;
};

inline Workspace workspace_of(std::int64_t T, std::int64_t columns, std::int64_t length, std::int64_t R,
                              bool float32, bool backward) {
  Workspace w{};
  w.low_rank_half = backward ? round_up(T * R * 4, 16) : 0;
  const bool streams = !backward && !float32 && T <= kStreamRows;
  w.partial = w.low_rank_half + (float32 || streams ? 0 : round_up(T * 2 * half_row(R) * 2, 16));
  if (R == 0) w.low_rank_half = w.partial = 0;
  const GemmPlan plan = gemm_plan(T, columns, length, float32);
  w.bytes = w.partial + (streams || plan.splits == 1 ? 0 : plan.splits * T * columns * 4);
  return w;
}

// y [T, N] sums over K, the gradient of x [T, K] over N.
inline Workspace forward_workspace(std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R,
                                   bool float32) {
  return workspace_of(T, N, K, R, float32, false);
}
inline Workspace backward_workspace(std::int64_t T, std::int64_t K, std::int64_t N, std::int64_t R,
                                    bool float32) {
  return workspace_of(T, K, N, R, float32, true);
}

}  // namespace visionllm::cuda
