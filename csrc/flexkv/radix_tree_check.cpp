// The invariants of the tree, and what else visits every node.
#include <string>
#include <unordered_set>

#include "flexkv/errors.h"
#include "flexkv/radix_tree.h"

namespace flexkv {

namespace {

void require(bool holds, const char* invariant, NodeIndex index) {
  if (!holds) throw StateError("broken invariant at node " + std::to_string(index) + ": " + invariant);
}

}  // namespace

std::vector<std::int64_t> RadixTree::all_block_ids() const {
  std::vector<std::int64_t> ids;
  for (NodeIndex index = kRoot + 1; index < num_slots_; ++index) {
    if (node(index).in_use) take_block_ids(node(index), 0, ids);
  }
  return ids;
}

void RadixTree::check_integrity() const {
  TreeCounts seen;
  std::size_t num_evictable = 0;
  for (NodeIndex index = kRoot; index < num_slots_; ++index) {
    const Node& current = node(index);
    if (!current.in_use) continue;
    check_links(index);
    if (index == kRoot) continue;
    check_node(index);
    ++seen.num_nodes;
    (current.detached ? seen.num_detached_blocks : seen.num_blocks) += current.num_blocks;
    if (current.ready && !current.detached) seen.num_ready_blocks += current.num_blocks;
    num_evictable += evictable_.contains(index);
  }
  require(seen.num_blocks == counts_.num_blocks, "num_blocks is the sum over the index", kRoot);
  require(seen.num_ready_blocks == counts_.num_ready_blocks, "num_ready_blocks is the sum over its ready nodes", kRoot);
  require(seen.num_detached_blocks == counts_.num_detached_blocks, "num_detached_blocks is their sum", kRoot);
  require(seen.num_nodes == counts_.num_nodes, "num_nodes is their number", kRoot);
  require(num_evictable == evictable_.size(), "only nodes of the tree are in the eviction queue", kRoot);
  require(evictable_.is_ordered(), "the eviction queue is a heap", kRoot);
  const std::vector<std::int64_t> ids = all_block_ids();
  const std::unordered_set<std::int64_t> distinct(ids.begin(), ids.end());
  require(distinct.size() == ids.size(), "no physical block belongs to two nodes", kRoot);
}

void RadixTree::check_node(NodeIndex index) const {
  const Node& current = node(index);
  const Node& parent = node(current.parent);
  require(current.num_blocks > 0, "a node has blocks", index);
  require(parent.in_use, "the parent is alive", index);
  require(parent.lock_count >= current.lock_count, "whoever locks a node locks its parent", index);
  require(current.detached || !parent.detached, "what is below a detached node is detached", index);
  require(current.ready || current.lock_count > 0, "an unready node is locked by whoever fills it", index);
  require(current.detached ? current.lock_count > 0 : find_child(current.parent, current.run.digests()) == index,
          "a detached node is locked, another one can be found", index);
  require(parent.use.last_access >= current.use.last_access, "a parent was used no earlier than its child", index);
  require(evictable_.contains(index) == is_evictable(index), "the eviction queue holds what is evictable", index);
}

void RadixTree::check_links(NodeIndex index) const {
  std::size_t child_locks = 0;
  NodeIndex previous = kNoNode;
  for (NodeIndex child = node(index).first_child; child != kNoNode; child = node(child).next_sibling) {
    require(node(child).in_use && !node(child).detached, "children are alive and in the index", index);
    require(node(child).parent == index, "a child knows its parent", index);
    require(node(child).previous_sibling == previous, "a child knows its elder sibling", index);
    child_locks += node(child).lock_count;
    previous = child;
  }
  require(node(index).lock_count >= child_locks, "a node has the locks of its children", index);
}

}  // namespace flexkv
