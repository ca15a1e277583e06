#include "transfer_ssd.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <system_error>
#include <thread>

#include "checksum.h"
#include "io_thread_queue.h"

namespace {

using namespace std::chrono_literals;
using flexkv::Clock;
using flexkv::IoCompletion;
using flexkv::IoKind;
using flexkv::IoQueue;
using flexkv::IoRequest;
using flexkv::SsdBackend;
using flexkv::SsdLayout;
using flexkv::SsdOptions;
using flexkv::SsdTransfer;
using Ids = std::vector<std::int64_t>;

// What becomes of a request.
struct Fate {
  enum { kPass, kAnswer, kHang, kLost } kind = kPass;
  std::int32_t result = 0;    // kAnswer
  std::uint32_t bytes = ~0u;  // kPass: at most this many are moved
};

// Stands between the transfer and a real queue. Hanging requests end when cancelled, lost ones never do.
class FaultyQueue final : public IoQueue {
 public:
  using Decide = std::function<Fate(const IoRequest&)>;
  FaultyQueue(std::unique_ptr<IoQueue> inner, Decide decide) : inner_(std::move(inner)), decide_(std::move(decide)) {}

  std::uint32_t depth() const override { return inner_->depth(); }
  void push(const IoRequest& request) override {
    const Fate fate = decide_(request);
    if (fate.kind == Fate::kAnswer) answers_.push_back({request.tag, fate.result});
    if (fate.kind == Fate::kHang) hanging_.push_back(request.tag);
    if (fate.kind != Fate::kPass) return;
    IoRequest passed = request;
    passed.bytes = std::min(request.bytes, fate.bytes);
    inner_->push(passed);
    ++num_passed_;
  }
  void submit() override { inner_->submit(); }
  std::size_t wait(std::span<IoCompletion> out, Clock::time_point deadline) override {
    std::size_t count = 0;
    for (; count < out.size() && !answers_.empty(); answers_.pop_back()) out[count++] = answers_.back();
    if (count > 0) return count;
    if (num_passed_ == 0) return 0;  // only what hangs is left: as if the deadline had passed
    count = inner_->wait(out, deadline);
    num_passed_ -= count;
    return count;
  }
  void cancel_all() override {
    for (const std::uint32_t tag : hanging_) answers_.push_back({tag, -ECANCELED});
    hanging_.clear();
    inner_->cancel_all();
  }

 private:
  std::unique_ptr<IoQueue> inner_;
  Decide decide_;
  std::vector<IoCompletion> answers_;
  std::vector<std::uint32_t> hanging_;
  std::size_t num_passed_ = 0;
};

// Files in a directory of their own, and a pool of random bytes.
struct Store {
  std::filesystem::path directory;
  SsdLayout layout;
  std::vector<std::string> paths;
  std::int64_t stride, num_blocks;
  std::unique_ptr<std::byte, decltype(&std::free)> memory{nullptr, &std::free};

