#include "flexkv/child_table.h"

#include <cstring>
#include <utility>

namespace flexkv {

std::uint32_t ChildTable::tag(NodeIndex parent, const std::uint8_t* first_digest) {
  std::uint64_t head = 0;
  std::memcpy(&head, first_digest, sizeof(head));
  head ^= parent * 0x9E3779B97F4A7C15u;
  head *= 0xD6E8FEB86659FD93u;  // odd, so digests that differ in few bits still spread
  return static_cast<std::uint32_t>(head >> 32);
}

void ChildTable::insert(std::uint32_t tag, NodeIndex node) {
  if ((size_ + 1) * 4 > slots_.size() * 3) grow();
  place({tag, node});
  ++size_;
}

void ChildTable::place(Slot slot) {
  std::size_t i = slot.tag & mask();
  while (slots_[i].node != kNoNode) i = (i + 1) & mask();
  slots_[i] = slot;
}

void ChildTable::erase(std::uint32_t tag, NodeIndex node) {
  std::size_t hole = tag & mask();
  while (slots_[hole].node != node) hole = (hole + 1) & mask();
  // Close the hole: pull back every later slot of the cluster whose home is not after the hole.
  for (std::size_t i = (hole + 1) & mask(); slots_[i].node != kNoNode; i = (i + 1) & mask()) {
    const std::size_t distance_from_home = (i - slots_[i].tag) & mask();
    const std::size_t distance_from_hole = (i - hole) & mask();
    if (distance_from_home >= distance_from_hole) {
      slots_[hole] = slots_[i];
      hole = i;
    }
  }
  slots_[hole] = Slot{};
  --size_;
}

void ChildTable::grow() {
  std::vector<Slot> old(slots_.size() * 2);
  std::swap(old, slots_);
  for (const Slot& slot : old) {
    if (slot.node != kNoNode) place(slot);
  }
}

}  // namespace flexkv
