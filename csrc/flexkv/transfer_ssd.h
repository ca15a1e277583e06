// Reads and writes whole batches of KV blocks between the CPU pool and the files of the SSD tier.
//
// Many requests are in flight at once, each at most `io_bytes`; short ones are continued, interrupted ones repeated.
// What goes wrong is told per block, as an errno:
//
//     0            the block has arrived, and (read) its checksum is right
//     EBADMSG      read in full, but its checksum is another: the pool block holds garbage
//     ETIMEDOUT    the deadline passed first; nothing touches the pool block any more
//     EINPROGRESS  as ETIMEDOUT, but the system did not give the request back either: the pool block must never be used
//                  again, and this object refuses further work
//     others       what the system said (EIO, ENOSPC, ...)
//
// A slot whose write did not end with 0 holds garbage.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "io_queue.h"
#include "ssd_file_set.h"
#include "transfer_host.h"
#include "transfer_ssd_plan.h"

namespace flexkv {

class IoUringQueue;

enum class SsdBackend { kAuto, kIoUring, kThreads };

struct SsdOptions {
  std::uint32_t queue_depth = 128;  // most requests in flight, 1..4096; of large ones fewer
  std::uint32_t io_bytes = 1 << 20;   // most bytes of a request: a multiple of 4096, at most 1 GiB
  SsdBackend backend = SsdBackend::kAuto;
  std::uint32_t num_threads = 8;  // of the thread backend
  bool register_memory = true;    // pin the pool as it comes into use, so that requests need not
  bool direct = true;             // past the page cache
  // How long to wait, after a deadline, for requests that cannot be cancelled because the disk has them.
  std::chrono::milliseconds drain_timeout{30000};
};

// The disk kept a request beyond all patience, or the queue itself broke.
class SsdTransferError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct SsdCounters {
  std::uint64_t num_requests = 0;
  std::uint64_t num_short = 0;    // moved fewer bytes than asked, and were continued
  std::uint64_t num_repeated = 0;  // EINTR or EAGAIN
};

class SsdTransfer {
 public:
  using MakeQueue = std::function<std::unique_ptr<IoQueue>(const std::vector<int>& fds)>;

  // Throws std::invalid_argument for options or sizes that make no sense, std::system_error for files or a forced
  // backend that the system refuses. `make_queue` replaces the backends in tests.
  SsdTransfer(const SsdLayout& layout, const std::vector<std::string>& paths, const PoolSide& pool,
              const SsdOptions& options, const MakeQueue& make_queue = nullptr);
  ~SsdTransfer();

  // Moves block pool_blocks[i] <-> slots[i], all of a batch at once; writes status[i] and, for a write, checksums[i].
  // REQUIRES: one caller at a time; nobody writes the pool blocks meanwhile, nor (write) the slots.
  // Throws std::invalid_argument or std::out_of_range before any byte moved, SsdTransferError when the object is
  // unusable. After the deadline it returns within options.drain_timeout.
  void write(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
             Clock::time_point deadline, std::span<std::int32_t> status, std::span<std::uint64_t> checksums);
  void read(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
            std::span<const std::uint64_t> checksums, Clock::time_point deadline, std::span<std::int32_t> status);

  // Returns when the blocks written would survive a loss of power. Throws std::system_error.
  void sync() const { files_.sync(); }

  // What became of the options. REQUIRES: nobody is reading or writing meanwhile.
  bool is_io_uring() const { return io_uring_ != nullptr; }
  // Blocks are copied through aligned buffers, because the pool's address, stride or block size is no multiple of 4096.
  bool is_bounced() const { return bounce_ != nullptr; }
  bool is_memory_registered() const;
  bool is_direct() const { return files_.refusals().empty() && options_.direct; }
  // Why it is not all that was asked for; empty when it is.
  std::vector<std::string> fallbacks() const;
  const SsdCounters& counters() const { return counters_; }

 private:
  struct Batch;
  struct Flight;

  void check(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
             std::span<const std::int64_t> targets) const;
  void open_queue(const MakeQueue& make_queue);
  bool open_io_uring();
  void run(Batch& batch, Clock::time_point deadline);
  void drain(Batch& batch);
  void start_pieces(Batch& batch);
  void push(const Batch& batch, std::uint32_t tag);
  void complete(Batch& batch, const IoCompletion& completion);
  void fail(Batch& batch, const Piece& piece, std::int32_t error);
  void finish(Batch& batch, const Piece& piece);
  void verify(Batch& batch);
  void copy_bounce(const Batch& batch, std::uint32_t tag);
  std::byte* pool_block(std::int64_t block) const;
  std::byte* bounce_of(std::uint32_t tag) const { return bounce_.get() + std::size_t{tag} * options_.io_bytes; }

  SsdLayout layout_;  // constant after construction, as all below up to the blank line
  PoolSide pool_;
  SsdOptions options_;
  SsdFileSet files_;
  std::vector<std::string> fallbacks_;
  std::unique_ptr<std::byte[], void (*)(std::byte*)> bounce_;
  std::unique_ptr<IoQueue> queue_;
  const IoUringQueue* io_uring_ = nullptr;  // queue_, when it is one

  std::vector<Flight> flights_;  // by tag
  std::vector<std::uint32_t> free_tags_;
  std::vector<IoCompletion> completions_;  // room for one wait
  bool is_broken_ = false;
  SsdCounters counters_;
};

}  // namespace flexkv