  explicit Store(std::uint64_t block_bytes = 8192, std::int64_t stride = 8192, std::uint32_t num_files = 2,
                 std::int64_t num_slots = 24)
      : layout{block_bytes, num_slots, num_files}, stride(stride), num_blocks(num_slots) {
    std::string name = "/tmp/kvstrata-ssd-XXXXXX";
    directory = mkdtemp(name.data());
    for (std::uint32_t file = 0; file < num_files; ++file) {
      paths.push_back(directory / std::to_string(file));
      const int fd = open(paths.back().c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
      REQUIRE(ftruncate(fd, static_cast<off_t>(layout.file_bytes(file))) == 0);
      close(fd);
    }
    const auto bytes = static_cast<std::size_t>(num_blocks * stride);
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    std::mt19937 random(3);
    for (std::size_t i = 0; i < bytes; ++i) memory.get()[i] = static_cast<std::byte>(random());
  }
  ~Store() { std::filesystem::remove_all(directory); }

  flexkv::PoolSide pool() { return {memory.get(), num_blocks, stride, 0}; }
  std::vector<std::byte> block(std::int64_t id) const {
    const std::byte* begin = memory.get() + id * stride;
    return {begin, begin + layout.block_bytes};
  }
  void clear_pool() { std::fill_n(memory.get(), num_blocks * stride, std::byte{0}); }
  SsdTransfer::MakeQueue faulty(FaultyQueue::Decide decide) {
    return [decide](const std::vector<int>& fds) {
      return std::make_unique<FaultyQueue>(std::make_unique<flexkv::IoThreadQueue>(4, fds, 3), decide);
    };
  }
};

Ids all_ids(std::int64_t count) {
  Ids ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

Clock::time_point soon() { return Clock::now() + 60s; }

SsdOptions small_io(SsdBackend backend = SsdBackend::kAuto) {
  SsdOptions options;
  options.queue_depth = 4;
  options.io_bytes = 16384;
  options.backend = backend;
  return options;
}

struct Written {
  std::vector<std::int32_t> status;
  std::vector<std::uint64_t> checksums;
};

Written write(SsdTransfer& transfer, const Ids& slots, const Ids& blocks, Clock::time_point deadline = soon()) {
  Written result{std::vector<std::int32_t>(slots.size(), -1), std::vector<std::uint64_t>(slots.size())};
  transfer.write(slots, blocks, deadline, result.status, result.checksums);
  return result;
}

std::vector<std::int32_t> read(SsdTransfer& transfer, const Ids& slots, const Ids& blocks,
                               const std::vector<std::uint64_t>& checksums, Clock::time_point deadline = soon()) {
  std::vector<std::int32_t> status(slots.size(), -1);
  transfer.read(slots, blocks, checksums, deadline, status);
  return status;
}

bool all_zero(const std::vector<std::int32_t>& status) {
  return std::all_of(status.begin(), status.end(), [](std::int32_t s) { return s == 0; });
}

// Writes all blocks to slots in another order, clears the pool, reads them back into yet another.
void check_round_trip(Store& store, SsdTransfer& transfer) {
  const Ids blocks = all_ids(store.num_blocks);
  Ids slots(blocks.rbegin(), blocks.rend()), targets = blocks;
  std::rotate(targets.begin(), targets.begin() + 5, targets.end());
  std::vector<std::vector<std::byte>> wanted;
  for (const std::int64_t id : blocks) wanted.push_back(store.block(id));
  const Written written = write(transfer, slots, blocks);
  REQUIRE(all_zero(written.status));
  for (const std::int64_t id : blocks) {
    CHECK(written.checksums[static_cast<std::size_t>(id)] == flexkv::checksum(wanted[static_cast<std::size_t>(id)]));
  }
  store.clear_pool();
  REQUIRE(all_zero(read(transfer, slots, targets, written.checksums)));
  for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(store.block(targets[i]) == wanted[i]);
}

bool forbid_io_uring() {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

}  // namespace

TEST_CASE("blocks survive the round trip, whatever their size, stride and number of files") {
  for (const SsdBackend backend : {SsdBackend::kThreads, SsdBackend::kAuto}) {
    for (const std::uint32_t files : {1u, 2u, 3u}) {
      for (const auto& [bytes, stride] : {std::pair{8192, 8192},  // in place, neighbours joined
                                          {4096, 12288},          // in place, never neighbours in memory
                                          {9000, 12288},          // in place, padding included
                                          {5000, 5000},           // bounced
                                          {40960, 40960},         // cut into parts
                                          {41000, 41001}}) {      // bounced parts, the last one mostly padding
        Store store(static_cast<std::uint64_t>(bytes), stride, files);
        SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(backend));
        CHECK(transfer.is_bounced() == (stride % 4096 != 0));
        check_round_trip(store, transfer);
        transfer.sync();
      }
    }
  }
}

TEST_CASE("short reads and writes, and interrupted ones, are continued") {
  for (const std::int64_t stride : {40960, 40961}) {
    Store store(40960, stride);
    std::mt19937 random(5);
    const auto decide = [&](const IoRequest& request) -> Fate {
      switch (random() % 5) {
        case 0: return {Fate::kAnswer, -EAGAIN, 0};
        case 1: return {Fate::kAnswer, -EINTR, 0};
        case 2: return {Fate::kPass, 0, static_cast<std::uint32_t>(1 + random() % request.bytes)};
        default: return {};
      }
    };
    SsdOptions options = small_io();
    options.direct = false;  // the odd lengths that are let through are not for direct I/O
    SsdTransfer transfer(store.layout, store.paths, store.pool(), options, store.faulty(decide));
    check_round_trip(store, transfer);
    CHECK(transfer.counters().num_short > 0);
    CHECK(transfer.counters().num_repeated > 0);
  }
}

TEST_CASE("an error is the failing block's alone, also when its neighbours shared its request") {
  for (const std::int32_t error : {EIO, ENOSPC}) {
    Store store(4096, 4096, 1);
    // Fails whatever touches slot 9.
    const auto decide = [&](const IoRequest& request) -> Fate {
      const bool hit = request.offset <= 9 * 4096 && 9 * 4096 < request.offset + request.bytes;
      return hit ? Fate{Fate::kAnswer, -error, 0} : Fate{};
    };
    SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(), store.faulty(decide));
    const Ids ids = all_ids(24);
    Written written = write(transfer, ids, ids);
    for (std::size_t i = 0; i < 24; ++i) CHECK(written.status[i] == (i == 9 ? error : 0));
    const std::vector<std::int32_t> status = read(transfer, ids, ids, written.checksums);
    for (std::size_t i = 0; i < 24; ++i) CHECK(status[i] == (i == 9 ? error : 0));
  }
}

TEST_CASE("one failed part fails its block") {
  Store store(65536, 65536, 1);
  const auto decide = [](const IoRequest& request) -> Fate {
    return request.offset == 65536 + 16384 ? Fate{Fate::kAnswer, -EIO, 0} : Fate{};
  };
  SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(), store.faulty(decide));
  const Written written = write(transfer, {0, 1, 2}, {0, 1, 2});
  CHECK(written.status == std::vector<std::int32_t>{0, EIO, 0});
}

