#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace folovllm {
namespace {

constexpr int kMaxThreads = 256;
// About 50 us: longer than what lies between two kernels of a step, shorter than what lies between two steps.
constexpr int kSpins = 2000;

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, std::min(CPU_COUNT(&set), kMaxThreads));
}

void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  const int error = pthread_setaffinity_np(thread, sizeof(set), &set);
  if (error != 0) throw std::system_error(error, std::generic_category(), "cannot pin to cpu " + std::to_string(cpu));
}

class Pool {
 public:
  // Leaked on purpose: its workers may outlive the destructors of other static objects.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int num_threads, const std::vector<int>& cpus) {
    if (num_threads < 1 || num_threads > kMaxThreads) {
      throw std::invalid_argument("num_threads=" + std::to_string(num_threads) + " is not allowed; it must be 1 to 256");
    }
    if (!cpus.empty() && static_cast<int>(cpus.size()) < num_threads) {
      throw std::invalid_argument(std::to_string(cpus.size()) + " cpus for " + std::to_string(num_threads) +
                                  " threads; give one each, or none");
    }
    const std::lock_guard lock(busy_);
    stop_workers();
    size_.store(num_threads, std::memory_order_relaxed);
    cpus_ = cpus;
    if (!cpus_.empty()) pin(pthread_self(), cpus_[0]);
    start_workers();
  }

  void run(Job job) {
    const int count = size();
    std::unique_lock lock(busy_, std::defer_lock);
    if (count == 1 || !lock.try_lock()) return job(0, count);
    if (static_cast<int>(workers_.size()) != count - 1) start_workers();
    job_ = job;
    // Publishes job_ to the workers.
    publish(0);
    job(0, count);
    state_.fetch_or(kClosed, std::memory_order_seq_cst);
    wait_for_those_inside();
  }

 private:
  // state_, which all threads look at:
  //
  //   31 ... 10      9        8 ... 0
  //   | epoch   | closed | workers inside |
  //
  // A job has a new epoch. A worker enters it, at most once, until the caller has closed it; the caller then waits for
  // those inside. So nobody waits for a worker that has no core at the moment: what it would have done, others do.
  static constexpr std::uint32_t kInside = (1U << 9) - 1;
  static constexpr std::uint32_t kClosed = 1U << 9;
  static constexpr int kEpochShift = 10;
  static_assert(kMaxThreads <= kInside);

  static std::uint32_t epoch_of(std::uint32_t state) { return state >> kEpochShift; }

  Pool() : size_(allowed_cpus()) {}

  void start_workers() {
    is_stopping_.store(false, std::memory_order_relaxed);
    const std::uint32_t seen = epoch_of(state_.load(std::memory_order_relaxed));
    const int count = size();
    for (int i = static_cast<int>(workers_.size()) + 1; i < count; ++i) {
      workers_.emplace_back([this, i, count, seen] { work(i, count, seen); });
      if (!cpus_.empty()) pin(workers_.back().native_handle(), cpus_[static_cast<std::size_t>(i)]);
    }
  }

  void stop_workers() {
    is_stopping_.store(true, std::memory_order_relaxed);
    publish(kClosed);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  // Begin the next epoch. REQUIRES: nobody is inside.
  void publish(std::uint32_t closed) {
    const std::uint32_t epoch = epoch_of(state_.load(std::memory_order_relaxed)) + 1;
    state_.store(epoch << kEpochShift | closed, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0) state_.notify_all();
  }

  void work(int thread, int count, std::uint32_t seen) {
    while (true) {
      std::uint32_t state = wait_for_other_epoch(seen);
      if (is_stopping_.load(std::memory_order_relaxed)) return;
      seen = epoch_of(state);
      if (!enter(state)) continue;
      (*job_)(thread, count);
      // The last one wakes a caller that sleeps: either it sees the flag, or the caller sees that nobody is inside.
      const std::uint32_t before = state_.fetch_sub(1, std::memory_order_seq_cst);
      const bool is_last = (before & kClosed) != 0 && (before & kInside) == 1;
      if (is_last && is_caller_asleep_.load(std::memory_order_seq_cst)) {
        num_wakeups_.fetch_add(1, std::memory_order_seq_cst);
        num_wakeups_.notify_one();
      }
    }
  }

  // Enter the job of `state`, if it is still open.
  bool enter(std::uint32_t state) {
    const std::uint32_t epoch = epoch_of(state);
    while ((state & kClosed) == 0 && epoch_of(state) == epoch) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return true;
      }
    }
    return false;
  }

  bool is_empty() const { return (state_.load(std::memory_order_seq_cst) & kInside) == 0; }

  void wait_for_those_inside() {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (is_empty()) return;
      pause_cpu();
    }
    // A worker has lost its core: leave it this one.
    is_caller_asleep_.store(true, std::memory_order_seq_cst);
    while (true) {
      const std::uint32_t seen = num_wakeups_.load(std::memory_order_seq_cst);
      if (is_empty()) break;
      num_wakeups_.wait(seen, std::memory_order_seq_cst);
    }
    is_caller_asleep_.store(false, std::memory_order_relaxed);
  }

  std::uint32_t wait_for_other_epoch(std::uint32_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      const std::uint32_t state = state_.load(std::memory_order_acquire);
      if (epoch_of(state) != seen) return state;
      pause_cpu();
    }
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    std::uint32_t state = 0;
    while (epoch_of(state = state_.load(std::memory_order_seq_cst)) == seen) state_.wait(state, std::memory_order_seq_cst);
    num_asleep_.fetch_sub(1, std::memory_order_relaxed);
    return state;
  }

  // Protected by busy_, which a running job holds:
  std::mutex busy_;
  std::vector<std::thread> workers_;
  std::vector<int> cpus_;
  // Written by the caller before state_ changes, read by workers inside:
  std::optional<Job> job_;
  std::atomic<bool> is_stopping_{false};
  // On lines of their own, because the workers spin on them:
  alignas(64) std::atomic<std::uint32_t> state_{kClosed};
  alignas(64) std::atomic<std::uint32_t> num_wakeups_{0};
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<int> num_asleep_{0};
  alignas(64) std::atomic<int> size_;
};

}  // namespace

void set_num_threads(int num_threads, const std::vector<int>& cpus) { Pool::instance().resize(num_threads, cpus); }

int num_threads() { return Pool::instance().size(); }

void run_together(Job job) { Pool::instance().run(job); }

}  // namespace folovllm
