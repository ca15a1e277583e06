// An IoQueue on io_uring, spoken in raw system calls (Linux 5.11 or later).
//
// Files and the memory pool are registered where the kernel allows it: the pool's pages then stay pinned, and a request
// does not have to pin them. What was refused is told, not fatal.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io_queue.h"

struct io_uring_sqe;
struct io_uring_cqe;

namespace flexkv {

// Memory whose requests should go through registered buffers. A request that crosses a multiple of `piece_bytes` (which
// is at most 1 GiB, the kernel's limit for one buffer) goes without.
struct PinnedMemory {
  std::byte* base = nullptr;
  std::size_t bytes = 0;  // 0: register nothing
  std::size_t piece_bytes = 0;
};

class IoUringQueue final : public IoQueue {
 public:
  // Throws std::system_error when the kernel has no io_uring for us (ENOSYS, EPERM, too old: EOPNOTSUPP), or no memory.
  IoUringQueue(std::uint32_t depth, std::vector<int> fds, const PinnedMemory& memory);
  ~IoUringQueue() override;

  std::uint32_t depth() const override { return depth_; }
  void push(const IoRequest& request) override;
  void submit() override;
  std::size_t wait(std::span<IoCompletion> out, Clock::time_point deadline) override;
  void cancel_all() override;

  // What the kernel did not register, and why; empty when all was.
  const std::vector<std::string>& refusals() const { return refusals_; }
  bool has_registered_memory() const { return memory_.bytes > 0; }

 private:
  struct Mapping {
    void* address = nullptr;
    std::size_t bytes = 0;
    ~Mapping();
  };
  struct Descriptor {
    int fd = -1;
    ~Descriptor();
  };

  void map_rings(const void* params);
  void register_files();
  void register_memory(const PinnedMemory& memory);
  io_uring_sqe* next_entry();
  std::uint32_t num_unsubmitted() const;
  // One io_uring_enter; returns 0 or an errno.
  int enter(std::uint32_t to_submit, std::uint32_t min_complete, Clock::time_point deadline);
  std::size_t reap(std::span<IoCompletion> out);
  // Takes back what the kernel has not consumed; each completes with `result`.
  void take_back(std::int32_t result);

  std::uint32_t depth_;  // constant after construction, as all below up to the blank line
  std::vector<int> fds_;
  bool files_registered_ = false;
  PinnedMemory memory_;
  std::vector<std::string> refusals_;
  Descriptor ring_;
  Mapping rings_, entries_map_;  // unmapped before the ring is closed
  io_uring_sqe* entries_ = nullptr;
  io_uring_cqe* completions_ = nullptr;
  std::uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0;

  std::vector<bool> in_flight_;        // by tag: pushed, and its completion not returned
  std::uint32_t num_in_flight_ = 0;
  std::vector<IoCompletion> refused_;  // completed without the kernel
};

}  // namespace flexkv
