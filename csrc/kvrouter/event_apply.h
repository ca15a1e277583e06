// Event batches of one engine -> the index, in one call: parses, computes request keys from the token ids, and enters
// or removes the blocks.
//
// An engine's blocks need not be as long as the index's:
//   engine block = r index blocks    each engine key has r records, parts 0 .. r-1
//   index block = r engine blocks    the key belongs to the engine block that completes it; the r-1 before it are kept
//                                    as *unfinished*: their tokens wait for a block that continues them
// Request keys continue the chain of the parent named by the event, so the index must know the parent's digest; a store
// whose parent is unknown is rejected, never guessed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvblocks/block_hasher.h"
#include "kvrouter/block_index.h"
#include "kvrouter/event_parser.h"

namespace kvrouter {

enum class Rejection : std::uint8_t {
  kMalformedBatch,  // not a batch, or cut off; nothing of it was used
  kMalformedEvent,
  kUnknownType,
  kUnknownParent,
  kUnknownBlock,  // a store without tokens, of a block that the source does not know
  kBlockSize,     // neither a multiple nor a divisor of the index's block size
};
inline constexpr std::size_t kNumRejections = 6;

struct BatchResult {
  std::uint32_t num_events = 0;
  std::uint64_t num_stored = 0;   // records added or referenced once more
  std::uint64_t num_removed = 0;  // records released
  std::uint32_t num_cleared = 0;  // AllBlocksCleared events
  std::int32_t rank = 0;
  std::array<std::uint32_t, kNumRejections> num_rejected{};  // by Rejection
};

// Thread-safe: apply() takes the source's mutex.
class EventApplier {
 public:
  // `root` is the digest that stands for the parent of the model's first blocks.
  // Throws std::invalid_argument if its size is not the algorithm's, or block_size is 0.
  EventApplier(std::shared_ptr<BlockIndex> index, std::shared_ptr<PodSource> source, kvblocks::Algorithm algorithm,
               std::span<const std::uint8_t> root, std::size_t block_size);

  // Applies a msgpack batch. One bad event costs that event; an unreadable batch changes nothing.
  BatchResult apply(std::span<const std::uint8_t> payload);

 private:
  using Digest = std::vector<std::uint8_t>;

  // An engine block that ends inside an index block.
  struct Unfinished {
    Digest parent;                      // of the index block it lies in; empty at the start of a sequence
    std::vector<std::uint32_t> tokens;  // of that index block so far
    std::vector<std::uint8_t> extra;    // CBOR extra keys of that index block
  };

  void apply_event(const Event& event, BatchResult& result);
  std::optional<Rejection> store(const Event& event, std::uint32_t owner, BatchResult& result);
  std::optional<Rejection> store_known(const Event& event, std::uint32_t owner, BatchResult& result);
  void remove(const Event& event, std::uint32_t owner, BatchResult& result);

  bool find_parent(const Event& event, Unfinished& start);
  void collect_extra_keys(const Event& event, std::size_t num_engine_blocks, const Unfinished& start);
  std::span<const std::uint8_t> extra_of(const Event& event, std::size_t engine_block, std::size_t num_engine_blocks,
                                         bool is_first_part);
  void name_blocks(const Event& event, std::size_t num_engine_blocks, const Unfinished& start);
  Unfinished unfinished_at(std::size_t end_token, const Unfinished& start) const;

  const std::shared_ptr<BlockIndex> index_;
  const std::shared_ptr<PodSource> source_;
  const kvblocks::BlockHasher hasher_;

  // Guarded by source_->mutex.
  std::unordered_map<std::uint64_t, Unfinished> unfinished_;  // by engine key
  std::uint64_t num_clears_seen_ = 0;
  // Scratch of one event.
  Event event_;
  std::vector<std::uint32_t> tokens_;
  std::vector<std::uint8_t> digests_;
  std::vector<std::uint8_t> lora_extra_;
  std::vector<std::uint8_t> extra_bytes_;
  std::vector<std::uint64_t> extra_offsets_;
  std::vector<StoredBlock> blocks_;
  std::vector<std::uint8_t> block_digests_;
};

}  // namespace kvrouter