TEST_CASE("a request that never gets further ends as an error") {
  Store store;
  for (const Fate fate : {Fate{Fate::kAnswer, -EAGAIN, 0}, Fate{Fate::kAnswer, 100, 0}, Fate{Fate::kAnswer, 0, 0}}) {
    SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(),
                         store.faulty([&](const IoRequest&) { return fate; }));
    const Written written = write(transfer, {3, 4}, {0, 1});
    const std::int32_t wanted = fate.result < 0 ? EAGAIN : EIO;
    CHECK(written.status == std::vector<std::int32_t>{wanted, wanted});
  }
}

TEST_CASE("a flipped bit on disk is told") {
  for (const SsdBackend backend : {SsdBackend::kThreads, SsdBackend::kAuto}) {
    Store store(5000, 5000, 1);
    SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(backend));
    const Ids ids = all_ids(24);
    const Written written = write(transfer, ids, ids);
    const int fd = open(store.paths[0].c_str(), O_RDWR);
    char byte;
    REQUIRE(pread(fd, &byte, 1, 7 * 8192 + 4999) == 1);
    byte ^= 4;
    REQUIRE(pwrite(fd, &byte, 1, 7 * 8192 + 4999) == 1);
    REQUIRE(pwrite(fd, &byte, 1, 8 * 8192 + 5000) == 1);  // padding
    fsync(fd);
    close(fd);
    const std::vector<std::int32_t> status = read(transfer, ids, ids, written.checksums);
    for (std::size_t i = 0; i < 24; ++i) CHECK(status[i] == (i == 7 ? EBADMSG : 0));
  }
}

