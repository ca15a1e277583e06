#include "io_queue.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "io_thread_queue.h"
#include "io_uring_queue.h"

namespace {

using namespace std::chrono_literals;
using flexkv::Clock;
using flexkv::IoCompletion;
using flexkv::IoKind;
using flexkv::IoQueue;

struct TemporaryFile {
  int fd;
  TemporaryFile() {
    std::string path = "/tmp/kvstrata-io-queue-XXXXXX";
    fd = mkstemp(path.data());
    unlink(path.c_str());
  }
  ~TemporaryFile() { close(fd); }
};

using Make = std::function<std::unique_ptr<IoQueue>(std::uint32_t depth, std::vector<int> fds)>;

std::vector<Make> all_queues() {
  std::vector<Make> makes = {[](std::uint32_t depth, std::vector<int> fds) -> std::unique_ptr<IoQueue> {
    return std::make_unique<flexkv::IoThreadQueue>(depth, std::move(fds), 3);
  }};
  const Make uring = [](std::uint32_t depth, std::vector<int> fds) -> std::unique_ptr<IoQueue> {
    return std::make_unique<flexkv::IoUringQueue>(depth, std::move(fds), flexkv::PinnedMemory{});
  };
  try {
    uring(1, {});
    makes.push_back(uring);
  } catch (const std::system_error& error) {
    MESSAGE("io_uring is not tested: ", error.what());
  }
  return makes;
}

Clock::time_point soon() { return Clock::now() + 60s; }

}  // namespace

TEST_CASE("the rings wrap: many more requests than entries, each completes once") {
  for (const Make& make : all_queues()) {
    const TemporaryFile file;
    REQUIRE(ftruncate(file.fd, 1000 * 8) == 0);
    const auto queue = make(3, {file.fd});
    std::vector<std::uint64_t> values(1000);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = i * 7;
    std::vector<std::uint64_t> back(values.size());
    for (const IoKind kind : {IoKind::kWrite, IoKind::kRead}) {
      std::uint64_t* data = kind == IoKind::kWrite ? values.data() : back.data();
      std::vector<std::uint32_t> free_tags = {0, 1, 2};
      std::size_t next = 0, done = 0;
      while (done < values.size()) {
        while (next < values.size() && !free_tags.empty()) {
          queue->push({kind, free_tags.back(), 0, 8, next * 8, reinterpret_cast<std::byte*>(data + next)});
          free_tags.pop_back();
          ++next;
        }
        queue->submit();
        IoCompletion out[2];
        const std::size_t count = queue->wait(out, soon());
        REQUIRE(count > 0);
        for (std::size_t i = 0; i < count; ++i) {
          REQUIRE(out[i].result == 8);
          free_tags.push_back(out[i].tag);
        }
        done += count;
      }
      CHECK(std::set(free_tags.begin(), free_tags.end()).size() == 3);
    }
    CHECK(back == values);
  }
}

TEST_CASE("a failed request tells its errno, the end of a file is a short read") {
  for (const Make& make : all_queues()) {
    const TemporaryFile file;
    REQUIRE(ftruncate(file.fd, 100) == 0);
    const int read_only = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const auto queue = make(4, {file.fd, read_only});
    std::byte data[64] = {};
    queue->push({IoKind::kRead, 0, 0, 64, 80, data});
    queue->push({IoKind::kWrite, 1, 1, 64, 0, data});
    queue->submit();
    std::vector<std::int32_t> results(2);
    for (std::size_t done = 0; done < 2;) {
      IoCompletion out[4];
      const std::size_t count = queue->wait(out, soon());
      REQUIRE(count > 0);
      for (std::size_t i = 0; i < count; ++i) results[out[i].tag] = out[i].result;
      done += count;
    }
    CHECK(results[0] == 20);
    CHECK(results[1] == -EBADF);
    close(read_only);
  }
}

TEST_CASE("io_uring cancels what hangs, and what was never submitted") {
  std::optional<flexkv::IoUringQueue> queue;
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  try {
    queue.emplace(4, std::vector<int>{ends[0]}, flexkv::PinnedMemory{});
  } catch (const std::system_error&) {
    return;
  }
  std::byte data[3][8] = {};
  const auto read_pipe = [&](std::uint32_t tag) {
    queue->push({IoKind::kRead, tag, 0, 8, ~std::uint64_t{0}, data[tag]});
  };
  read_pipe(0);
  read_pipe(1);
  queue->submit();
  IoCompletion out[4];
  CHECK(queue->wait(out, Clock::now() + 1ms) == 0);  // an empty pipe: nothing comes
  read_pipe(2);
  queue->cancel_all();
  std::set<std::uint32_t> cancelled;
  while (cancelled.size() < 3) {
    const std::size_t count = queue->wait(out, soon());
    REQUIRE(count > 0);
    for (std::size_t i = 0; i < count; ++i) {
      CHECK(out[i].result == -ECANCELED);
      cancelled.insert(out[i].tag);
    }
  }
  // The queue goes on working, and late bytes do not reach the memory given back.
  CHECK(write(ends[1], "evidence", 8) == 8);
  CHECK(data[0][0] == std::byte{0});
  read_pipe(0);
  queue->submit();
  REQUIRE(queue->wait(out, soon()) == 1);
  CHECK(out[0].result == 8);
  close(ends[0]);
  close(ends[1]);
}

TEST_CASE("threads drop what waits, and finish what runs") {
  const TemporaryFile file;
  REQUIRE(ftruncate(file.fd, 4096) == 0);
  flexkv::IoThreadQueue queue(64, {file.fd}, 1);
  std::vector<std::byte> data(64 * 8);
  for (std::uint32_t tag = 0; tag < 64; ++tag) queue.push({IoKind::kRead, tag, 0, 8, 0, &data[tag * 8]});
  queue.submit();
  queue.cancel_all();
  std::set<std::uint32_t> seen;
  while (seen.size() < 64) {
    IoCompletion out[64];
    const std::size_t count = queue.wait(out, soon());
    REQUIRE(count > 0);
    for (std::size_t i = 0; i < count; ++i) {
      const bool ended = out[i].result == 8 || out[i].result == -ECANCELED;
      CHECK(ended);
      CHECK(seen.insert(out[i].tag).second);
    }
  }
}

TEST_CASE("registered memory is used in pieces, and requests across pieces or outside still work") {
  const TemporaryFile file;
  REQUIRE(ftruncate(file.fd, 1 << 16) == 0);
  constexpr std::size_t kBytes = 1 << 16;
  const std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(4096, kBytes)), &std::free);
  std::optional<flexkv::IoUringQueue> queue;
  try {
    queue.emplace(4, std::vector<int>{file.fd}, flexkv::PinnedMemory{memory.get(), kBytes, kBytes / 4});
  } catch (const std::system_error&) {
    return;
  }
  std::byte outside[512] = {};
  std::byte* const data[] = {memory.get() + kBytes / 4 * 3, memory.get() + kBytes / 4 - 256, outside, memory.get()};
  for (std::uint32_t tag = 0; tag < 4; ++tag) queue->push({IoKind::kWrite, tag, 0, 512, tag * 512, data[tag]});
  queue->submit();
  std::size_t done = 0;
  while (done < 4) {
    IoCompletion out[4];
    const std::size_t count = queue->wait(out, soon());
    REQUIRE(count > 0);
    for (std::size_t i = 0; i < count; ++i) CHECK(out[i].result == 512);
    done += count;
  }
}
