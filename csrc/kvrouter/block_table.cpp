#include "kvrouter/block_table.h"

#include <algorithm>
#include <cstring>

#include "kvrouter/hash_slots.h"

namespace kvrouter {
namespace {

constexpr unsigned kSlotBits = 27;
constexpr std::uint32_t kSlotMask = (1u << kSlotBits) - 1;
constexpr std::size_t kMinSegment = 8;
constexpr std::size_t kPrefetchDistance = 16;
constexpr std::uint32_t kDeleted = 0xffffffff;  // no entry: kMaxBlocks keeps slots below

// The low bits of the mixed key choose the segment and the fingerprint, the whole of it the place in the segment.
std::size_t segment_of(std::uint64_t mixed) { return mixed & 0xff; }
std::uint32_t fingerprint(std::uint64_t mixed) { return static_cast<std::uint32_t>(mixed >> 8 & 0x1f) << kSlotBits; }

std::uint64_t hold_id(SlotId slot, OwnerId owner) { return std::uint64_t{slot} << 32 | owner; }

}  // namespace

BlockTable::BlockTable(std::size_t max_blocks, std::size_t max_owners) : max_blocks_(max_blocks), sets_(max_owners) {}

SlotId BlockTable::find(std::uint64_t key) const {
  const std::uint64_t mixed = mix(key);
  const std::vector<std::uint32_t>& slots = segments_[segment_of(mixed)].slots;
  if (slots.empty()) return kNoSlot;
  const std::uint32_t tag = fingerprint(mixed);
  for (std::size_t i = home_slot(mixed, slots.size()); slots[i] != 0; i = i + 1 == slots.size() ? 0 : i + 1) {
    if ((slots[i] & ~kSlotMask) != tag || slots[i] == kDeleted) continue;
    const SlotId slot = (slots[i] & kSlotMask) - 1;
    if (key_of(slot) == key) return slot;
  }
  return kNoSlot;
}

SlotId BlockTable::find_next(std::uint64_t key, SlotId previous) const {
  const SlotId next = previous + 1;  // kNoSlot wraps to 0
  if (next < num_slots_ && key_of(next) == key && set_of(next) != kEmptySet) return next;
  return find(key);
}

void BlockTable::prefetch(std::uint64_t key) const {
  const std::uint64_t mixed = mix(key);
  const std::vector<std::uint32_t>& slots = segments_[segment_of(mixed)].slots;
  if (!slots.empty()) __builtin_prefetch(&slots[home_slot(mixed, slots.size())]);
}

void BlockTable::touch(SlotId slot) const {
  std::atomic<std::uint8_t>& mark = chunks_[slot / kChunk]->touched[slot % kChunk];
  if (mark.load(std::memory_order_relaxed) == 0) mark.store(1, std::memory_order_relaxed);
}

std::size_t BlockTable::run_length(SlotId slot, std::span<const std::uint64_t> keys) const {
  const Chunk& chunk = *chunks_[slot / kChunk];
  const SetId set = chunk.sets[slot % kChunk];
  const std::size_t first = slot % kChunk + 1;
  const std::size_t limit = std::min({keys.size(), kChunk - first, static_cast<std::size_t>(num_slots_ - slot - 1)});
  std::size_t length = 0;
  while (length < limit && chunk.keys[first + length] == keys[length] && chunk.sets[first + length] == set) {
    std::atomic<std::uint8_t>& mark = chunk.touched[first + length];
    if (mark.load(std::memory_order_relaxed) == 0) mark.store(1, std::memory_order_relaxed);
    ++length;
  }
  return length;
}

void BlockTable::hold(std::uint64_t key, OwnerId owner, std::span<const std::uint8_t> digest) {
  SlotId slot = find(key);
  if (slot == kNoSlot) {
    slot = insert(key);
  } else {
    touch(slot);
  }
  if (!digest.empty()) write_digest(slot, digest);
  const SetId before = set_of(slot);
  const bool full = sets_.size(before) >= sets_.max_owners();
  const OwnerId oldest = full ? sets_.owners(before).front() : 0;
  const OwnerSets::Transition step = sets_.add(before, owner);
  set_ref(slot) = step.to;
  if (step.was_member) {
    ++extra_holds_[hold_id(slot, owner)];
  } else if (full && !extra_holds_.empty()) {
    extra_holds_.erase(hold_id(slot, oldest));
  }
}

void BlockTable::renew(std::uint64_t key, OwnerId owner, std::span<const std::uint8_t> digest) {
  const SlotId slot = find(key);
  if (slot == kNoSlot) return hold(key, owner, digest);
  const std::span<const OwnerId> owners = sets_.owners(set_of(slot));
  if (std::find(owners.begin(), owners.end(), owner) == owners.end()) return hold(key, owner, digest);
  touch(slot);
  if (owners.back() != owner) set_ref(slot) = sets_.add(set_of(slot), owner).to;
}

bool BlockTable::release(std::uint64_t key, OwnerId owner) {
  const SlotId slot = find(key);
  if (slot == kNoSlot) return false;
  if (!extra_holds_.empty()) {
    const auto extra = extra_holds_.find(hold_id(slot, owner));
    if (extra != extra_holds_.end()) {
      if (--extra->second == 0) extra_holds_.erase(extra);
      return true;
    }
  }
  const OwnerSets::Transition step = sets_.remove(set_of(slot), owner);
  set_ref(slot) = step.to;
  if (step.to == kEmptySet) free_block(slot);
  return step.was_member;
}

bool BlockTable::read_digest(std::uint64_t key, std::span<std::uint8_t> digest) const {
  const SlotId slot = find(key);
  if (slot == kNoSlot) return false;
  const Chunk& chunk = *chunks_[slot / kChunk];
  const std::size_t head_size = digest.size() - sizeof key;
  if (!chunk.heads || chunk.head_size != head_size) return false;
  const std::uint8_t* head = chunk.heads.get() + slot % kChunk * head_size;
  if (std::all_of(head, head + head_size, [](std::uint8_t byte) { return byte == 0; })) return false;
  std::memcpy(digest.data(), head, head_size);
  for (std::size_t i = 0; i < sizeof key; ++i) {
    digest[head_size + i] = static_cast<std::uint8_t>(key >> (8 * (sizeof key - 1 - i)));
  }
  return true;
}

void BlockTable::write_digest(SlotId slot, std::span<const std::uint8_t> digest) {
  Chunk& chunk = *chunks_[slot / kChunk];
  const std::size_t head_size = digest.size() - sizeof(std::uint64_t);
  if (!chunk.heads) {
    chunk.heads = std::make_unique<std::uint8_t[]>(kChunk * head_size);
    chunk.head_size = head_size;
  }
  if (chunk.head_size == head_size) std::memcpy(&chunk.heads[slot % kChunk * head_size], digest.data(), head_size);
}

std::size_t BlockTable::memory_bytes() const {
  std::size_t bytes = chunks_.size() * (sizeof(Chunk) + sizeof(void*)) + sets_.memory_bytes() + extra_holds_.size() * 48;
  for (const auto& chunk : chunks_) bytes += chunk->heads ? kChunk * chunk->head_size : 0;
  for (const Segment& segment : segments_) bytes += segment.slots.capacity() * sizeof(std::uint32_t);
  return bytes;
}

SlotId BlockTable::insert(std::uint64_t key) {
  if (num_blocks_ >= max_blocks_) evict_one();
  const SlotId slot = take_slot();
  key_of(slot) = key;
  Chunk& chunk = *chunks_[slot / kChunk];
  chunk.touched[slot % kChunk].store(0, std::memory_order_relaxed);
  if (chunk.heads) std::memset(&chunk.heads[slot % kChunk * chunk.head_size], 0, chunk.head_size);
  link(key, slot);
  ++num_blocks_;
  return slot;
}

SlotId BlockTable::take_slot() {
  if (free_head_ != kNoSlot) {
    const SlotId slot = free_head_;
    free_head_ = static_cast<SlotId>(key_of(slot));
    return slot;
  }
  if (num_slots_ % kChunk == 0) chunks_.push_back(std::make_unique<Chunk>());
  return num_slots_++;
}

// REQUIRES: the slot's set was given back.
void BlockTable::free_block(SlotId slot) {
  unlink(key_of(slot), slot);
  set_ref(slot) = kEmptySet;
  key_of(slot) = free_head_;
  free_head_ = slot;
  --num_blocks_;
}

void BlockTable::evict_one() {
  for (;; hand_ = hand_ + 1 >= num_slots_ ? 0 : hand_ + 1) {
    const SetId set = set_of(hand_);
    if (set == kEmptySet) continue;
    if (chunks_[hand_ / kChunk]->touched[hand_ % kChunk].exchange(0, std::memory_order_relaxed) != 0) continue;
    if (!extra_holds_.empty()) {
      for (const OwnerId owner : sets_.owners(set)) extra_holds_.erase(hold_id(hand_, owner));
    }
    sets_.release(set);
    free_block(hand_);
    ++num_evicted_;
    hand_ = hand_ + 1 >= num_slots_ ? 0 : hand_ + 1;
    return;
  }
}

void BlockTable::link(std::uint64_t key, SlotId slot) {
  const std::uint64_t mixed = mix(key);
  Segment& segment = segments_[segment_of(mixed)];
  if ((segment.num_used + segment.num_deleted + 1) * 5 > segment.slots.size() * 4) rebuild(segment);
  std::vector<std::uint32_t>& slots = segment.slots;
  std::size_t i = home_slot(mixed, slots.size());
  while (slots[i] != 0 && slots[i] != kDeleted) i = i + 1 == slots.size() ? 0 : i + 1;
  segment.num_deleted -= slots[i] == kDeleted;
  slots[i] = fingerprint(mixed) | (slot + 1);
  ++segment.num_used;
}

// Leaves a mark: closing the gap would read the keys of all entries behind it, a cache miss each.
void BlockTable::unlink(std::uint64_t key, SlotId slot) {
  const std::uint64_t mixed = mix(key);
  Segment& segment = segments_[segment_of(mixed)];
  std::vector<std::uint32_t>& slots = segment.slots;
  const std::uint32_t entry = fingerprint(mixed) | (slot + 1);
  std::size_t i = home_slot(mixed, slots.size());
  while (slots[i] != entry) i = i + 1 == slots.size() ? 0 : i + 1;
  const std::size_t next = i + 1 == slots.size() ? 0 : i + 1;
  slots[i] = slots[next] == 0 ? 0 : kDeleted;
  segment.num_deleted += slots[i] == kDeleted;
  --segment.num_used;
}

// Drops the marks, and makes room if those were few.
void BlockTable::rebuild(Segment& segment) {
  const std::size_t size = segment.slots.size();
  const bool is_full = (segment.num_used + 1) * 5 > size * 3;
  std::vector<std::uint32_t> old(std::max(kMinSegment, is_full ? size + std::max<std::size_t>(4, size / 3) : size), 0);
  old.swap(segment.slots);
  segment.num_deleted = 0;
  std::vector<std::uint32_t>& slots = segment.slots;
  for (std::size_t at = 0; at < old.size(); ++at) {
    if (at + kPrefetchDistance < old.size()) {
      const std::uint32_t ahead = old[at + kPrefetchDistance];
      if (ahead != 0 && ahead != kDeleted) __builtin_prefetch(&key_of((ahead & kSlotMask) - 1));
    }
    if (old[at] == 0 || old[at] == kDeleted) continue;
    std::size_t i = home_slot(mix(key_of((old[at] & kSlotMask) - 1)), slots.size());
    while (slots[i] != 0) i = i + 1 == slots.size() ? 0 : i + 1;
    slots[i] = old[at];
  }
}

}  // namespace kvrouter
