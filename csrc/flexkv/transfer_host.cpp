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
// the bytes are not needed again soon. Measured by benchmarks/bench_flexkv_copy.py: 64 KB runs gain a third.
constexpr int64_t kStreamBytes = 2048;
// Smaller copies stay on the calling thread: waking another one costs more than it saves.
constexpr int64_t kBytesPerThread = 256 * 1024;
// What a thread takes at a time.
constexpr int64_t kChunkBytes = 512 * 1024;

#if defined(__x86_64__)
void stream_copy(std::byte* to, const std::byte* from, int64_t size) {
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63U);
  std::memcpy(to, from, static_cast<size_t>(head));
  to += head, from += head, size -= head;
  for (; size >= 64; to += 64, from += 64, size -= 64) {
    const auto* in = reinterpret_cast<const __m128i*>(from);
    auto* out = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a), _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c), _mm_stream_si128(out + 3, d);
  }
  std::memcpy(to, from, static_cast<size_t>(size));
}
// Streamed stores become visible to other threads in order with what follows.
void stream_end() { _mm_sfence(); }
#else
void stream_copy(std::byte* to, const std::byte* from, int64_t size) {
  std::memcpy(to, from, static_cast<size_t>(size));
}
void stream_end() {}
#endif

void copy_run(std::byte* to, const std::byte* from, int64_t size) {
  if (size >= kStreamBytes) {
    stream_copy(to, from, size);
  } else {
    std::memcpy(to, from, static_cast<size_t>(size));
  }
}

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

void HostTransfer::copy_layer_block(Direction direction, std::byte* device, std::byte* pool) const {
  std::vector<int64_t> index(outer_.size(), 0);
  for (;;) {
    direction == Direction::kToPool ? copy_run(pool, device, run_bytes_) : copy_run(device, pool, run_bytes_);
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
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < num_units;) {
      for (int64_t unit = begin; unit < std::min(begin + chunk, num_units); ++unit) {
        const auto i = static_cast<size_t>(unit / num_layers);
        const int64_t layer = first_layer + unit % num_layers;
        std::byte* device = device_.layers[static_cast<size_t>(layer)] + device_blocks[i] * device_.block_stride;
        std::byte* pool =
            pool_.base + pool_blocks[i] * pool_.block_stride + pool_.offset + layer * layer_bytes_;
        copy_layer_block(direction, device, pool);
      }
    }
    stream_end();
  };
  std::lock_guard lock(copying_);
  if (num_units * layer_bytes_ < 2 * kBytesPerThread) {
    work();
  } else {
    crew_.run(work);
  }
}

}  // namespace flexkv