TEST_CASE("at the deadline what hangs is cancelled, and the transfer stays usable") {
  Store store;
  bool is_hanging = true;
  const auto decide = [&](const IoRequest& request) -> Fate {
    return is_hanging && request.file == 1 ? Fate{Fate::kHang, 0, 0} : Fate{};
  };
  SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(), store.faulty(decide));
  const Ids ids = all_ids(24);
  const Written written = write(transfer, ids, ids, Clock::now() + 1s);
  for (std::size_t i = 0; i < 24; ++i) {
    const bool is_plausible = written.status[i] == ETIMEDOUT || (i % 2 == 0 && written.status[i] == 0);
    CHECK(is_plausible);
  }
  is_hanging = false;
  check_round_trip(store, transfer);
}

TEST_CASE("a deadline already past moves nothing that stays in flight") {
  for (const SsdBackend backend : {SsdBackend::kThreads, SsdBackend::kAuto}) {
    Store store(1 << 20, 1 << 20, 2, 8);
    SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io(backend));
    const Ids ids = all_ids(8);
    for (int round = 0; round < 20; ++round) {
      for (const std::int32_t status : write(transfer, ids, ids, Clock::now()).status) {
        CHECK((status == ETIMEDOUT || status == 0));
      }
    }
    check_round_trip(store, transfer);
  }
}

TEST_CASE("a request the system never gives back makes its block untouchable and the transfer unusable") {
  Store store;
  const auto decide = [](const IoRequest& request) -> Fate {
    return request.offset == 0 && request.file == 0 ? Fate{Fate::kLost, 0, 0} : Fate{};
  };
  SsdOptions options = small_io();
  options.drain_timeout = 1ms;
  SsdTransfer transfer(store.layout, store.paths, store.pool(), options, store.faulty(decide));
  const Written written = write(transfer, {0, 1}, {0, 1}, Clock::now() + 10s);
  CHECK(written.status == std::vector<std::int32_t>{EINPROGRESS, 0});
  CHECK_THROWS_AS(write(transfer, {1}, {1}), flexkv::SsdTransferError);
}

TEST_CASE("without io_uring threads take over and say so, unless it was asked for by name") {
  Store store(8192, 8192, 1);
  // As in a container whose seccomp profile refuses it. A filter is its thread's, and that of the threads it starts.
  std::thread([&] {
    if (!forbid_io_uring()) {
      MESSAGE("not tested: no seccomp filters here");
      return;
    }
    SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io());
    CHECK_FALSE(transfer.is_io_uring());
    CHECK(transfer.fallbacks().back() ==
          "threads instead of io_uring: cannot set up an io_uring: Operation not permitted");
    check_round_trip(store, transfer);
    const auto forced = [&] { SsdTransfer(store.layout, store.paths, store.pool(), small_io(SsdBackend::kIoUring)); };
    CHECK_THROWS_AS(forced(), std::system_error);
  }).join();
}

TEST_CASE("what makes no sense is refused before any byte moves") {
  Store store;
  SsdTransfer transfer(store.layout, store.paths, store.pool(), small_io());
  CHECK_THROWS_AS(write(transfer, {24}, {0}), std::out_of_range);
  CHECK_THROWS_AS(write(transfer, {0}, {-1}), std::out_of_range);
  CHECK_THROWS_AS(write(transfer, {0, 1}, {0}), std::invalid_argument);
  CHECK_THROWS_AS(write(transfer, {3, 3}, {0, 1}), std::invalid_argument);
  CHECK_THROWS_AS(read(transfer, {3, 4}, {1, 1}, {0, 0}), std::invalid_argument);
  CHECK(write(transfer, {}, {}).status.empty());

  SsdOptions options;
  options.io_bytes = 1000;
  CHECK_THROWS_AS(SsdTransfer(store.layout, store.paths, store.pool(), options), std::invalid_argument);
  options = {};
  options.queue_depth = 0;
  CHECK_THROWS_AS(SsdTransfer(store.layout, store.paths, store.pool(), options), std::invalid_argument);
  SsdLayout larger = store.layout;
  larger.num_slots = 26;
  CHECK_THROWS_AS(SsdTransfer(larger, store.paths, store.pool(), {}), std::system_error);
  CHECK_THROWS_AS(SsdTransfer(store.layout, {"/nowhere/a", "/nowhere/b"}, store.pool(), {}), std::system_error);
}
