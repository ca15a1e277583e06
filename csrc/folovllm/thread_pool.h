// The one pool of threads that all kernels of a process share.
//
//   caller (thread 0) --job--> workers 1 .. n-1 --done--> caller
//
// A worker spins for a short while after a job, because the next kernel of a forward pass follows within
// microseconds, and then sleeps. No kernel may depend on how many threads there are: each output element is computed
// by one thread in an order of its own, so a result has the same bits with any number.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace folovllm {

// A reference to a callable `void(int thread, int num_threads)`; never owns it.
class Job {
 public:
  template <typename F>
  Job(F& callable)  // NOLINT(google-explicit-constructor): lambdas convert at the call
      : target_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* target, int thread, int num_threads) {
          (*static_cast<std::remove_reference_t<F>*>(target))(thread, num_threads);
        }) {}

  void operator()(int thread, int num_threads) const { call_(target_, thread, num_threads); }

 private:
  void* target_;
  void (*call_)(void*, int, int);
};

// Use `num_threads` threads, the caller included, from the next job on. `cpus` pins them: thread i runs on cpus[i];
// empty leaves them to the operating system. Pinning entry 0 pins the calling thread.
// Throws std::invalid_argument (a number below 1 or above 256, fewer cpus than threads) or std::system_error (a cpu
// this process may not use).
void set_num_threads(int num_threads, const std::vector<int>& cpus = {});

// The number of threads jobs run on; at first one per cpu this process may use.
int num_threads();

// Run job(0, n) on the caller and job(i, n) on every worker i of n that comes before the caller is done; return when all
// that came are done. A job hands its work out in pieces, so that whoever comes does some of it, and the caller all of it
// if nobody comes: because they have no core at the moment, or serve another thread of the process. Jobs do not throw and
// start no jobs.
void run_together(Job job);

// Call body(begin, end) over [0, num_items) in pieces of at most `grain` items, handed out as threads become free, so
// that a thread that loses its core for a while does not hold up the others.
template <typename F>
void parallel_for(std::int64_t num_items, std::int64_t grain, F&& body);

}  // namespace folovllm

#include "thread_pool_inl.h"
