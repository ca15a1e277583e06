#include "io_uring_queue.h"

#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace flexkv {
namespace {

// user_data of a cancellation, which is nobody's completion.
constexpr std::uint64_t kCancellation = ~std::uint64_t{0};
constexpr std::uint32_t kNeededFeatures = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

// The rings' indices are shared with the kernel.
std::uint32_t load(std::uint32_t* index) { return std::atomic_ref(*index).load(std::memory_order_acquire); }
void store(std::uint32_t* index, std::uint32_t value) {
  std::atomic_ref(*index).store(value, std::memory_order_release);
}

void* map(int fd, std::size_t bytes, off_t what) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
  if (address == MAP_FAILED) fail(errno, "cannot map an io_uring");
  return address;
}

std::string refusal(const char* what, int error) {
  std::string text = std::string(what) + ": " + std::strerror(error);
  if (error == ENOMEM) text += " (RLIMIT_MEMLOCK is smaller than it)";
  return text;
}

}  // namespace

IoUringQueue::Mapping::~Mapping() {
  if (address != nullptr) munmap(address, bytes);
}

IoUringQueue::Descriptor::~Descriptor() {
  if (fd >= 0) close(fd);
}

IoUringQueue::IoUringQueue(std::uint32_t depth, std::vector<int> fds, const PinnedMemory& memory)
    : depth_(depth), fds_(std::move(fds)), memory_(memory), in_flight_(depth) {
  io_uring_params params{};
  const long fd = syscall(__NR_io_uring_setup, depth, &params);
  if (fd < 0) fail(errno, "cannot set up an io_uring");
  ring_.fd = static_cast<int>(fd);
  if ((params.features & kNeededFeatures) != kNeededFeatures) fail(EOPNOTSUPP, "this kernel's io_uring is too old");
  map_rings(&params);
  register_files();
  if (memory_.bytes > 0) open_buffer_table();
}

IoUringQueue::~IoUringQueue() = default;

