#include "attention_paged.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <mutex>
#include <new>
#include <numbers>
#include <stdexcept>
#include <string>

#include "attention_kernel.h"
#include "attention_plan.h"
#include "thread_pool.h"

namespace folovllm {
namespace {

using attention::Item;
using attention::Kernels;
using attention::kPartition;
using attention::RowTile;
using attention::Shape;
using attention::State;
using attention::TokenTile;

constexpr std::size_t kLine = 64;

std::size_t round_to_line(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void check(const AttentionLayout& layout) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("paged attention: " + what); };
  const auto check_range = [&](const char* name, int value, int most) {
    if (value >= 1 && value <= most) return;
    refuse(std::string(name) + "=" + std::to_string(value) + " is not allowed; it must be 1 to " +
           std::to_string(most));
  };
  check_range("num_kv_heads", layout.num_kv_heads, 1 << 12);
  check_range("num_heads", layout.num_heads, 1 << 12);
  check_range("block_size", layout.block_size, 1 << 16);
  check_range("head_size", layout.head_size, 512);
  if (layout.head_size % 2 != 0) refuse("head_size=" + std::to_string(layout.head_size) + " must be even");
  if (layout.num_heads % layout.num_kv_heads != 0) {
    refuse("num_heads=" + std::to_string(layout.num_heads) +
           " must be a multiple of num_kv_heads=" + std::to_string(layout.num_kv_heads));
  }
  if (!std::isfinite(layout.scale) || layout.scale <= 0.0F) {
    refuse("scale=" + std::to_string(layout.scale) + " must be positive and finite");
  }
}

Shape shape_of(const AttentionLayout& layout) {
  const std::int64_t v_offset = std::int64_t{layout.num_kv_heads} * layout.block_size * layout.head_size;
  return {
      .group = layout.num_heads / layout.num_kv_heads,
      .head_size = layout.head_size,
      .padded_head = (layout.head_size + 31) / 32 * 32,
      .block_size = layout.block_size,
      .block_stride = 2 * v_offset,
      .v_offset = v_offset,
      .scale_log2 = layout.scale * std::numbers::log2e_v<float>,
  };
}

// Memory that grows, starts at a cache line and is not cleared.
class Buffer {
 public:
  void reserve(std::size_t bytes) {
    if (bytes <= size_) return;
    memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kLine})));
    size_ = bytes;
  }
  std::byte* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

// Several State in a row in memory; max, sum and acc each start at a cache line.
struct StateLayout {
  std::size_t column;  // bytes of max, and of sum
  std::size_t bytes;   // of one state

  StateLayout(const Shape& shape, int rows)
      : column(round_to_line(static_cast<std::size_t>(rows) * sizeof(float))),
        bytes(2 * column + round_to_line(static_cast<std::size_t>(rows) *
                                         static_cast<std::size_t>(shape.padded_head) * sizeof(float))) {}

  State at(std::byte* memory, int index) const {
    std::byte* const begin = memory + bytes * static_cast<std::size_t>(index);
    return {reinterpret_cast<float*>(begin), reinterpret_cast<float*>(begin + column),
            reinterpret_cast<float*>(begin + 2 * column)};
  }
};

}  // namespace

namespace attention {

#if !defined(__x86_64__)
const Kernels& avx2_kernels(DType dtype) { return portable_kernels(dtype); }
const Kernels& avx512_kernels(DType dtype) { return portable_kernels(dtype); }
const Kernels& avx512_bf16_kernels() { return portable_kernels(DType::kBFloat16); }
const Kernels& amx_kernels() { return portable_kernels(DType::kBFloat16); }
#endif

const Kernels& kernels_of(Isa isa, DType dtype, AttentionMode mode) {
  if (dtype == DType::kBFloat16 && mode == AttentionMode::kFast && isa >= Isa::kAvx512Bf16) {
    return isa == Isa::kAmx ? amx_kernels() : avx512_bf16_kernels();
  }
  if (isa >= Isa::kAvx512) return avx512_kernels(dtype);
  return isa == Isa::kAvx2 ? avx2_kernels(dtype) : portable_kernels(dtype);
}

}  // namespace attention

namespace {

// What a step needs besides its tensors; kept from step to step.
struct Workspace {
  attention::Plan plan;
  Buffer thread_memory;  // per thread: two states, scratch of the kernel
  Buffer split_states;
  std::unique_ptr<std::atomic<int>[]> num_unfinished;  // partitions, per split tile and KV head
  int num_counters = 0;
};

// One forward call as its threads see it. Each thread uses its own part of thread_memory, and the split states of the
// items it took; whoever finishes the last partition of a tile merges them.
class Step {
 public:
  Step(const AttentionLayout& layout, const Shape& shape, const AttentionBatch& batch, const Kernels& kernels,
       Workspace& workspace)
      : layout_(layout),
        shape_(shape),
        batch_(batch),
        kernels_(kernels),
        workspace_(workspace),
        num_threads_(num_threads()),
        states_(shape, std::max(kernels.max_rows, shape.group)),
        thread_bytes_(2 * states_.bytes + round_to_line(kernels.scratch_bytes(shape))) {
    attention::Plan& plan = workspace.plan;
    plan.make(layout, batch, std::max(1, kernels.max_rows / shape.group), num_threads_);
    workspace.thread_memory.reserve(thread_bytes_ * static_cast<std::size_t>(num_threads_));
    workspace.split_states.reserve(states_.bytes * static_cast<std::size_t>(plan.num_splits));
    if (workspace.num_counters < plan.num_counters) {
      workspace.num_unfinished = std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(plan.num_counters));
      workspace.num_counters = plan.num_counters;
    }
    for (const TokenTile& tile : plan.tiles) {
      for (int head = 0; tile.num_partitions > 1 && head < layout.num_kv_heads; ++head) {
        workspace.num_unfinished[static_cast<std::size_t>(tile.first_counter + head)] = tile.num_partitions;
      }
    }
  }

