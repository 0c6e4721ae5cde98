// Threads that sleep while there is nothing to do.
//
// A host program such as torch brings an OpenMP pool whose threads wait for each other, and for some milliseconds for
// their next work, by spinning. Where cores are shared, between processes or with anything else, such a wait keeps the
// very thread it waits for from running, and calls of half a millisecond take a hundred (bench/two_processes.py). So
// here nothing spins, and nobody waits for a thread that has not come: helpers sleep until they are woken, each part
// belongs to whoever takes it first, and a caller whose helpers are late does all parts itself.
//
// Helpers are started when they are first needed and kept. Calls from several threads share them. After fork() the
// child starts its own.
#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace visionllm {
namespace {

// A caller that ran out of parts offers its core this often, about 20 us in all, before it sleeps until its helpers
// are done: waking it again takes as long.
constexpr int kYields = 50;

struct Job {
  void (*function)(const void*, int);
  const void* context;
  int parts;
  std::atomic<int> next{0};     // part to be taken
  std::atomic<int> running{0};  // helpers at work; falls under the pool's mutex
  int joined = 1;               // runners so far, the caller first
  Job* following = nullptr;
  std::condition_variable done;

  void run() {
    for (int part = next++; part < parts; part = next++) function(context, part);
  }
  bool wants_helper() const { return joined < parts && next < parts; }
};

class Pool {
 public:
  void run(Job* job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job->following = jobs_;
      jobs_ = job;
      start_helpers(job->parts - 1);
    }
    for (int i = 1; i < job->parts; ++i) work_.notify_one();
    job->run();
    for (int i = 0; i < kYields && job->running > 0; ++i) std::this_thread::yield();
    std::unique_lock<std::mutex> lock(mutex_);
    Job** link = &jobs_;
    while (*link != job) link = &(*link)->following;
    *link = job->following;
    job->done.wait(lock, [&] { return job->running == 0; });
  }

 private:
  // As many as the caller asks for, or as the system allows.
  void start_helpers(int count) {
    try {
      for (; helpers_ < count; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  [[noreturn]] void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = jobs_;
      while (job != nullptr && !job->wants_helper()) job = job->following;
      if (job == nullptr) {
        work_.wait(lock);
        continue;
      }
      ++job->joined;
      ++job->running;
      lock.unlock();
      job->run();
      lock.lock();
      if (--job->running == 0) job->done.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  Job* jobs_ = nullptr;
  int helpers_ = 0;
};

struct OwnedPool {
  Pool pool;
  long process;
};

long process_number() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

// This process's pool. Never destroyed: its helpers sleep until the process ends. One made before a fork() belongs to
// the parent, and its threads are not here.
Pool& pool() {
  static std::atomic<OwnedPool*> current{nullptr};
  OwnedPool* owned = current;
  const long process = process_number();
  while (owned == nullptr || owned->process != process) {
    auto* const fresh = new OwnedPool{{}, process};
    if (current.compare_exchange_strong(owned, fresh)) return fresh->pool;
    delete fresh;
  }
  return owned->pool;
}

}  // namespace

void run_parts(int parts, void (*function)(const void* context, int part), const void* context) {
  if (parts == 1) return function(context, 0);
  Job job;
  job.function = function, job.context = context, job.parts = parts;
  pool().run(&job);
}

}  // namespace visionllm
