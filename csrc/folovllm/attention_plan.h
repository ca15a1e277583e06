// The work of one step of attention, cut into items for the pool of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_paged.h"

namespace folovllm::attention {

// Consecutive query tokens of one request.
struct TokenTile {
  std::int64_t req;
  std::int64_t first_token;  // row of the step
  int num_tokens;
  int first_visible;   // keys that the first token sees
  int num_partitions;  // 1: one item computes all its keys
  int first_split;     // where split: index of the state of (KV head 0, partition 0), and of the counter of ...
  int first_counter;   // ... KV head 0
  std::int64_t cost;

  int num_keys() const { return first_visible + num_tokens - 1; }
};

// One KV head of a tile, and one partition of its keys where the tile is split.
struct Item {
  int tile;
  int head;
  int partition;
};

struct Plan {
  std::vector<TokenTile> tiles;
  std::vector<Item> items;  // largest first, so that no thread is left with a long one at the end
  int num_splits;           // states that split tiles need
  int num_counters;

  // Tiles have at most `most_tokens` tokens. A tile is split where one item of it would be long against a
  // thread's share of the step. Keeps the vectors' memory from step to step.
  void make(const AttentionLayout& layout, const AttentionBatch& batch, int most_tokens, int num_threads);
};

}  // namespace folovllm::attention
