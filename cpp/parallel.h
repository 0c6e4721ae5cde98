// Splits [0, count) in contiguous parts and runs body(begin, end, worker) on each, on at most `threads`
// threads. The parts depend on `count`, `threads` and `pieces` alone. With threads == 1 the caller's thread does
// it all and nothing is started.
//
// There are threads * pieces parts, fewer where `count` is. More pieces even out threads that come late or share
// their core with others. `worker` numbers the memory a part may use: it is less than `threads`, and no two parts
// that run at the same time have the same. With one piece it is the part's number, and no two parts share it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace visionllm {

// Runs function(context, part, runner) for each part in [0, parts), on up to `threads` threads, the caller's being
// runner 0; returns when all are done.
void run_parts(int parts, int threads, void (*function)(const void* context, int part, int runner),
               const void* context);

template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body, int pieces = 1) {
  struct Context {
    std::int64_t count, parts;
    bool by_part;
    const Body& body;

    std::int64_t bound(std::int64_t part) const {
      return count / parts * part + std::min(part, count % parts);
    }
  };
  const std::int64_t most = std::max<std::int64_t>(count, 1);
  const std::int64_t runners = std::clamp<std::int64_t>(threads, 1, most);
  const std::int64_t parts = runners == 1 ? 1 : std::min(runners * pieces, most);
  const Context context{count, parts, parts == runners, body};
  run_parts(
      static_cast<int>(parts), static_cast<int>(runners),
      [](const void* opaque, int part, int runner) {
        const Context& c = *static_cast<const Context*>(opaque);
        c.body(c.bound(part), c.bound(part + 1), c.by_part ? part : runner);
      },
      &context);
}

}  // namespace visionllm
