// Causal attention over the paged KV cache of one layer.
//
//   kv_cache[num_blocks][2 = K, V][num_kv_heads][block_size][head_size]
//   query, out[num_tokens][num_heads][head_size], rows at a stride
//
// Request i owns the query rows [query_start_loc[i], query_start_loc[i + 1]); they are the last of its seq_lens[i]
// tokens, and their own K and V are in the cache already. Row r sees the keys up to and including its own; what lies
// behind them in a block, even a NaN, is never read into a result.
//
// Exact arithmetic (float32, float16, and bfloat16 on request): a row has the same bits whether it is computed as a
// decode, in a chunk of any size or in a whole prefill, alone or in any batch, on any number of threads. Fast
// arithmetic (bfloat16 where the machine has bf16 instructions) differs between chunks and decodes, in rounding only.
#pragma once

#include <cstdint>
#include <memory>

#include "number_formats.h"

namespace folovllm {

// What does not change from step to step.
struct AttentionLayout {
  int num_heads;  // a multiple of num_kv_heads
  int num_kv_heads;
  int head_size;   // even, at most 512; multiples of 16 are fast
  int block_size;  // tokens per block
  float scale;     // of the scores; positive
  DType dtype;     // of query, kv_cache and out
};

// One step. Strides count elements.
struct AttentionBatch {
  const void* query;
  std::int64_t query_stride;            // from token to token
  const void* kv_cache;
  const std::int32_t* query_start_loc;  // [num_reqs + 1]
  const std::int32_t* seq_lens;         // [num_reqs]
  const std::int32_t* block_tables;     // [num_reqs][block_table_stride]
  std::int64_t block_table_stride;
  std::int64_t num_reqs;
  void* out;
  std::int64_t out_stride;
};

enum class AttentionMode : std::uint8_t {
  kFast,            // the quickest arithmetic of the dtype
  kBatchInvariant,  // exact arithmetic, as above
};

class PagedAttention {
 public:
  // Throws std::invalid_argument, naming the size, for a layout that cannot be served.
  explicit PagedAttention(const AttentionLayout& layout);
  ~PagedAttention();
  PagedAttention(const PagedAttention&) = delete;
  PagedAttention& operator=(const PagedAttention&) = delete;

  // Computes `out`. Calls on one object take turns. Throws std::bad_alloc before any work.
  void forward(const AttentionBatch& batch, AttentionMode mode);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace folovllm
