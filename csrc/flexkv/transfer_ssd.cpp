#include "transfer_ssd.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <unordered_set>

#include "checksum.h"
#include "io_thread_queue.h"
#include "io_uring_queue.h"

namespace flexkv {
namespace {

// How often a request may come back with EAGAIN, EINTR or without progress before that becomes its error.
constexpr std::uint32_t kMaxAttempts = 64;
// Large requests keep a disk busy before there are queue_depth of them, and more would only make a deadline later.
constexpr std::uint64_t kMaxBytesInFlight = 32 << 20;
// What is registered at a time, when it is first used.
constexpr std::uint64_t kRegisteredBytes = 64 << 20;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

bool is_aligned(std::uint64_t value) { return value % kSectorBytes == 0; }

void check_layout(const SsdLayout& layout, std::size_t num_paths, const PoolSide& pool, const SsdOptions& options) {
  require(layout.block_bytes > 0, "block_bytes must be at least 1");
  require(layout.num_slots > 0, "num_slots must be at least 1");
  require(num_paths > 0 && num_paths == layout.num_files, "an SSD tier needs one file or more");
  require(pool.num_blocks > 0 && pool.offset >= 0 &&
              static_cast<std::uint64_t>(pool.offset) + layout.block_bytes <=
                  static_cast<std::uint64_t>(pool.block_stride),
          "a block of " + std::to_string(layout.block_bytes) + " bytes does not fit into the pool's stride of " +
              std::to_string(pool.block_stride));
  require(options.queue_depth >= 1 && options.queue_depth <= 4096,
          "queue_depth is 1..4096, not " + std::to_string(options.queue_depth));
  require(options.io_bytes >= kSectorBytes && is_aligned(options.io_bytes) && options.io_bytes <= (1u << 30),
          "io_bytes is a multiple of 4096 up to 1 GiB, not " + std::to_string(options.io_bytes));
  require(options.num_threads >= 1 && options.num_threads <= 256,
          "num_threads is 1..256, not " + std::to_string(options.num_threads));
  require(options.drain_timeout.count() >= 0, "drain_timeout must not be negative");
}

// Whether whole slots can be moved to and from the pool in place.
bool fits_in_place(const SsdLayout& layout, const PoolSide& pool) {
  return is_aligned(reinterpret_cast<std::uintptr_t>(pool.base) + static_cast<std::uint64_t>(pool.offset)) &&
         is_aligned(static_cast<std::uint64_t>(pool.block_stride)) &&
         static_cast<std::uint64_t>(pool.offset) + layout.slot_bytes() <= static_cast<std::uint64_t>(pool.block_stride);
}

std::byte* allocate_aligned(std::size_t bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kSectorBytes, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// The pool in pieces of whole blocks, so that no block lies across two. No bytes: it cannot be registered.
PinnedMemory pinned_memory(const PoolSide& pool) {
  const auto stride = static_cast<std::uint64_t>(pool.block_stride);
  const auto bytes = static_cast<std::uint64_t>(pool.num_blocks) * stride;
  const std::uint64_t wanted = std::max({kRegisteredBytes, stride, bytes / PinnedMemory::kMaxPieces + stride});
  const PinnedMemory memory{pool.base, bytes, wanted / stride * stride};
  return memory.piece_bytes <= PinnedMemory::kMaxPieceBytes ? memory : PinnedMemory{};
}

std::vector<std::uint64_t> file_sizes(const SsdLayout& layout) {
  std::vector<std::uint64_t> sizes;
  for (std::uint32_t file = 0; file < layout.num_files; ++file) sizes.push_back(layout.file_bytes(file));
  return sizes;
}

}  // namespace

struct SsdTransfer::Flight {
  Piece piece{};
  std::uint32_t done = 0;      // bytes
  std::uint32_t attempts = 0;  // since the last progress
};

struct SsdTransfer::Batch {
  IoKind kind;
  std::span<const std::int64_t> slots, pool_blocks;
  std::span<const std::uint64_t> expected;  // read
  std::span<std::uint64_t> computed;        // write
  std::span<std::int32_t> status;
  SsdPlan plan;
  std::size_t next_piece = 0;
  std::uint32_t num_in_flight = 0;
  std::uint64_t bytes_in_flight = 0;
  bool is_expired = false;
  std::vector<std::uint32_t> to_verify;  // blocks whose checksum is due, by index into the batch

