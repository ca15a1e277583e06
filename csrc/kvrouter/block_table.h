// Key -> who holds that block. Blocks are numbered slots in chunks; a chain that is stored at once gets neighbouring
// slots, so walking a prompt is mostly a sequential read (see find_next), with a hash probe where chains branch.
//
//   chunk of 4096 slots   keys    u64     low 64 bits of the digest
//                         sets    u32     who holds it; 0: the slot is free, and its key is the next free slot + 1
//                         touched u8      used since the clock hand last passed
//                         heads   u8[]    the rest of the digest, digest_size - 8 bytes, all zero when unknown
//   256 segments of       u32             5 bits of the key's hash | slot + 1; 0: empty, all ones: deleted
//
// A full table drops the block that the clock hand finds unused (second chance, an approximation of LRU that lets
// readers mark blocks as used without a write lock).
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvrouter/owner_set.h"

namespace kvrouter {

using SlotId = std::uint32_t;

inline constexpr SlotId kNoSlot = 0xffffffff;
inline constexpr std::size_t kMaxBlocks = (std::size_t{1} << 27) - 2;

// Not thread-safe, except that const methods may run together.
class BlockTable {
 public:
  // REQUIRES: 1 <= max_blocks <= kMaxBlocks; max_owners >= 1.
  BlockTable(std::size_t max_blocks, std::size_t max_owners);

  // The slot of `key`, or kNoSlot.
  SlotId find(std::uint64_t key) const;

  // The same, faster when `key` was stored right after the block in `previous` (which may be kNoSlot).
  SlotId find_next(std::uint64_t key, SlotId previous) const;

  // Asks the memory system for what find(key) reads first.
  void prefetch(std::uint64_t key) const;

  SetId set_of(SlotId slot) const { return chunks_[slot / kChunk]->sets[slot % kChunk]; }
  const OwnerSets& sets() const { return sets_; }

  // Marks a block as used.
  void touch(SlotId slot) const;

  // How many of `keys` lie in the slots right after `slot`, in order, each held by the set of `slot`; marks them used.
  std::size_t run_length(SlotId slot, std::span<const std::uint64_t> keys) const;

  // Adds one hold of `owner`; `digest` is the block's, or empty if it is not known.
  void hold(std::uint64_t key, OwnerId owner, std::span<const std::uint8_t> digest);

  // Makes `owner` the youngest of the block's owners, without adding a hold unless it lost its own to lack of room.
  void renew(std::uint64_t key, OwnerId owner, std::span<const std::uint8_t> digest);

  // Takes one hold of `owner` back. False if it had none: never held, or dropped to make room.
  bool release(std::uint64_t key, OwnerId owner);

  // Writes the digest of `key`. False if the block or its digest is not known. REQUIRES: digest.size() >= 8.
  bool read_digest(std::uint64_t key, std::span<std::uint8_t> digest) const;

  std::size_t num_blocks() const { return num_blocks_; }
  std::uint64_t num_evicted() const { return num_evicted_; }
  std::size_t memory_bytes() const;

 private:
  static constexpr std::size_t kChunk = 4096;
  static constexpr std::size_t kNumSegments = 256;

  struct Chunk {
    std::array<std::uint64_t, kChunk> keys;
    std::array<SetId, kChunk> sets{};
    mutable std::array<std::atomic<std::uint8_t>, kChunk> touched{};
    std::unique_ptr<std::uint8_t[]> heads;  // made when the first digest comes
    std::size_t head_size = 0;
  };

  struct Segment {
    std::vector<std::uint32_t> slots;
    std::size_t num_used = 0;
    std::size_t num_deleted = 0;  // marks left behind, so that no entry behind them is lost
  };

  std::uint64_t& key_of(SlotId slot) { return chunks_[slot / kChunk]->keys[slot % kChunk]; }
  std::uint64_t key_of(SlotId slot) const { return chunks_[slot / kChunk]->keys[slot % kChunk]; }
  SetId& set_ref(SlotId slot) { return chunks_[slot / kChunk]->sets[slot % kChunk]; }

  SlotId insert(std::uint64_t key);
  SlotId take_slot();
  void free_block(SlotId slot);
  void evict_one();
  void write_digest(SlotId slot, std::span<const std::uint8_t> digest);

  void link(std::uint64_t key, SlotId slot);
  void unlink(std::uint64_t key, SlotId slot);
  void rebuild(Segment& segment);

  std::size_t max_blocks_;
  OwnerSets sets_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::array<Segment, kNumSegments> segments_;
  SlotId num_slots_ = 0;  // ever given out
  SlotId free_head_ = kNoSlot;
  SlotId hand_ = 0;
  std::size_t num_blocks_ = 0;
  std::uint64_t num_evicted_ = 0;
  std::unordered_map<std::uint64_t, std::uint32_t> extra_holds_;  // slot << 32 | owner -> holds beyond the first
};

}  // namespace kvrouter