  void run() {
    std::atomic<std::size_t> next{0};
    auto work = [&](int thread, int) {
      // The number of threads may have grown since the plan was made.
      if (thread >= num_threads_) return;
      std::byte* const memory = workspace_.thread_memory.data() + thread_bytes_ * static_cast<std::size_t>(thread);
      const std::vector<Item>& items = workspace_.plan.items;
      for (std::size_t i = next.fetch_add(1, std::memory_order_relaxed); i < items.size();
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        const TokenTile& tile = workspace_.plan.tiles[static_cast<std::size_t>(items[i].tile)];
        if (tile.num_partitions == 1) {
          run_whole(tile, items[i].head, memory);
        } else {
          run_partition(tile, items[i], memory);
        }
      }
    };
    run_together(work);
  }

 private:
  void run_whole(const TokenTile& tile, int head, std::byte* memory) const {
    const RowTile rows = row_tile(tile, head);
    const State state = states_.at(memory, 0);
    const State later = states_.at(memory, 1);
    std::byte* const scratch = memory + 2 * states_.bytes;
    const int num_keys = tile.num_keys();
    const int first_end = kernels_.is_exact ? std::min(num_keys, kPartition) : num_keys;
    kernels_.attend(shape_, rows, 0, first_end, state, scratch);
    for (int begin = first_end; begin < num_keys; begin += kPartition) {
      kernels_.attend(shape_, rows, begin, std::min(num_keys, begin + kPartition), later, scratch);
      kernels_.merge(shape_, tile.num_tokens * shape_.group, state, later);
    }
    finish(tile, head, state);
  }

  void run_partition(const TokenTile& tile, const Item& item, std::byte* memory) const {
    std::byte* const states = workspace_.split_states.data();
    const int first = tile.first_split + item.head * tile.num_partitions;
    const int begin = item.partition * kPartition;
    kernels_.attend(shape_, row_tile(tile, item.head), begin, std::min(tile.num_keys(), begin + kPartition),
                    states_.at(states, first + item.partition), memory + 2 * states_.bytes);
    // Publishes this state, and sees those of the others where this is the last.
    std::atomic<int>& unfinished =
        workspace_.num_unfinished[static_cast<std::size_t>(tile.first_counter + item.head)];
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (int partition = 1; partition < tile.num_partitions; ++partition) {
      kernels_.merge(shape_, tile.num_tokens * shape_.group, states_.at(states, first),
                     states_.at(states, first + partition));
    }
    finish(tile, item.head, states_.at(states, first));
  }

  RowTile row_tile(const TokenTile& tile, int head) const {
    const std::int64_t query = tile.first_token * batch_.query_stride +
                               std::int64_t{head} * shape_.group * shape_.head_size;
    const std::int64_t kv_head = std::int64_t{head} * shape_.block_size * shape_.head_size;
    return {element(batch_.query, query),
            batch_.query_stride,
            tile.num_tokens,
            tile.first_visible,
            element(batch_.kv_cache, kv_head),
            batch_.block_tables + tile.req * batch_.block_table_stride};
  }

  void finish(const TokenTile& tile, int head, const State& state) const {
    const std::int64_t out =
        tile.first_token * batch_.out_stride + std::int64_t{head} * shape_.group * shape_.head_size;
    kernels_.finish(shape_, tile.num_tokens, state, const_cast<void*>(element(batch_.out, out)), batch_.out_stride);
  }

  const void* element(const void* tensor, std::int64_t index) const {
    return static_cast<const std::byte*>(tensor) + index * static_cast<std::int64_t>(size_of(layout_.dtype));
  }

  const AttentionLayout& layout_;
  const Shape& shape_;
  const AttentionBatch& batch_;
  const Kernels& kernels_;
  Workspace& workspace_;
  const int num_threads_;
  const StateLayout states_;
  const std::size_t thread_bytes_;
};

}  // namespace

struct PagedAttention::Impl {
  const AttentionLayout layout;
  const Shape shape;
  std::mutex busy;
  Workspace workspace;  // protected by busy
};

PagedAttention::PagedAttention(const AttentionLayout& layout) {
  check(layout);
  impl_.reset(new Impl{layout, shape_of(layout), {}, {}});
}

PagedAttention::~PagedAttention() = default;

void PagedAttention::forward(const AttentionBatch& batch, AttentionMode mode) {
  const Kernels& kernels = attention::kernels_of(current_isa(), impl_->layout.dtype, mode);
  const std::lock_guard lock(impl_->busy);
  Step(impl_->layout, impl_->shape, batch, kernels, impl_->workspace).run();
}

}  // namespace folovllm
