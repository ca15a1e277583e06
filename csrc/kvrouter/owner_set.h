// Interned sets of owners. Neighbouring blocks of a prompt nearly always have the same holders, so a block stores four
// bytes, the id of its set, however many pods hold it; and whoever walks a prompt sees at once where the holders change.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace kvrouter {

using OwnerId = std::uint32_t;  // one (pod, tier, group, rank)
using SetId = std::uint32_t;

inline constexpr SetId kEmptySet = 0;

// Not thread-safe: the table of blocks that owns it guards it.
class OwnerSets {
 public:
  struct Transition {
    SetId to;
    bool was_member;
  };

  // `max_owners` bounds a set: adding to a full one drops its oldest member. REQUIRES: max_owners >= 1.
  explicit OwnerSets(std::size_t max_owners);

  // Oldest first. Valid until the next call that is not const.
  std::span<const OwnerId> owners(SetId id) const { return sets_[id].owners; }
  std::size_t size(SetId id) const { return sets_[id].owners.size(); }
  std::size_t max_owners() const { return max_owners_; }

  // Moves one reference from `from` to the set with `owner` as its youngest member.
  Transition add(SetId from, OwnerId owner) { return move(from, owner, kAdd); }

  // Moves one reference from `from` to the set without `owner`.
  Transition remove(SetId from, OwnerId owner) { return move(from, owner, kRemove); }

  // Gives one reference back.
  void release(SetId id);

  std::size_t num_sets() const { return ids_.size(); }
  std::size_t memory_bytes() const;

 private:
  enum Step : std::uint8_t { kAdd, kRemove };

  struct Set {
    std::vector<OwnerId> owners;
    std::uint64_t hash = 0;
    std::uint32_t num_references = 0;
    std::uint32_t generation = 0;  // counts how often the id was given away again
  };

  // A remembered step; only good while both ids still mean the same sets.
  struct Remembered {
    SetId from = kEmptySet, to = kEmptySet;
    OwnerId owner = 0;
    std::uint32_t from_generation = 0, to_generation = 0;
    Step step = kAdd;
    bool was_member = false, valid = false;
  };

  Transition move(SetId from, OwnerId owner, Step step);
  Transition compute(SetId from, OwnerId owner, Step step);
  SetId intern(std::vector<OwnerId> owners);

  std::size_t max_owners_;
  std::vector<Set> sets_;  // by id; 0 is the empty set and never freed
  std::vector<SetId> free_;
  std::unordered_multimap<std::uint64_t, SetId> ids_;  // hash of the content -> id
  std::array<Remembered, 512> remembered_;
};

}  // namespace kvrouter
