// Splits [0, count) in contiguous parts and runs body(begin, end, worker) on each, on at most `threads`
// threads. The parts depend on `count` and `threads` alone: as many as threads, fewer where `count` is. (Smaller ones
// do not help where cores are shared: measured beside two busy processes, and behind torch's spinning threads.)
// `worker` is the part's number. With threads == 1 the caller's thread does it all and nothing is started.
#pragma once

#include <algorithm>
#include <cstdint>

namespace visionllm {

// Runs function(context, part) for each part in [0, parts), on up to as many threads, the caller's one of them;
// returns when all are done.
void run_parts(int parts, void (*function)(const void* context, int part), const void* context);

template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  struct Context {
    std::int64_t count, parts;
    const Body& body;

    std::int64_t bound(std::int64_t part) const {
      return count / parts * part + std::min(part, count % parts);
    }
  };
  const std::int64_t most = std::max<std::int64_t>(count, 1);
  const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, most);
  const Context context{count, parts, body};
  run_parts(
      static_cast<int>(parts),
      [](const void* opaque, int part) {
        const Context& c = *static_cast<const Context*>(opaque);
        c.body(c.bound(part), c.bound(part + 1), part);
      },
      &context);
}

}  // namespace visionllm
