// Copies KV blocks between an engine's tensors in host-addressable memory and the CPU pool.
//
// Device side: one tensor per layer, any strides. Pool side: BLOCKWISE, a block is one contiguous run.
//
//     layer l, block b of the engine                     block p of the pool
//     layers[l] + b * block_stride                        base + p * block_stride + offset
//       + sum(index[d] * dims[d].stride)   <-- copy -->   | layer 0 | layer 1 | ... |   each layer_bytes
//                                                           `- dims[0] x dims[1] x ... x element, row-major
//
// `offset` is where this rank's slice begins inside a pool block (tensor parallel ranks share a pool).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace flexkv {

struct Dim {
  int64_t size;
  int64_t stride;  // bytes, in the engine's tensor
};

struct DeviceSide {
  std::vector<std::byte*> layers;  // first byte of block 0 of each layer
  int64_t num_blocks = 0;
  int64_t block_stride = 0;   // bytes
  std::vector<Dim> dims;      // what a block of a layer holds, in the order the pool keeps it
  int64_t element_bytes = 0;  // one element, contiguous on both sides
};

struct PoolSide {
  std::byte* base = nullptr;
  int64_t num_blocks = 0;
  int64_t block_stride = 0;  // bytes
  int64_t offset = 0;        // bytes
};

enum class Direction { kToDevice, kToPool };

// Runs a function on several threads at once, the caller being one of them. Threads live as long as the crew.
class ThreadCrew {
 public:
  explicit ThreadCrew(int num_threads);
  ~ThreadCrew();
  ThreadCrew(const ThreadCrew&) = delete;
  ThreadCrew& operator=(const ThreadCrew&) = delete;

  // Calls work() once on each of the threads and returns when all calls have returned. REQUIRES: one caller at a time.
  void run(const std::function<void()>& work);
  int size() const { return static_cast<int>(threads_.size()) + 1; }

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;  // protected by mutex_, as are the next three
  uint64_t generation_ = 0;
  int running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;  // constant after construction
};

class HostTransfer {
 public:
  // Throws std::invalid_argument when the two sides do not describe the same bytes.
  HostTransfer(DeviceSide device, PoolSide pool, int num_threads);

  // Copies block device_blocks[i] <-> pool_blocks[i] for layers [first_layer, first_layer + num_layers).
  // Thread-safe: concurrent calls run one after another. REQUIRES: destination blocks distinct, and nobody else
  // writes either side meanwhile. Throws std::out_of_range, before any byte moved, for a block or layer out of range.
  void copy(Direction direction, std::span<const int64_t> device_blocks, std::span<const int64_t> pool_blocks,
            int64_t first_layer, int64_t num_layers);

  int64_t layer_bytes() const { return layer_bytes_; }

 private:
  void check(std::span<const int64_t> device_blocks, std::span<const int64_t> pool_blocks, int64_t first_layer,
             int64_t num_layers) const;
  // Calls emit(device, pool) for each piece of one layer of a block that is contiguous on both sides.
  template <typename Emit>
  void for_each_run(std::byte* device, std::byte* pool, const Emit& emit) const;

  DeviceSide device_;  // constant after construction, as all below but crew_
  PoolSide pool_;
  std::vector<Dim> outer_;  // dims left after merging those that are contiguous on both sides
  int64_t run_bytes_ = 0;   // bytes contiguous on both sides
  int64_t layer_bytes_ = 0;
  std::mutex copying_;
  ThreadCrew crew_;  // used under copying_
};

}  // namespace flexkv