  bool is_done() const { return num_in_flight == 0 && next_piece == plan.pieces.size(); }
  std::uint32_t block(const Piece& piece, std::uint32_t i) const { return plan.order[piece.first + i]; }
};

SsdTransfer::SsdTransfer(const SsdLayout& layout, const std::vector<std::string>& paths, const PoolSide& pool,
                         const SsdOptions& options, const MakeQueue& make_queue)
    : layout_(layout),
      pool_(pool),
      options_((check_layout(layout, paths.size(), pool, options), options)),
      files_(paths, file_sizes(layout), options.direct),
      bounce_(nullptr, [](std::byte* memory) { std::free(memory); }) {
  if (!fits_in_place(layout_, pool_)) {
    bounce_.reset(allocate_aligned(std::size_t{options_.queue_depth} * options_.io_bytes));
    fallbacks_.push_back("blocks are copied through aligned buffers: the pool's address, stride and block size are not "
                         "all multiples of 4096");
  }
  open_queue(make_queue);
  flights_.resize(queue_->depth());
  completions_.resize(queue_->depth());
  for (std::uint32_t tag = queue_->depth(); tag-- > 0;) free_tags_.push_back(tag);
}

SsdTransfer::~SsdTransfer() {
  // A request the system never gave back may still write there.
  if (is_broken_) (void)bounce_.release();
}

void SsdTransfer::open_queue(const MakeQueue& make_queue) {
  if (make_queue) {
    queue_ = make_queue(files_.fds());
  } else if (options_.backend == SsdBackend::kThreads || !open_io_uring()) {
    queue_ = std::make_unique<IoThreadQueue>(options_.queue_depth, files_.fds(), options_.num_threads);
  }
}

bool SsdTransfer::open_io_uring() {
  PinnedMemory memory;
  if (options_.register_memory && bounce_ == nullptr) {
    memory = pinned_memory(pool_);
    if (memory.bytes == 0) fallbacks_.push_back("the memory pool is not registered: it is larger than 16 TiB");
  }
  try {
    auto queue = std::make_unique<IoUringQueue>(options_.queue_depth, files_.fds(), memory);
    io_uring_ = queue.get();
    queue_ = std::move(queue);
  } catch (const std::system_error& error) {
    if (options_.backend == SsdBackend::kIoUring) throw;
    fallbacks_.push_back(std::string("threads instead of io_uring: ") + error.what());
    return false;
  }
  return true;
}

bool SsdTransfer::is_memory_registered() const { return io_uring_ != nullptr && io_uring_->registers_memory(); }

std::vector<std::string> SsdTransfer::fallbacks() const {
  std::vector<std::string> all = files_.refusals();
  all.insert(all.end(), fallbacks_.begin(), fallbacks_.end());
  if (io_uring_ != nullptr) all.insert(all.end(), io_uring_->refusals().begin(), io_uring_->refusals().end());
  return all;
}

std::byte* SsdTransfer::pool_block(std::int64_t block) const {
  return pool_.base + pool_.offset + block * pool_.block_stride;
}

void SsdTransfer::check(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
                        std::span<const std::int64_t> targets) const {
  require(slots.size() == pool_blocks.size(), "there are " + std::to_string(slots.size()) + " slots and " +
                                                  std::to_string(pool_blocks.size()) + " pool blocks");
  const auto check_range = [](std::span<const std::int64_t> ids, std::int64_t limit, const char* what) {
    for (const std::int64_t id : ids) {
      if (id < 0 || id >= limit) {
        throw std::out_of_range(std::string(what) + " " + std::to_string(id) + " is not in 0.." +
                                std::to_string(limit - 1));
      }
    }
  };
  check_range(slots, layout_.num_slots, "slot");
  check_range(pool_blocks, pool_.num_blocks, "pool block");
  const std::unordered_set<std::int64_t> distinct(targets.begin(), targets.end());
  require(distinct.size() == targets.size(), "a batch writes the same block twice");
}

void SsdTransfer::write(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
                        Clock::time_point deadline, std::span<std::int32_t> status,
                        std::span<std::uint64_t> checksums) {
  check(slots, pool_blocks, slots);
  require(status.size() == slots.size() && checksums.size() == slots.size(), "one status and checksum per block");
  Batch batch{IoKind::kWrite, slots, pool_blocks, {}, checksums, status, {}, 0, 0, 0, false, {}};
  run(batch, deadline);
}

void SsdTransfer::read(std::span<const std::int64_t> slots, std::span<const std::int64_t> pool_blocks,
                       std::span<const std::uint64_t> checksums, Clock::time_point deadline,
                       std::span<std::int32_t> status) {
  check(slots, pool_blocks, pool_blocks);
  require(status.size() == slots.size() && checksums.size() == slots.size(), "one status and checksum per block");
  Batch batch{IoKind::kRead, slots, pool_blocks, checksums, {}, status, {}, 0, 0, 0, false, {}};
  run(batch, deadline);
}

void SsdTransfer::run(Batch& batch, Clock::time_point deadline) {
  if (is_broken_) throw SsdTransferError("an earlier request of this SSD never came back; restart the store");
  std::fill(batch.status.begin(), batch.status.end(), 0);
  std::fill(batch.computed.begin(), batch.computed.end(), 0);
  batch.plan = make_plan(layout_, batch.slots, batch.pool_blocks,
                         {options_.io_bytes, is_bounced() ? 0 : static_cast<std::uint64_t>(pool_.block_stride)});
  is_broken_ = true;  // until all requests are known to be over
  while (!batch.is_done()) {
    start_pieces(batch);
    verify(batch);  // while requests are running
    if (batch.num_in_flight == 0) continue;
    const std::size_t count = queue_->wait(completions_, deadline);
    for (std::size_t i = 0; i < count; ++i) complete(batch, completions_[i]);
    if (count == 0 || Clock::now() >= deadline) {
      drain(batch);
      break;
    }
  }
  verify(batch);
  is_broken_ = batch.num_in_flight > 0;
}

void SsdTransfer::drain(Batch& batch) {
  batch.is_expired = true;
  for (; batch.next_piece < batch.plan.pieces.size(); ++batch.next_piece) {
    fail(batch, batch.plan.pieces[batch.next_piece], ETIMEDOUT);
  }
  if (batch.num_in_flight > 0) queue_->cancel_all();
  const auto patience = Clock::now() + options_.drain_timeout;
  while (batch.num_in_flight > 0) {
    const std::size_t count = queue_->wait(completions_, patience);
    for (std::size_t i = 0; i < count; ++i) complete(batch, completions_[i]);
    if (count == 0) break;
  }
  if (batch.num_in_flight == 0) return;
  std::vector<bool> is_free(flights_.size());
  for (const std::uint32_t tag : free_tags_) is_free[tag] = true;
  for (std::size_t tag = 0; tag < flights_.size(); ++tag) {
    const Piece& piece = flights_[tag].piece;
    for (std::uint32_t i = 0; !is_free[tag] && i < piece.num_blocks; ++i) {
      batch.status[batch.block(piece, i)] = EINPROGRESS;
    }
  }
}

void SsdTransfer::start_pieces(Batch& batch) {
  while (batch.next_piece < batch.plan.pieces.size() && !free_tags_.empty()) {
    const Piece piece = batch.plan.pieces[batch.next_piece];
    if (batch.num_in_flight > 0 && batch.bytes_in_flight + piece.bytes > kMaxBytesInFlight) break;
    ++batch.next_piece;
    if (piece.num_blocks == 1 && batch.status[batch.block(piece, 0)] != 0) {
      finish(batch, piece);  // another part of this block has failed
      continue;
    }
    const std::uint32_t tag = free_tags_.back();
    free_tags_.pop_back();
    flights_[tag] = {piece, 0, 0};
    ++batch.num_in_flight;
    batch.bytes_in_flight += piece.bytes;
    if (is_bounced() && batch.kind == IoKind::kWrite) copy_bounce(batch, tag);
    push(batch, tag);
  }
  queue_->submit();
}

void SsdTransfer::push(const Batch& batch, std::uint32_t tag) {
  const auto& [piece, done, attempts] = flights_[tag];
  const std::int64_t slot = batch.slots[batch.block(piece, 0)];
  const std::int64_t block = batch.pool_blocks[batch.block(piece, 0)];
  std::byte* data = is_bounced() ? bounce_of(tag) : pool_block(block) + piece.in_slot;
  ++counters_.num_requests;
  queue_->push({batch.kind, tag, piece.file, piece.bytes - done, layout_.offset_of(slot) + piece.in_slot + done,
                data + done});
}

void SsdTransfer::complete(Batch& batch, const IoCompletion& completion) {
  Flight& flight = flights_[completion.tag];
  const bool is_again = completion.result == -EAGAIN || completion.result == -EINTR;
  std::int32_t error = 0;
  if (is_again) {
    ++counters_.num_repeated;
    error = ++flight.attempts > kMaxAttempts ? -completion.result : 0;
  } else if (completion.result <= 0) {
    error = completion.result == 0 ? EIO : -completion.result;  // 0: the file ends here
  } else {
    const std::uint32_t moved = flight.done + static_cast<std::uint32_t>(completion.result);
    // Direct I/O goes on at whole sectors only.
    const std::uint32_t kept = moved >= flight.piece.bytes ? flight.piece.bytes : moved / kSectorBytes * kSectorBytes;
    flight.attempts = kept > flight.done ? 0 : flight.attempts + 1;
    flight.done = kept;
    if (kept < flight.piece.bytes) ++counters_.num_short;
    if (flight.attempts > kMaxAttempts) error = EIO;
  }
  const bool is_whole = flight.done == flight.piece.bytes;
  if (error == 0 && !is_whole && !batch.is_expired) {
    push(batch, completion.tag);  // submitted with the next pieces
    return;
  }
  if (batch.is_expired && !is_whole && (error == 0 || error == ECANCELED)) error = ETIMEDOUT;
  const Piece piece = flight.piece;
  --batch.num_in_flight;
  batch.bytes_in_flight -= piece.bytes;
  free_tags_.push_back(completion.tag);
  if (error != 0) {
    fail(batch, piece, error);
    return;
  }
  if (is_bounced() && batch.kind == IoKind::kRead) copy_bounce(batch, completion.tag);
  finish(batch, piece);
}

void SsdTransfer::fail(Batch& batch, const Piece& piece, std::int32_t error) {
  if (piece.num_blocks > 1 && !batch.is_expired) {
    // Whose fault it is, is found out block by block.
    for (const Piece& part : split_by_block(piece, layout_.slot_bytes())) batch.plan.pieces.push_back(part);
    return;
  }
  for (std::uint32_t i = 0; i < piece.num_blocks; ++i) {
    std::int32_t& status = batch.status[batch.block(piece, i)];
    if (status == 0) status = error;
  }
  finish(batch, piece);
}

void SsdTransfer::finish(Batch& batch, const Piece& piece) {
  for (std::uint32_t i = 0; i < piece.num_blocks; ++i) {
    const std::uint32_t block = batch.block(piece, i);
    if (--batch.plan.num_pieces[block] == 0 && batch.status[block] == 0) batch.to_verify.push_back(block);
  }
}

void SsdTransfer::verify(Batch& batch) {
  for (const std::uint32_t block : batch.to_verify) {
    const std::uint64_t found = checksum({pool_block(batch.pool_blocks[block]), layout_.block_bytes});
    if (batch.kind == IoKind::kWrite) {
      batch.computed[block] = found;
    } else if (found != batch.expected[block]) {
      batch.status[block] = EBADMSG;
    }
  }
  batch.to_verify.clear();
}

void SsdTransfer::copy_bounce(const Batch& batch, std::uint32_t tag) {
  const Piece& piece = flights_[tag].piece;
  for (std::uint32_t i = 0; i < piece.num_blocks; ++i) {
    std::byte* block = pool_block(batch.pool_blocks[batch.block(piece, i)]) + piece.in_slot;
    std::byte* slot = bounce_of(tag) + i * layout_.slot_bytes();
    const std::uint64_t room = piece.num_blocks > 1 ? layout_.slot_bytes() : piece.bytes;
    const std::uint64_t bytes = std::min(room, layout_.block_bytes - std::min(layout_.block_bytes, piece.in_slot));
    if (batch.kind == IoKind::kRead) {
      std::memcpy(block, slot, bytes);
      continue;
    }
    std::memcpy(slot, block, bytes);
    std::memset(slot + bytes, 0, room - bytes);
  }
}

}  // namespace flexkv
