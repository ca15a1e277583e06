// An IoQueue on threads that call pread and pwrite, for systems without io_uring.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "io_queue.h"

namespace flexkv {

class IoThreadQueue final : public IoQueue {
 public:
  // Up to `num_threads` requests run at once, `depth` may wait. REQUIRES: both are at least 1.
  IoThreadQueue(std::uint32_t depth, std::vector<int> fds, std::uint32_t num_threads);
  // Waits for its threads; when a system call hangs beyond reach, they are left behind with the state they use.
  ~IoThreadQueue() override;

  std::uint32_t depth() const override { return depth_; }
  void push(const IoRequest& request) override { pushed_.push_back(request); }
  void submit() override;
  std::size_t wait(std::span<IoCompletion> out, Clock::time_point deadline) override;
  // What has begun cannot be given up, only waited for.
  void cancel_all() override;

 private:
  struct Shared {
    explicit Shared(std::vector<int> fds) : fds(std::move(fds)) {}
    const std::vector<int> fds;
    std::mutex mutex;
    std::condition_variable has_request, has_completion;
    std::deque<IoRequest> requests;       // protected by mutex, as are all below
    std::vector<IoCompletion> completions;
    std::uint32_t num_running = 0;
    bool stop = false;
  };

  static void serve(const std::shared_ptr<Shared>& shared);

  std::uint32_t depth_;  // constant after construction, as are shared_ and threads_
  std::shared_ptr<Shared> shared_;
  std::vector<std::thread> threads_;
  std::vector<IoRequest> pushed_;
};

}  // namespace flexkv
