#include "io_thread_queue.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace flexkv {
namespace {

std::int32_t perform(const std::vector<int>& fds, const IoRequest& request) {
  const int fd = fds[request.file];
  const auto offset = static_cast<off_t>(request.offset);
  const ssize_t moved = request.kind == IoKind::kRead ? pread(fd, request.data, request.bytes, offset)
                                                      : pwrite(fd, request.data, request.bytes, offset);
  return moved >= 0 ? static_cast<std::int32_t>(moved) : -errno;
}

}  // namespace

IoThreadQueue::IoThreadQueue(std::uint32_t depth, std::vector<int> fds, std::uint32_t num_threads)
    : depth_(depth), shared_(std::make_shared<Shared>(std::move(fds))) {
  for (std::uint32_t i = 0; i < std::min(num_threads, depth); ++i) {
    try {
      threads_.emplace_back([shared = shared_] { serve(shared); });
    } catch (const std::system_error&) {
      if (threads_.empty()) throw;
      break;  // the system has no more: fewer do the same work
    }
  }
}

IoThreadQueue::~IoThreadQueue() {
  bool is_stuck;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stop = true;
    shared_->requests.clear();
    is_stuck = shared_->num_running > 0;
  }
  shared_->has_request.notify_all();
  // The owner has waited for every request it could wait for: what runs now did not end within its patience.
  for (std::thread& thread : threads_) is_stuck ? thread.detach() : thread.join();
}

void IoThreadQueue::serve(const std::shared_ptr<Shared>& shared) {
  std::unique_lock lock(shared->mutex);
  for (;;) {
    shared->has_request.wait(lock, [&] { return shared->stop || !shared->requests.empty(); });
    if (shared->stop) return;
    const IoRequest request = shared->requests.front();
    shared->requests.pop_front();
    ++shared->num_running;
    lock.unlock();
    const std::int32_t result = perform(shared->fds, request);
    lock.lock();
    --shared->num_running;
    shared->completions.push_back({request.tag, result});
    shared->has_completion.notify_one();
  }
}

void IoThreadQueue::submit() {
  if (pushed_.empty()) return;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->requests.insert(shared_->requests.end(), pushed_.begin(), pushed_.end());
  }
  pushed_.size() == 1 ? shared_->has_request.notify_one() : shared_->has_request.notify_all();
  pushed_.clear();
}

std::size_t IoThreadQueue::wait(std::span<IoCompletion> out, Clock::time_point deadline) {
  submit();
  std::unique_lock lock(shared_->mutex);
  shared_->has_completion.wait_until(lock, deadline, [&] { return !shared_->completions.empty(); });
  std::vector<IoCompletion>& done = shared_->completions;
  const std::size_t count = std::min(out.size(), done.size());
  std::copy_n(done.end() - static_cast<std::ptrdiff_t>(count), count, out.begin());
  done.resize(done.size() - count);
  return count;
}

void IoThreadQueue::cancel_all() {
  const std::lock_guard lock(shared_->mutex);
  for (const IoRequest& request : pushed_) shared_->completions.push_back({request.tag, -ECANCELED});
  for (const IoRequest& request : shared_->requests) shared_->completions.push_back({request.tag, -ECANCELED});
  pushed_.clear();
  shared_->requests.clear();
}

}  // namespace flexkv
