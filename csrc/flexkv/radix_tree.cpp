#include "flexkv/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "flexkv/errors.h"

namespace flexkv {

RadixTree::RadixTree(std::size_t digest_size, std::string_view policy) : digest_size_(digest_size) {
  if (digest_size < 8 || digest_size % 4 != 0) {
    throw std::invalid_argument("a digest has at least 8 bytes and a multiple of 4, not " +
                                std::to_string(digest_size));
  }
  const EvictionPolicy* found = find_eviction_policy(policy);
  if (found == nullptr) throw std::invalid_argument("unknown eviction policy " + std::string(policy));
  priority_ = found->priority;
  node(new_node(0)).ready = 1;  // the root
  counts_.num_nodes = 0;
}

// ---- nodes ----

Handle RadixTree::handle_of(NodeIndex index) const {
  return Handle{node(index).generation} << 32 | index;
}

NodeIndex RadixTree::resolve(Handle handle) const {
  const auto index = static_cast<NodeIndex>(handle);
  if (index >= num_slots_ || !node(index).in_use || node(index).generation != handle >> 32) {
    throw StateError("handle " + std::to_string(handle) + " names a node that is gone");
  }
  return index;
}

NodeIndex RadixTree::new_node(std::size_t num_blocks) {
  BlockRun run = num_blocks == 0 ? BlockRun() : BlockRun(num_blocks, digest_size_);
  NodeIndex index = free_nodes_;
  if (index != kNoNode) {
    free_nodes_ = node(index).next_sibling;
  } else {
    if (num_slots_ == chunks_.size() * kChunkNodes) chunks_.push_back(std::make_unique<Node[]>(kChunkNodes));
    index = static_cast<NodeIndex>(num_slots_++);
  }
  Node& fresh = node(index);
  fresh.next_sibling = kNoNode;
  fresh.in_use = 1;
  fresh.num_blocks = static_cast<std::uint32_t>(num_blocks);
  fresh.run = std::move(run);
  run_bytes_ += fresh.run.memory_bytes();
  ++counts_.num_nodes;
  return index;
}

void RadixTree::free_node(NodeIndex index) {
  Node& old = node(index);
  run_bytes_ -= old.run.memory_bytes();
  --counts_.num_nodes;
  const std::uint32_t generation = old.generation + 1;
  old = Node{};
  old.generation = generation & ((1u << 29) - 1);
  old.next_sibling = free_nodes_;
  free_nodes_ = index;
}

void RadixTree::link(NodeIndex parent, NodeIndex child) {
  Node& below = node(child);
  Node& above = node(parent);
  below.parent = parent;
  below.previous_sibling = kNoNode;
  below.next_sibling = above.first_child;
  if (above.first_child != kNoNode) node(above.first_child).previous_sibling = child;
  above.first_child = child;
  children_.insert(ChildTable::tag(parent, below.run.digests()), child);
}

void RadixTree::unlink(NodeIndex child) {
  Node& below = node(child);
  children_.erase(ChildTable::tag(below.parent, below.run.digests()), child);
  if (below.previous_sibling != kNoNode) {
    node(below.previous_sibling).next_sibling = below.next_sibling;
  } else {
    node(below.parent).first_child = below.next_sibling;
  }
  if (below.next_sibling != kNoNode) node(below.next_sibling).previous_sibling = below.previous_sibling;
  below.previous_sibling = below.next_sibling = kNoNode;  // the parent stays known: locks are given back through it
}

// ---- matching ----

NodeIndex RadixTree::find_child(NodeIndex parent, const std::uint8_t* first_digest) const {
  return children_.find(ChildTable::tag(parent, first_digest), [&](NodeIndex child) {
    const Node& candidate = node(child);
    return candidate.parent == parent && std::memcmp(candidate.run.digests(), first_digest, digest_size_) == 0;
  });
}

std::size_t RadixTree::equal_blocks(const Node& node, const std::uint8_t* digests, std::size_t count) const {
  // Whole stretches first: a mismatch is rare, and then only its stretch is looked at again.
  constexpr std::size_t kStretch = 64;
  const std::uint8_t* stored = node.run.digests();
  const std::size_t limit = std::min<std::size_t>(node.num_blocks, count);
  std::size_t equal = 0;
  while (equal < limit) {
    const std::size_t step = std::min(kStretch, limit - equal);
    const std::size_t offset = equal * digest_size_;
    if (std::memcmp(stored + offset, digests + offset, step * digest_size_) != 0) break;
    equal += step;
  }
  while (equal < limit && std::memcmp(stored + equal * digest_size_, digests + equal * digest_size_, digest_size_) == 0) {
    ++equal;
  }
  return equal;
}

RadixTree::Walk RadixTree::walk(Digests sequence) const {
  Walk result;
  Position& at = result.present;
  bool ready = true;
  while (at.num_blocks < sequence.count && at.num_in_node == node(at.node).num_blocks) {
    const std::uint8_t* rest = sequence.data + at.num_blocks * digest_size_;
    const NodeIndex child = find_child(at.node, rest);
    if (child == kNoNode) break;
    const std::size_t equal = equal_blocks(node(child), rest, sequence.count - at.num_blocks);
    at = {child, equal, at.num_blocks + equal};
    ready = ready && node(child).ready;
    if (ready) result.ready = at;
  }
  return result;
}

MatchLength RadixTree::match(Digests sequence) const {
  const Walk found = walk(sequence);
  return {found.present.num_blocks, found.ready.num_blocks};
}

LockedPrefix RadixTree::lock_prefix(Digests sequence, bool ready_only) {
  const Walk found = walk(sequence);
  const Position& end = ready_only ? found.ready : found.present;
  const bool is_whole = end.num_in_node == node(end.node).num_blocks;
  const NodeIndex bottom = is_whole ? end.node : split(end.node, end.num_in_node);
  ++clock_;
  for (NodeIndex index = bottom; index != kNoNode; index = node(index).parent) {
    Node& used = node(index);
    used.use.touch(clock_);
    ++used.lock_count;
    update_evictable(index);
  }
  return {handle_of(bottom), end.num_blocks};
}

NodeIndex RadixTree::split(NodeIndex index, std::size_t num_prefix_blocks) {
  const std::size_t num_suffix_blocks = node(index).num_blocks - num_prefix_blocks;
  BlockRun suffix_run(num_suffix_blocks, digest_size_);
  const NodeIndex prefix_index = new_node(num_prefix_blocks);
  Node& suffix = node(index);
  Node& prefix = node(prefix_index);
  const NodeIndex parent = suffix.parent;
  unlink(index);

  const std::uint32_t* ids = suffix.run.block_ids(digest_size_);
  std::memcpy(prefix.run.digests(), suffix.run.digests(), num_prefix_blocks * digest_size_);
  std::copy_n(ids, num_prefix_blocks, prefix.run.block_ids(digest_size_));
  std::memcpy(suffix_run.digests(), suffix.run.digests() + num_prefix_blocks * digest_size_,
              num_suffix_blocks * digest_size_);
  std::copy_n(ids + num_prefix_blocks, num_suffix_blocks, suffix_run.block_ids(digest_size_));

  run_bytes_ += suffix_run.memory_bytes();
  run_bytes_ -= suffix.run.memory_bytes();
  suffix.run = std::move(suffix_run);
  suffix.num_blocks = static_cast<std::uint32_t>(num_suffix_blocks);
  prefix.use = suffix.use;
  prefix.lock_count = suffix.lock_count;  // every path through the old node goes through both halves
  prefix.ready = suffix.ready;
  link(parent, prefix_index);
  link(prefix_index, index);
  return prefix_index;
}

void RadixTree::path_block_ids(Handle handle, std::size_t first, std::span<std::int64_t> out) const {
  std::vector<const Node*> path;
  std::size_t length = 0;
  for (NodeIndex index = resolve(handle); index != kNoNode; index = node(index).parent) {
    path.push_back(&node(index));
    length += node(index).num_blocks;
  }
  if (first > length || out.size() > length - first) {
    throw StateError("blocks " + std::to_string(first) + ".." + std::to_string(first + out.size()) +
                     " of a path that has " + std::to_string(length));
  }
  std::size_t start = 0;  // of the current node in the path
  std::size_t filled = 0;
  for (auto current = path.rbegin(); current != path.rend() && filled < out.size(); ++current) {
    const std::size_t end = start + (*current)->num_blocks;
    const std::uint32_t* ids = (*current)->run.block_ids(digest_size_);
    for (std::size_t block = std::max(first + filled, start); block < end && filled < out.size(); ++block) {
      out[filled++] = ids[block - start];
    }
    start = end;
  }
}

// ---- inserting and removing ----

Handle RadixTree::insert(Handle handle, Digests digests, std::span<const std::int64_t> block_ids) {
  const NodeIndex parent = resolve(handle);
  if (node(parent).lock_count == 0) throw StateError("insert below a node that is not locked");
  if (node(parent).detached) throw StateError("insert below a node that is out of the index");
  if (digests.count == 0 || digests.count != block_ids.size()) {
    throw StateError("insert takes one block id per digest and at least one, not " + std::to_string(digests.count) +
                     " digests and " + std::to_string(block_ids.size()) + " ids");
  }
  for (const std::int64_t id : block_ids) {
    if (id < 0 || id > UINT32_MAX) throw StateError("block id " + std::to_string(id) + " is outside 0..2**32-1");
  }
  if (find_child(parent, digests.data) != kNoNode) throw StateError("insert of a block that is in the index");
  const NodeIndex index = new_node(digests.count);
  Node& fresh = node(index);
  std::memcpy(fresh.run.digests(), digests.data, digests.count * digest_size_);
  std::transform(block_ids.begin(), block_ids.end(), fresh.run.block_ids(digest_size_),
                 [](std::int64_t id) { return static_cast<std::uint32_t>(id); });
  fresh.use = {.last_access = node(parent).use.last_access, .num_uses = 1, .inserted = clock_};
  fresh.lock_count = 1;
  link(parent, index);
  counts_.num_blocks += digests.count;
  return handle_of(index);
}

NodeIndex RadixTree::top_of_suffix(NodeIndex bottom, std::size_t num_blocks) const {
  std::size_t covered = 0;
  for (NodeIndex index = bottom; index != kRoot; index = node(index).parent) {
    covered += node(index).num_blocks;
    if (covered == num_blocks) return index;
    if (covered > num_blocks) break;
  }
  throw StateError("the last " + std::to_string(num_blocks) + " blocks of the path are not whole nodes");
}

bool RadixTree::set_ready(Handle handle, std::size_t num_blocks) {
  const NodeIndex bottom = resolve(handle);
  const NodeIndex top = top_of_suffix(bottom, num_blocks);
  for (NodeIndex index = bottom;; index = node(index).parent) {
    Node& filled = node(index);
    if (!filled.ready && !filled.detached) counts_.num_ready_blocks += filled.num_blocks;
    filled.ready = 1;
    update_evictable(index);
    if (index == top) break;
  }
  return is_servable(handle);
}

bool RadixTree::is_attached(Handle handle) const { return !node(resolve(handle)).detached; }

bool RadixTree::is_servable(Handle handle) const {
  for (NodeIndex index = resolve(handle); index != kNoNode; index = node(index).parent) {
    if (!node(index).ready || node(index).detached) return false;
  }
  return true;
}

Removal RadixTree::remove(Handle handle, std::size_t num_blocks) {
  NodeIndex top = resolve(handle);
  std::size_t covered = node(top).num_blocks;
  while (covered < num_blocks && top != kRoot) {
    top = node(top).parent;
    covered += node(top).num_blocks;
  }
  if (num_blocks == 0 || top == kRoot) {
    throw StateError("remove of the last " + std::to_string(num_blocks) + " blocks of a path that has " +
                     std::to_string(covered));
  }
  Removal removal;
  if (node(top).detached) return removal;
  const NodeIndex parent = covered == num_blocks ? node(top).parent : split(top, covered - num_blocks);
  unlink(top);
  detach(top, is_servable(handle_of(parent)), removal);
  update_evictable(parent);
  return removal;
}

// Visits the subtree of `top`, which is unlinked already; a loop, because a chain may be as long as a sequence.
void RadixTree::detach(NodeIndex top, bool servable, Removal& removal) {
  std::vector<std::pair<NodeIndex, bool>> todo{{top, servable}};
  while (!todo.empty()) {
    const auto [index, parent_servable] = todo.back();
    todo.pop_back();
    Node& current = node(index);
    const bool was_servable = parent_servable && current.ready;
    if (was_servable) take_digests(current, 0, removal.digests);
    while (current.first_child != kNoNode) {
      todo.emplace_back(current.first_child, was_servable);
      unlink(current.first_child);
    }
    current.detached = 1;
    counts_.num_blocks -= current.num_blocks;
    if (current.ready) counts_.num_ready_blocks -= current.num_blocks;
    if (evictable_.contains(index)) evictable_.erase(index);
    if (current.lock_count > 0) {
      counts_.num_detached_blocks += current.num_blocks;
    } else {
      take_block_ids(current, 0, removal.block_ids);
      free_node(index);
    }
  }
}

std::vector<std::int64_t> RadixTree::unlock(Handle handle) {
  const NodeIndex bottom = resolve(handle);
  if (node(bottom).lock_count == 0) throw StateError("unlock of a node that is not locked");
  for (NodeIndex index = bottom; index != kNoNode; index = node(index).parent) {
    const Node& current = node(index);
    if (current.lock_count == 1 && !current.ready && !current.detached) {
      throw StateError("unlock of an unready node by its last holder: set it ready or remove it first");
    }
  }
  std::vector<std::int64_t> freed;
  NodeIndex parent = kNoNode;
  for (NodeIndex index = bottom; index != kNoNode; index = parent) {
    Node& current = node(index);
    parent = current.parent;
    --current.lock_count;
    if (!current.detached) {
      update_evictable(index);
    } else if (current.lock_count == 0) {
      counts_.num_detached_blocks -= current.num_blocks;
      take_block_ids(current, 0, freed);
      free_node(index);
    }
  }
  return freed;
}

void RadixTree::take_block_ids(const Node& node, std::size_t first, std::vector<std::int64_t>& out) const {
  const std::uint32_t* ids = node.run.block_ids(digest_size_);
  out.insert(out.end(), ids + first, ids + node.num_blocks);
}

void RadixTree::take_digests(const Node& node, std::size_t first, std::vector<std::uint8_t>& out) const {
  const std::uint8_t* digests = node.run.digests();
  out.insert(out.end(), digests + first * digest_size_, digests + node.num_blocks * digest_size_);
}

// ---- eviction ----

bool RadixTree::is_evictable(NodeIndex index) const {
  const Node& leaf = node(index);
  return index != kRoot && leaf.ready && !leaf.detached && leaf.lock_count == 0 && leaf.first_child == kNoNode;
}

void RadixTree::update_evictable(NodeIndex index) {
  const bool should = is_evictable(index);
  if (should == evictable_.contains(index)) return;
  if (should) {
    evictable_.push(index, priority_(node(index).use));
  } else {
    evictable_.erase(index);
  }
}

Removal RadixTree::evict(std::size_t num_blocks) {
  Removal removal;
  while (removal.block_ids.size() < num_blocks && !evictable_.empty()) {
    const NodeIndex index = evictable_.top();
    Node& leaf = node(index);
    const std::size_t taken = std::min<std::size_t>(leaf.num_blocks, num_blocks - removal.block_ids.size());
    const std::size_t kept = leaf.num_blocks - taken;
    take_block_ids(leaf, kept, removal.block_ids);
    take_digests(leaf, kept, removal.digests);
    counts_.num_blocks -= taken;
    counts_.num_ready_blocks -= taken;
    if (kept > 0) {
      leaf.num_blocks = static_cast<std::uint32_t>(kept);
      break;
    }
    const NodeIndex parent = leaf.parent;
    evictable_.erase(index);
    unlink(index);
    free_node(index);
    update_evictable(parent);
  }
  return removal;
}

TreeCounts RadixTree::counts() const {
  TreeCounts counts = counts_;
  counts.num_locks = node(kRoot).lock_count;
  return counts;
}

std::size_t RadixTree::memory_bytes() const {
  return chunks_.size() * kChunkNodes * sizeof(Node) + run_bytes_ + children_.memory_bytes() +
         evictable_.memory_bytes();
}

}  // namespace flexkv
