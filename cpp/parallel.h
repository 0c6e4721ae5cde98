// Splits [0, count) in contiguous parts and runs body(begin, end, worker) on each, on at most `threads`
// threads.
//
// Threads are started for the call and end with it. A pool of our own beside the host program's (torch brings
// OpenMP) would either spin against it or have to sleep; starting a thread takes about 20 us, so callers keep
// small work on one thread. The caller's thread does the first part; with threads == 1 nothing is started.
// Safe after fork().
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace visionllm {

template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1));
  const auto bound = [&](std::int64_t part) { return count / parts * part + std::min(part, count % parts); };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  for (std::int64_t part = 1; part < parts; ++part) {
    workers.emplace_back([&, part] { body(bound(part), bound(part + 1), static_cast<int>(part)); });
  }
  body(bound(0), bound(1), 0);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace visionllm
