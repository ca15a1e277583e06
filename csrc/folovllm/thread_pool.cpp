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
    if (count == 1 || !lock.try_lock()) {
      for (int i = 0; i < count; ++i) job(i, count);
      return;
    }
    if (static_cast<int>(workers_.size()) != count - 1) start_workers();
    job_ = job;
    num_working_.store(count - 1, std::memory_order_relaxed);
    // Publishes job_ and num_working_ to the workers.
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0) epoch_.notify_all();
    job(0, count);
    wait_for_workers();
  }

 private:
  Pool() : size_(allowed_cpus()) {}

  void start_workers() {
    is_stopping_.store(false, std::memory_order_relaxed);
    const std::uint32_t seen = epoch_.load(std::memory_order_relaxed);
    const int count = size();
    for (int i = static_cast<int>(workers_.size()) + 1; i < count; ++i) {
      workers_.emplace_back([this, i, count, seen] { work(i, count, seen); });
      if (!cpus_.empty()) pin(workers_.back().native_handle(), cpus_[static_cast<std::size_t>(i)]);
    }
  }

  void stop_workers() {
    is_stopping_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void work(int thread, int count, std::uint32_t seen) {
    while (true) {
      wait_for_change(seen);
      ++seen;
      if (is_stopping_.load(std::memory_order_relaxed)) return;
      (*job_)(thread, count);
      // The last one wakes a caller that sleeps: either it sees the flag, or the caller sees the count.
      if (num_working_.fetch_sub(1, std::memory_order_seq_cst) == 1 && is_caller_asleep_.load(std::memory_order_seq_cst)) {
        num_working_.notify_one();
      }
    }
  }

  void wait_for_workers() {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (num_working_.load(std::memory_order_acquire) == 0) return;
      pause_cpu();
    }
    // A worker has lost its core: leave it this one.
    is_caller_asleep_.store(true, std::memory_order_seq_cst);
    int working = 0;
    while ((working = num_working_.load(std::memory_order_seq_cst)) != 0) {
      num_working_.wait(working, std::memory_order_seq_cst);
    }
    is_caller_asleep_.store(false, std::memory_order_relaxed);
  }

  void wait_for_change(std::uint32_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      pause_cpu();
    }
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (epoch_.load(std::memory_order_seq_cst) == seen) epoch_.wait(seen, std::memory_order_seq_cst);
    num_asleep_.fetch_sub(1, std::memory_order_relaxed);
  }

  // Protected by busy_, which a running job holds:
  std::mutex busy_;
  std::vector<std::thread> workers_;
  std::vector<int> cpus_;
  // Written by the caller before epoch_ changes, read by workers after:
  std::optional<Job> job_;
  std::atomic<bool> is_stopping_{false};
  // On lines of their own, because the workers spin on them:
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> num_working_{0};
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<int> num_asleep_{0};
  alignas(64) std::atomic<int> size_;
};

}  // namespace

void set_num_threads(int num_threads, const std::vector<int>& cpus) { Pool::instance().resize(num_threads, cpus); }

int num_threads() { return Pool::instance().size(); }

void run_on_all(Job job) { Pool::instance().run(job); }

}  // namespace folovllm
