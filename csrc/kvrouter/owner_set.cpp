#include "kvrouter/owner_set.h"

#include <algorithm>

#include "kvrouter/hash_slots.h"

namespace kvrouter {

OwnerSets::OwnerSets(std::size_t max_owners) : max_owners_(max_owners), sets_(1) {}

void OwnerSets::release(SetId id) {
  if (id == kEmptySet) return;
  Set& set = sets_[id];
  if (--set.num_references != 0) return;
  auto [first, last] = ids_.equal_range(set.hash);
  for (auto it = first; it != last; ++it) {
    if (it->second == id) {
      ids_.erase(it);
      break;
    }
  }
  set.owners = {};
  ++set.generation;
  free_.push_back(id);
}

std::size_t OwnerSets::memory_bytes() const {
  std::size_t bytes = sets_.capacity() * sizeof(Set) + free_.capacity() * sizeof(SetId);
  for (const Set& set : sets_) bytes += set.owners.capacity() * sizeof(OwnerId);
  return bytes + ids_.size() * 40 + ids_.bucket_count() * sizeof(void*);
}

OwnerSets::Transition OwnerSets::move(SetId from, OwnerId owner, Step step) {
  const std::size_t slot = mix((std::uint64_t{from} << 32 | owner) * 2 + step) % remembered_.size();
  Remembered& memo = remembered_[slot];
  if (memo.valid && memo.from == from && memo.owner == owner && memo.step == step &&
      memo.from_generation == sets_[from].generation && memo.to_generation == sets_[memo.to].generation) {
    const Transition result{memo.to, memo.was_member};
    if (result.to != kEmptySet) ++sets_[result.to].num_references;
    release(from);
    return result;
  }
  const Transition result = compute(from, owner, step);
  memo = {from, result.to, owner, sets_[from].generation, sets_[result.to].generation, step, result.was_member, true};
  if (result.to != kEmptySet) ++sets_[result.to].num_references;
  release(from);
  return result;
}

// Finds or makes the target; takes no reference.
OwnerSets::Transition OwnerSets::compute(SetId from, OwnerId owner, Step step) {
  std::vector<OwnerId> owners = sets_[from].owners;
  const auto it = std::find(owners.begin(), owners.end(), owner);
  const bool was_member = it != owners.end();
  if (was_member) owners.erase(it);
  if (step == kAdd) {
    if (owners.size() >= max_owners_) owners.erase(owners.begin());
    owners.push_back(owner);
  }
  return {intern(std::move(owners)), was_member};
}

SetId OwnerSets::intern(std::vector<OwnerId> owners) {
  if (owners.empty()) return kEmptySet;
  std::uint64_t hash = owners.size();
  for (const OwnerId owner : owners) hash = mix(hash ^ owner);
  auto [first, last] = ids_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    if (sets_[it->second].owners == owners) return it->second;
  }
  SetId id = static_cast<SetId>(sets_.size());
  if (free_.empty()) {
    sets_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  owners.shrink_to_fit();
  sets_[id].owners = std::move(owners);
  sets_[id].hash = hash;
  ids_.emplace(hash, id);
  return id;
}

}  // namespace kvrouter
