// The evictable leaves of a tree, lowest priority first: an indexed 4-ary heap, so that any node can be taken out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexkv/child_table.h"

namespace flexkv {

class EvictionQueue {
 public:
  // REQUIRES: !contains(node).
  void push(NodeIndex node, std::uint64_t priority);
  // REQUIRES: contains(node).
  void erase(NodeIndex node);

  bool contains(NodeIndex node) const { return node < position_.size() && position_[node] != kAbsent; }
  // REQUIRES: !empty().
  NodeIndex top() const { return heap_.front().node; }
  bool empty() const { return heap_.empty(); }
  std::size_t size() const { return heap_.size(); }
  bool is_ordered() const;
  std::size_t memory_bytes() const {
    return heap_.capacity() * sizeof(Entry) + position_.capacity() * sizeof(std::uint32_t);
  }

 private:
  struct Entry {
    std::uint64_t priority;
    NodeIndex node;
  };
  static constexpr std::size_t kArity = 4;
  static constexpr std::uint32_t kAbsent = UINT32_MAX;

  void put(std::size_t position, Entry entry);
  void sift_up(std::size_t position, Entry entry);
  void sift_down(std::size_t position, Entry entry);

  std::vector<Entry> heap_;
  std::vector<std::uint32_t> position_;  // of each node in heap_, or kAbsent
};

}  // namespace flexkv
