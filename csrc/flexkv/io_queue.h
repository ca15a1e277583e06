// The one door to the operating system for reads and writes of open files: many requests in flight, completions in any
// order. io_uring and a pool of threads implement it; tests put one in between that injects faults.
//
//     push push push -> submit -> wait -> completions (each tag once)
//
// A queue belongs to one thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

namespace flexkv {

using Clock = std::chrono::steady_clock;

enum class IoKind : std::uint8_t { kRead, kWrite };

struct IoRequest {
  IoKind kind;
  std::uint32_t tag;  // below depth(), and none of those in flight
  std::uint32_t file;  // index into the files the queue was made with
  std::uint32_t bytes;
  std::uint64_t offset;
  std::byte* data;  // read or written until the request's completion has been returned
};

struct IoCompletion {
  std::uint32_t tag;
  std::int32_t result;  // bytes moved, may be fewer than asked; or -errno
};

class IoQueue {
 public:
  virtual ~IoQueue() = default;
  IoQueue() = default;
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  // Most requests that may be in flight.
  virtual std::uint32_t depth() const = 0;

  // Takes a request; it begins with submit() at the latest.
  virtual void push(const IoRequest& request) = 0;

  // Lets what was pushed begin.
  virtual void submit() = 0;

  // Waits for one completion or more, at most until the deadline, and returns how many it wrote to `out`; 0 means that
  // the deadline has passed. REQUIRES: a request is in flight. Throws std::system_error when the queue is broken.
  virtual std::size_t wait(std::span<IoCompletion> out, Clock::time_point deadline) = 0;

  // Asks that all that is in flight be given up. Each request still completes: with -ECANCELED, or with what it came
  // to.
  virtual void cancel_all() = 0;
};

}  // namespace flexkv
