// Finds the child of a node by its first digest: one hash table for all nodes of a tree.
//
//   slots_   | tag, node | empty | tag, node | ...     open addressing, linear probing, no tombstones
//
// The tag is 32 bits of a hash of (parent, first digest): a filter. The caller compares the full digest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flexkv {

using NodeIndex = std::uint32_t;
inline constexpr NodeIndex kNoNode = UINT32_MAX;

class ChildTable {
 public:
  ChildTable() : slots_(kMinSlots) {}

  // `first_digest` has at least 8 bytes.
  static std::uint32_t tag(NodeIndex parent, const std::uint8_t* first_digest);

  // The node of that tag for which is_child(node) holds, or kNoNode.
  template <typename IsChild>
  NodeIndex find(std::uint32_t tag, IsChild&& is_child) const {
    for (std::size_t i = tag & mask(); slots_[i].node != kNoNode; i = (i + 1) & mask()) {
      if (slots_[i].tag == tag && is_child(slots_[i].node)) return slots_[i].node;
    }
    return kNoNode;
  }

  void insert(std::uint32_t tag, NodeIndex node);
  // REQUIRES: insert(tag, node) was called.
  void erase(std::uint32_t tag, NodeIndex node);

  std::size_t size() const { return size_; }
  std::size_t memory_bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    std::uint32_t tag = 0;
    NodeIndex node = kNoNode;
  };
  static constexpr std::size_t kMinSlots = 16;

  std::size_t mask() const { return slots_.size() - 1; }
  void place(Slot slot);
  void grow();

  std::vector<Slot> slots_;  // a power of two of them, at most 3/4 in use
  std::size_t size_ = 0;
};

}  // namespace flexkv