void IoUringQueue::map_rings(const void* raw) {
  const auto& params = *static_cast<const io_uring_params*>(raw);
  rings_.bytes = std::max(params.sq_off.array + params.sq_entries * sizeof(std::uint32_t),
                          params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  rings_.address = map(ring_.fd, rings_.bytes, IORING_OFF_SQ_RING);
  entries_map_.bytes = params.sq_entries * sizeof(io_uring_sqe);
  entries_map_.address = map(ring_.fd, entries_map_.bytes, IORING_OFF_SQES);
  entries_ = static_cast<io_uring_sqe*>(entries_map_.address);
  auto* base = static_cast<std::byte*>(rings_.address);
  const auto word = [base](std::uint32_t offset) { return reinterpret_cast<std::uint32_t*>(base + offset); };
  sq_head_ = word(params.sq_off.head);
  sq_tail_ = word(params.sq_off.tail);
  sq_mask_ = *word(params.sq_off.ring_mask);
  cq_head_ = word(params.cq_off.head);
  cq_tail_ = word(params.cq_off.tail);
  cq_mask_ = *word(params.cq_off.ring_mask);
  completions_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
  // Entry i of the submission ring is always sqe i.
  for (std::uint32_t i = 0; i < params.sq_entries; ++i) word(params.sq_off.array)[i] = i;
}

void IoUringQueue::register_files() {
  const auto count = static_cast<unsigned>(fds_.size());
  files_registered_ = syscall(__NR_io_uring_register, ring_.fd, IORING_REGISTER_FILES, fds_.data(), count) == 0;
  if (!files_registered_) refusals_.push_back(refusal("files are not registered", errno));
}

void IoUringQueue::open_buffer_table() {
  // All empty; `register_piece` fills them.
  std::vector<iovec> pieces(memory_.num_pieces());
  io_uring_rsrc_register table{};
  table.nr = static_cast<std::uint32_t>(pieces.size());
  table.data = reinterpret_cast<std::uintptr_t>(pieces.data());
  if (syscall(__NR_io_uring_register, ring_.fd, IORING_REGISTER_BUFFERS2, &table, sizeof table) != 0) {
    refuse_memory(errno);
    return;
  }
  may_register_ = true;
  is_piece_registered_.resize(pieces.size());
  register_piece(0);
}

bool IoUringQueue::register_piece(std::size_t piece) {
  const std::size_t at = piece * memory_.piece_bytes;
  const iovec buffer{memory_.base + at, std::min(memory_.piece_bytes, memory_.bytes - at)};
  io_uring_rsrc_update2 update{};
  update.offset = static_cast<std::uint32_t>(piece);
  update.data = reinterpret_cast<std::uintptr_t>(&buffer);
  update.nr = 1;
  const long rc = syscall(__NR_io_uring_register, ring_.fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
  if (rc != 1) refuse_memory(rc < 0 ? errno : EINVAL);
  return is_piece_registered_[piece] = rc == 1;
}

void IoUringQueue::refuse_memory(int error) {
  may_register_ = false;  // asked once: what follows would be refused for the same reason
  refusals_.push_back(refusal("the memory pool is not registered, or in part only", error));
}

int IoUringQueue::buffer_of(const std::byte* data, std::size_t bytes) {
  const auto at = static_cast<std::size_t>(data - memory_.base);  // wraps to a huge one for data before it
  if (is_piece_registered_.empty() || at >= memory_.bytes || bytes > memory_.bytes - at) return -1;
  const std::size_t piece = at / memory_.piece_bytes;
  if (piece != (at + bytes - 1) / memory_.piece_bytes) return -1;
  if (!is_piece_registered_[piece]) {
    if (!may_register_) return -1;
    submit();  // it may take a while: the disk should have work
    if (!register_piece(piece)) return -1;
  }
  return static_cast<int>(piece);
}

std::uint32_t IoUringQueue::num_unsubmitted() const { return *sq_tail_ - load(sq_head_); }

io_uring_sqe* IoUringQueue::next_entry() {
  assert(num_unsubmitted() <= sq_mask_);
  io_uring_sqe* entry = &entries_[*sq_tail_ & sq_mask_];
  std::memset(entry, 0, sizeof *entry);
  return entry;
}

void IoUringQueue::push(const IoRequest& request) {
  assert(request.tag < depth_ && !in_flight_[request.tag] && request.file < fds_.size());
  const int buffer = buffer_of(request.data, request.bytes);
  io_uring_sqe* entry = next_entry();
  if (request.kind == IoKind::kRead) {
    entry->opcode = buffer >= 0 ? IORING_OP_READ_FIXED : IORING_OP_READ;
  } else {
    entry->opcode = buffer >= 0 ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
  }
  if (buffer >= 0) entry->buf_index = static_cast<std::uint16_t>(buffer);
  entry->fd = files_registered_ ? static_cast<int>(request.file) : fds_[request.file];
  if (files_registered_) entry->flags = IOSQE_FIXED_FILE;
  entry->off = request.offset;
  entry->addr = reinterpret_cast<std::uintptr_t>(request.data);
  entry->len = request.bytes;
  entry->user_data = request.tag;
  in_flight_[request.tag] = true;
  ++num_in_flight_;
  store(sq_tail_, *sq_tail_ + 1);
}

int IoUringQueue::enter(std::uint32_t to_submit, std::uint32_t min_complete, Clock::time_point deadline) {
  const auto left = std::max(Clock::duration::zero(), deadline - Clock::now());
  const auto whole = std::chrono::floor<std::chrono::seconds>(left);
  __kernel_timespec timeout{whole.count(), std::chrono::nanoseconds(left - whole).count()};
  io_uring_getevents_arg argument{};
  argument.ts = reinterpret_cast<std::uintptr_t>(&timeout);
  const unsigned flags = min_complete > 0 ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0;
  const long rc = syscall(__NR_io_uring_enter, ring_.fd, to_submit, min_complete, flags,
                          min_complete > 0 ? &argument : nullptr, min_complete > 0 ? sizeof argument : 0);
  return rc >= 0 ? 0 : errno;
}

void IoUringQueue::submit() {
  // The kernel may take a part only; without memory for more, wait() tries again once something has completed.
  while (num_unsubmitted() > 0) {
    const int error = enter(num_unsubmitted(), 0, Clock::time_point{});
    if (error == EAGAIN || error == EBUSY || error == ENOMEM) return;
    if (error != 0 && error != EINTR) fail(error, "io_uring takes no requests");
  }
}

std::size_t IoUringQueue::reap(std::span<IoCompletion> out) {
  std::size_t count = 0;
  while (count < out.size() && !refused_.empty()) {
    out[count++] = refused_.back();
    refused_.pop_back();
  }
  std::uint32_t head = *cq_head_;
  for (const std::uint32_t tail = load(cq_tail_); head != tail && count < out.size(); ++head) {
    const io_uring_cqe& entry = completions_[head & cq_mask_];
    if (entry.user_data == kCancellation) continue;
    const auto tag = static_cast<std::uint32_t>(entry.user_data);
    in_flight_[tag] = false;
    --num_in_flight_;
    out[count++] = {tag, entry.res};
  }
  store(cq_head_, head);
  return count;
}

void IoUringQueue::take_back(std::int32_t result) {
  const std::uint32_t head = load(sq_head_);
  for (std::uint32_t at = head; at != *sq_tail_; ++at) {
    const std::uint64_t tag = entries_[at & sq_mask_].user_data;
    if (tag == kCancellation) continue;
    in_flight_[tag] = false;
    --num_in_flight_;
    refused_.push_back({static_cast<std::uint32_t>(tag), result});
  }
  store(sq_tail_, head);  // the kernel looks at it only inside io_uring_enter
}

std::size_t IoUringQueue::wait(std::span<IoCompletion> out, Clock::time_point deadline) {
  for (;;) {
    if (const std::size_t count = reap(out); count > 0) return count;
    if (Clock::now() >= deadline) return 0;
    int error = enter(num_unsubmitted(), 1, deadline);
    if (error == EAGAIN || error == EBUSY || error == ENOMEM) {
      // No memory for what is left to submit: wait for what runs, or let the caller decide how often it tries again.
      if (num_in_flight_ == num_unsubmitted()) take_back(-EAGAIN);
      error = num_in_flight_ > 0 ? enter(0, 1, deadline) : 0;
    }
    if (error != 0 && error != EINTR && error != ETIME && error != EBUSY) fail(error, "io_uring gives no completions");
  }
}

void IoUringQueue::cancel_all() {
  take_back(-ECANCELED);
  for (std::uint32_t tag = 0; tag < depth_; ++tag) {
    if (!in_flight_[tag]) continue;
    io_uring_sqe* entry = next_entry();
    entry->opcode = IORING_OP_ASYNC_CANCEL;
    entry->fd = -1;
    entry->addr = tag;
    entry->user_data = kCancellation;
    store(sq_tail_, *sq_tail_ + 1);
  }
  submit();
}

}  // namespace flexkv
