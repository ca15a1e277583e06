#include "flexkv/eviction_queue.h"

#include <algorithm>

namespace flexkv {

void EvictionQueue::push(NodeIndex node, std::uint64_t priority) {
  if (node >= position_.size()) position_.resize(node + 1, kAbsent);
  heap_.emplace_back();
  sift_up(heap_.size() - 1, {priority, node});
}

void EvictionQueue::erase(NodeIndex node) {
  const std::size_t hole = position_[node];
  position_[node] = kAbsent;
  const Entry last = heap_.back();
  heap_.pop_back();
  if (hole == heap_.size()) return;
  if (hole > 0 && last.priority < heap_[(hole - 1) / kArity].priority) {
    sift_up(hole, last);
  } else {
    sift_down(hole, last);
  }
}

bool EvictionQueue::is_ordered() const {
  for (std::size_t i = 0; i < heap_.size(); ++i) {
    if (position_[heap_[i].node] != i) return false;
    if (i > 0 && heap_[i].priority < heap_[(i - 1) / kArity].priority) return false;
  }
  return true;
}

void EvictionQueue::put(std::size_t position, Entry entry) {
  heap_[position] = entry;
  position_[entry.node] = static_cast<std::uint32_t>(position);
}

void EvictionQueue::sift_up(std::size_t position, Entry entry) {
  while (position > 0) {
    const std::size_t parent = (position - 1) / kArity;
    if (heap_[parent].priority <= entry.priority) break;
    put(position, heap_[parent]);
    position = parent;
  }
  put(position, entry);
}

void EvictionQueue::sift_down(std::size_t position, Entry entry) {
  for (;;) {
    const std::size_t first = position * kArity + 1;
    if (first >= heap_.size()) break;
    const std::size_t end = std::min(first + kArity, heap_.size());
    std::size_t least = first;
    for (std::size_t child = first + 1; child < end; ++child) {
      if (heap_[child].priority < heap_[least].priority) least = child;
    }
    if (entry.priority <= heap_[least].priority) break;
    put(position, heap_[least]);
    position = least;
  }
  put(position, entry);
}

}  // namespace flexkv
