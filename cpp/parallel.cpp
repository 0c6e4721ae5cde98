// Threads without a pool of our own.
//
// A host program such as torch brings an OpenMP pool whose idle threads spin for some milliseconds after each use. Any second
// set of threads has to share the cores with them; the decoder-size calls then gain nothing from a second core. So where
// an OpenMP library is loaded in this process, its threads are used, through the entry point that GCC's code calls
// (libgomp has it, and so have LLVM's and Intel's libraries). It is looked up at run time: this library links none.
//
// Elsewhere, threads are started for the call and end with it, about 20 us each; that is safe after fork(), too.
#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define VISIONLLM_HAVE_DLSYM 1
#endif

namespace visionllm {
namespace {

struct OpenMP {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*thread_count)() = nullptr;

  bool usable() const { return parallel != nullptr && thread_number != nullptr && thread_count != nullptr; }
};

// The OpenMP library of this process. One that is loaded later is found later.
OpenMP find_openmp() {
  OpenMP found;
#ifdef VISIONLLM_HAVE_DLSYM
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.thread_number =
      reinterpret_cast<decltype(found.thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  found.thread_count =
      reinterpret_cast<decltype(found.thread_count)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  return found;
}

struct Job {
  int parts;
  void (*function)(const void*, int);
  const void* context;
  OpenMP openmp;
};

}  // namespace

void run_parts(int parts, void (*function)(const void* context, int part), const void* context) {
  if (parts == 1) return function(context, 0);

  Job job{parts, function, context, find_openmp()};
  if (job.openmp.usable()) {
    job.openmp.parallel(
        [](void* opaque) {
          const Job& j = *static_cast<const Job*>(opaque);
          // The team may be smaller than asked for, for example inside another parallel region.
          const int count = j.openmp.thread_count();
          for (int part = j.openmp.thread_number(); part < j.parts; part += count)
            j.function(j.context, part);
        },
        &job, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  for (int part = 1; part < parts; ++part) workers.emplace_back(function, context, part);
  function(context, 0);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace visionllm
