// An IoQueue on io_uring, spoken in raw system calls (Linux 5.11 or later).
//
// Files and the memory pool are registered where the kernel allows it: the pool's pages then stay pinned, and requests
// need not pin them (measured, of 1.75 MB blocks: 7% more written, 10% more read; of 64 KB ones more than that).
// What was refused is told, not fatal.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io_queue.h"

struct io_uring_sqe;
struct io_uring_cqe;

namespace flexkv {

// Memory whose requests should go through registered buffers, one for each `piece_bytes` of it. Pinning makes pages
// real, which takes seconds per gigabyte the first time: a piece is registered when it is first used, the first one at
// once, to learn whether we may. A request that crosses from one piece into the next goes without.
struct PinnedMemory {
  static constexpr std::size_t kMaxPieces = 16384;  // the kernel's limits
  static constexpr std::size_t kMaxPieceBytes = std::size_t{1} << 30;

  std::byte* base = nullptr;
  std::size_t bytes = 0;  // 0: register nothing
  std::size_t piece_bytes = 0;

  std::size_t num_pieces() const { return bytes == 0 ? 0 : (bytes + piece_bytes - 1) / piece_bytes; }
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
  // Whether all memory is registered, or will be once it is used.
  bool registers_memory() const { return may_register_; }

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
  void open_buffer_table();
  // The registered buffer that holds all of these bytes, or -1.
  int buffer_of(const std::byte* data, std::size_t bytes);
  bool register_piece(std::size_t piece);
  void refuse_memory(int error);
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
  Descriptor ring_;
  Mapping rings_, entries_map_;  // unmapped before the ring is closed
  io_uring_sqe* entries_ = nullptr;
  io_uring_cqe* completions_ = nullptr;
  std::uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0;

  std::vector<std::string> refusals_;
  std::vector<bool> is_piece_registered_;
  bool may_register_ = false;
  std::vector<bool> in_flight_;        // by tag: pushed, and its completion not returned
  std::uint32_t num_in_flight_ = 0;
  std::vector<IoCompletion> refused_;  // completed without the kernel
};

}  // namespace flexkv
