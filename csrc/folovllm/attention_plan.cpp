#include "attention_plan.h"

#include <algorithm>

#include "attention_kernel.h"

namespace folovllm::attention {
namespace {

// Smaller tiles where the step would not fill the threads otherwise.
int tokens_for(const AttentionLayout& layout, const AttentionBatch& batch, int most, int num_threads) {
  constexpr int kItemsPerThread = 4;
  constexpr int kLeastTokens = 16;
  const std::int64_t items = std::int64_t{batch.query_start_loc[batch.num_reqs]} * layout.num_kv_heads;
  const std::int64_t fair = items / (std::int64_t{num_threads} * kItemsPerThread);
  if (num_threads == 1 || fair >= most) return most;
  return std::min(most, std::max(static_cast<int>(fair), kLeastTokens));
}

}  // namespace

void Plan::make(const AttentionLayout& layout, const AttentionBatch& batch, int most_tokens, int num_threads) {
  const int tokens_per_tile = tokens_for(layout, batch, most_tokens, num_threads);
  tiles.clear();
  const int group = layout.num_heads / layout.num_kv_heads;
  std::int64_t total_cost = 0;
  for (std::int64_t req = 0; req < batch.num_reqs; ++req) {
    const int end = batch.query_start_loc[req + 1];
    for (int token = batch.query_start_loc[req]; token < end; token += tokens_per_tile) {
      const int num_tokens = std::min(tokens_per_tile, end - token);
      const int first_visible = batch.seq_lens[req] - (end - token) + 1;
      // Reading a key costs about as much as using it for 16 rows.
      const int num_keys = first_visible + num_tokens - 1;
      const std::int64_t cost = std::int64_t{num_keys} * std::max(num_tokens * group, 16);
      tiles.push_back({req, token, num_tokens, first_visible, 1, 0, 0, cost});
      total_cost += cost * layout.num_kv_heads;
    }
  }
  std::sort(tiles.begin(), tiles.end(), [](const TokenTile& a, const TokenTile& b) { return a.cost > b.cost; });
  const std::int64_t long_cost = total_cost / (std::int64_t{num_threads} * 4);
  items.clear();
  num_splits = 0;
  num_counters = 0;
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    TokenTile& tile = tiles[i];
    if (num_threads > 1 && tile.cost > long_cost) tile.num_partitions = (tile.num_keys() + kPartition - 1) / kPartition;
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      for (int partition = 0; partition < tile.num_partitions; ++partition) {
        items.push_back({static_cast<int>(i), head, partition});
      }
    }
    if (tile.num_partitions == 1) continue;
    tile.first_split = num_splits;
    tile.first_counter = num_counters;
    num_splits += layout.num_kv_heads * tile.num_partitions;
    num_counters += layout.num_kv_heads;
  }
}

}  // namespace folovllm::attention
