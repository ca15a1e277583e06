#include "transfer_host.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace flexkv {
namespace {

// Runs of at least this many bytes bypass the cache: a store that misses would first read the line it overwrites, and
// the bytes are not needed again soon.
constexpr int64_t kStreamBytes = 2048;
// Copied as this many streams in lockstep: one alone leaves the memory system waiting. With 64 KB runs on two threads
// of a Xeon with AVX-512: memcpy per run 62%, one stream 75%, four 96% of one large memcpy.
constexpr int64_t kStreams = 4;
// Smaller copies stay on the calling thread: waking another one costs more than it saves.
constexpr int64_t kBytesPerThread = 256 * 1024;
// What a thread takes at a time.
constexpr int64_t kChunkBytes = 512 * 1024;

constexpr int64_t kLine = 64;

// One stream of a copy.
struct Run {
  std::byte* to;
  const std::byte* from;
};

#if defined(__x86_64__)
void stream_line(std::byte* to, const std::byte* from) {
  const auto* in = reinterpret_cast<const __m128i*>(from);
  auto* out = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
  const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
  _mm_stream_si128(out, a), _mm_stream_si128(out + 1, b);
  _mm_stream_si128(out + 2, c), _mm_stream_si128(out + 3, d);
}
void prefetch(const std::byte* address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0); }
// Streamed stores become visible to other threads in order with what follows.
void stream_end() { _mm_sfence(); }
#else
void stream_line(std::byte* to, const std::byte* from) { std::memcpy(to, from, kLine); }
void prefetch(const std::byte*) {}
void stream_end() {}
#endif

// Copies one run of `size` bytes, whatever its alignment.
void stream_one(Run run, int64_t size) {
  const int64_t head = std::min<int64_t>(size, -reinterpret_cast<intptr_t>(run.to) & (kLine - 1));
  std::memcpy(run.to, run.from, static_cast<size_t>(head));
  int64_t done = head;
  for (; done + kLine <= size; done += kLine) stream_line(run.to + done, run.from + done);
  std::memcpy(run.to + done, run.from + done, static_cast<size_t>(size - done));
}

// Copies kStreams runs of `size` bytes each, two lines of one, two of the next, and so on.
void stream_four(const Run* runs, int64_t size) {
  constexpr int64_t kStep = 2 * kLine;
  int64_t done = 0;
  for (; done + kStep <= size; done += kStep) {
    for (int64_t i = 0; i < kStreams; ++i) {
      const Run& run = runs[i];
      prefetch(run.from + done + kStep);
      prefetch(run.from + done + kStep + kLine);
      stream_line(run.to + done, run.from + done);
      stream_line(run.to + done + kLine, run.from + done + kLine);
    }
  }
  for (int64_t i = 0; i < kStreams; ++i) {
    std::memcpy(runs[i].to + done, runs[i].from + done, static_cast<size_t>(size - done));
  }
}

// Gathers runs of one size until there are enough to copy in lockstep.
class RunCopier {
 public:
  explicit RunCopier(int64_t run_bytes) : run_bytes_(run_bytes) {}

  void copy(Run run) {
    const bool is_aligned = (reinterpret_cast<uintptr_t>(run.to) & (kLine - 1)) == 0;
    if (run_bytes_ < kStreamBytes) {
      std::memcpy(run.to, run.from, static_cast<size_t>(run_bytes_));
    } else if (!is_aligned) {
      stream_one(run, run_bytes_);
    } else if (run_bytes_ >= kStreams * kStreamBytes) {
      copy_large(run);
    } else {
      gathered_[num_gathered_++] = run;
      if (num_gathered_ == kStreams) {
        stream_four(gathered_, run_bytes_);
        num_gathered_ = 0;
      }
    }
  }

  // Copies what is left over and orders all copies before what follows.
  void finish() {
    for (int64_t i = 0; i < num_gathered_; ++i) stream_one(gathered_[i], run_bytes_);
    num_gathered_ = 0;
    stream_end();
  }

 private:
  // A large run is its own four streams, and a tail.
  void copy_large(Run run) const {
    const int64_t part = run_bytes_ / kStreams / kLine * kLine;
    Run parts[kStreams];
    for (int64_t i = 0; i < kStreams; ++i) parts[i] = {run.to + i * part, run.from + i * part};
    stream_four(parts, part);
    const int64_t done = kStreams * part;
    std::memcpy(run.to + done, run.from + done, static_cast<size_t>(run_bytes_ - done));
  }

  const int64_t run_bytes_;
  Run gathered_[kStreams] = {};
  int64_t num_gathered_ = 0;
};

void check_ids(const char* side, std::span<const int64_t> ids, int64_t num_blocks) {
  for (const int64_t id : ids) {
    if (id < 0 || id >= num_blocks) {
      throw std::out_of_range(std::string(side) + " block " + std::to_string(id) + " is not in 0.." +
                              std::to_string(num_blocks - 1));
    }
  }
}

}  // namespace

