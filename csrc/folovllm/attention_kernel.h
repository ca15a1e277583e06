// Between the plan of a step (attention_paged.cpp) and the kernels, one set per instruction set and dtype.
//
// A kernel attends the rows of one tile: `num_tokens` query tokens of one request, and of each all query heads that
// share one KV head, so that K and V are read once for all of them:
//
//   row = token * group + head within the group
//
// It works in scores scaled by log2(e), because exp2 is cheaper than exp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_paged.h"
#include "cpu_features.h"

namespace folovllm::attention {

// Keys are taken in tiles and partitions at absolute positions, so that a row meets them in the same order whichever
// chunk or thread it is computed in. States of partitions are merged from first to last.
constexpr int kTile = 64;
constexpr int kPartition = 1024;
static_assert(kPartition % kTile == 0);

struct Shape {
  int group;              // query heads per KV head
  int head_size;
  int padded_head;        // head_size rounded up to 32: rows of State::acc
  int block_size;
  std::int64_t block_stride;  // elements from block to block
  std::int64_t v_offset;      // elements from a row of K to its row of V
  float scale_log2;           // scale * log2(e)
};

struct RowTile {
  const void* query;          // first token, first head of the group
  std::int64_t query_stride;  // elements from token to token
  int num_tokens;
  int first_visible;          // token t sees the keys [0, first_visible + t)
  const void* kv_head;        // K of this head in block 0
  const std::int32_t* block_table;

  // One behind the last key that any row sees.
  int num_keys() const { return first_visible + num_tokens - 1; }
};

// Softmax in progress: for each row the maximum of its scores, the sum of 2^(score - max) and the values so weighted.
// A row that has seen no key has max = -inf, sum = 0, acc = 0.
struct State {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* acc;  // [rows][padded_head]
};

struct Kernels {
  int max_rows;  // of a tile
  // Whether partitions must be merged even where one thread takes them all, for the same bits.
  bool is_exact;
  std::size_t (*scratch_bytes)(const Shape& shape);
  // Sets `state` from the keys [key_begin, key_end); key_begin is at a partition. `scratch` is aligned to 64 bytes.
  void (*attend)(const Shape& shape, const RowTile& tile, int key_begin, int key_end, State state, std::byte* scratch);
  // Adds the state of later keys to `state`.
  void (*merge)(const Shape& shape, int num_rows, State state, State later);
  // Writes acc / sum as the dtype: token t, head g of the group to out[t * out_stride + g * head_size].
  void (*finish)(const Shape& shape, int num_tokens, State state, void* out, std::int64_t out_stride);
};

// The kernels of the best instruction set up to `isa`.
const Kernels& kernels_of(Isa isa, DType dtype, AttentionMode mode);

const Kernels& portable_kernels(DType dtype);
const Kernels& avx2_kernels(DType dtype);
const Kernels& avx512_kernels(DType dtype);
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();

}  // namespace folovllm::attention