ThreadCrew::ThreadCrew(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  threads_.reserve(static_cast<size_t>(num_threads) - 1);
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
}

ThreadCrew::~ThreadCrew() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadCrew::run(const std::function<void()>& work) {
  {
    std::lock_guard lock(mutex_);
    work_ = &work;
    running_ = static_cast<int>(threads_.size());
    ++generation_;
  }
  wake_.notify_all();
  work();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
  work_ = nullptr;
}

void ThreadCrew::serve() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    const std::function<void()>* work = work_;
    lock.unlock();
    (*work)();
    lock.lock();
    if (--running_ == 0) done_.notify_one();
  }
}

HostTransfer::HostTransfer(DeviceSide device, PoolSide pool, int num_threads)
    : device_(std::move(device)), pool_(pool), crew_(num_threads) {
  if (device_.layers.empty() || device_.element_bytes < 1) throw std::invalid_argument("no layers, or empty elements");
  layer_bytes_ = device_.element_bytes;
  for (const Dim& dim : device_.dims) {
    if (dim.size < 1) throw std::invalid_argument("a dimension of a block has no elements");
    layer_bytes_ *= dim.size;
  }
  const int64_t slice = layer_bytes_ * static_cast<int64_t>(device_.layers.size());
  if (pool_.offset < 0 || pool_.offset + slice > pool_.block_stride) {
    throw std::invalid_argument("a block of " + std::to_string(slice) + " bytes at offset " +
                                std::to_string(pool_.offset) + " exceeds the pool's block of " +
                                std::to_string(pool_.block_stride) + " bytes");
  }
  outer_ = device_.dims;
  run_bytes_ = device_.element_bytes;
  while (!outer_.empty() && (outer_.back().stride == run_bytes_ || outer_.back().size == 1)) {
    run_bytes_ *= outer_.back().size;
    outer_.pop_back();
  }
}

void HostTransfer::check(std::span<const int64_t> device_blocks, std::span<const int64_t> pool_blocks,
                         int64_t first_layer, int64_t num_layers) const {
  if (device_blocks.size() != pool_blocks.size()) throw std::invalid_argument("as many source as destination blocks");
  const auto layers = static_cast<int64_t>(device_.layers.size());
  if (first_layer < 0 || num_layers < 0 || first_layer > layers - num_layers) {
    throw std::out_of_range("layers " + std::to_string(first_layer) + ".." + std::to_string(first_layer + num_layers) +
                            " are not within the " + std::to_string(layers) + " registered");
  }
  check_ids("device", device_blocks, device_.num_blocks);
  check_ids("pool", pool_blocks, pool_.num_blocks);
}

template <typename Emit>
void HostTransfer::for_each_run(std::byte* device, std::byte* pool, const Emit& emit) const {
  std::vector<int64_t> index(outer_.size(), 0);
  for (;;) {
    emit(device, pool);
    pool += run_bytes_;
    size_t d = outer_.size();
    for (;;) {  // an odometer over the outer dimensions, the last one turning fastest
      if (d == 0) return;
      --d;
      device += outer_[d].stride;
      if (++index[d] < outer_[d].size) break;
      device -= outer_[d].stride * outer_[d].size;
      index[d] = 0;
    }
  }
}

void HostTransfer::copy(Direction direction, std::span<const int64_t> device_blocks,
                        std::span<const int64_t> pool_blocks, int64_t first_layer, int64_t num_layers) {
  check(device_blocks, pool_blocks, first_layer, num_layers);
  // A unit is one layer of one block; block-major, so that a thread walks the pool in order.
  const int64_t num_units = static_cast<int64_t>(device_blocks.size()) * num_layers;
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / layer_bytes_);
  std::atomic<int64_t> next{0};
  const std::function<void()> work = [&] {
    RunCopier copier(run_bytes_);
    const auto emit = [&](std::byte* on_device, std::byte* in_pool) {
      copier.copy(direction == Direction::kToPool ? Run{in_pool, on_device} : Run{on_device, in_pool});
    };
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < num_units;) {
      for (int64_t unit = begin; unit < std::min(begin + chunk, num_units); ++unit) {
        const auto i = static_cast<size_t>(unit / num_layers);
        const int64_t layer = first_layer + unit % num_layers;
        std::byte* device = device_.layers[static_cast<size_t>(layer)] + device_blocks[i] * device_.block_stride;
        std::byte* pool =
            pool_.base + pool_blocks[i] * pool_.block_stride + pool_.offset + layer * layer_bytes_;
        for_each_run(device, pool, emit);
      }
    }
    copier.finish();
  };
  std::lock_guard lock(copying_);
  if (num_units * layer_bytes_ < 2 * kBytesPerThread) {
    work();
  } else {
    crew_.run(work);
  }
}

}  // namespace flexkv
