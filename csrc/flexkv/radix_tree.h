// The index of one tier: which block sequences it holds, and in which physical blocks.
//
//   root (no blocks)
//   +-- [h0 h1 h2 | 7 8 9]       a node is a run of digests and of physical block ids;
//   |   +-- [h3 | 12]            siblings differ in their first digest
//   |   +-- [k3 k4 | 5 6]
//   +-- [g0 g1 | 3 4]
//
// Ready.   A node is inserted unready and becomes ready when its bytes have arrived. Only an unbroken ready prefix is
//          served.
// Locks.   A lock is held on a path: every node from its bottom up to the root. Locked and unready nodes and nodes with
//          children are never evicted. `lock_prefix` splits a node that is used in part, so that use and locks are exact.
// Splits.  The new node is the prefix; the old one stays the bottom of whoever holds it, so handles survive splits.
// Detached nodes. `remove` takes a subtree out of the index at once. Its locked nodes live on, unreachable, and give
//          their blocks back with their last unlock, since a copy may still be reading or writing them.
//
// A Handle names a node and its generation; using one whose node is gone throws StateError. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "flexkv/block_run.h"
#include "flexkv/child_table.h"
#include "flexkv/eviction_policy.h"
#include "flexkv/eviction_queue.h"

namespace flexkv {

using Handle = std::uint64_t;

// `count` packed digests, each of the tree's digest size.
struct Digests {
  const std::uint8_t* data;
  std::size_t count;
};

struct MatchLength {
  std::size_t num_present;  // blocks of the prefix in the index, ready or not
  std::size_t num_ready;    // blocks of the prefix that can be served
};

struct LockedPrefix {
  Handle handle;  // bottom node of the locked path
  std::size_t num_blocks;
};

struct Removal {
  std::vector<std::int64_t> block_ids;  // physical blocks that nobody holds any more
  std::vector<std::uint8_t> digests;    // packed digests of the blocks that could be served before
};

struct TreeCounts {
  std::size_t num_blocks = 0;           // in the index, ready or not
  std::size_t num_ready_blocks = 0;     // in the index and ready
  std::size_t num_detached_blocks = 0;  // out of the index, still locked
  std::size_t num_nodes = 0;            // of both kinds, without the root
  std::size_t num_locks = 0;            // outstanding
};

class RadixTree {
 public:
  // `digest_size` is a multiple of 4 and at least 8. Throws std::invalid_argument on it or on an unknown policy.
  RadixTree(std::size_t digest_size, std::string_view policy);
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  // Measures the stored prefix of a sequence. Counts as no use.
  MatchLength match(Digests sequence) const;

  // Locks the longest stored prefix (ready_only: the longest that can be served) and counts as a use of its blocks.
  // The root is locked when nothing matches.
  LockedPrefix lock_prefix(Digests sequence, bool ready_only);

  // Physical blocks [first, first + out.size()) of the path that ends at `handle`.
  // Throws StateError when the path is shorter.
  void path_block_ids(Handle handle, std::size_t first, std::span<std::int64_t> out) const;

  // Adds an unready node with these blocks below `handle`, whose lock moves down to the new node: returns its handle.
  // Throws StateError unless `handle` is locked and in the index, and has no child that starts with the same digest.
  Handle insert(Handle handle, Digests digests, std::span<const std::int64_t> block_ids);

  // Marks the last `num_blocks` blocks of the path ready. Returns whether they can be served now: they are in the index,
  // and everything above them is ready. Throws StateError unless these blocks are whole nodes.
  bool set_ready(Handle handle, std::size_t num_blocks);

  // Whether the node is in the index, and whether it and everything above it is ready.
  bool is_attached(Handle handle) const;
  bool is_servable(Handle handle) const;

  // Takes the last `num_blocks` blocks of the path, and everything below them, out of the index. No change when an
  // earlier `remove` did. Throws StateError when the path is shorter, or num_blocks is 0.
  Removal remove(Handle handle, std::size_t num_blocks);

  // Gives one lock back; returns the blocks of detached nodes that nobody locks any more.
  // Throws StateError when the node is not locked, or when that would leave an unready node without any lock.
  std::vector<std::int64_t> unlock(Handle handle);

  // Takes up to `num_blocks` blocks out of evictable leaves, from their ends, in the order of the policy.
  // `block_ids` and `digests` of the result correspond.
  Removal evict(std::size_t num_blocks);

  TreeCounts counts() const;
  std::size_t memory_bytes() const;
  std::size_t digest_size() const { return digest_size_; }
  std::vector<std::int64_t> all_block_ids() const;  // in the index and detached, in no order

  // Throws StateError with the first broken invariant. For tests and tools: visits every node.
  void check_integrity() const;

 private:
  struct Node {
    BlockRun run;
    NodeUse use;
    std::uint32_t num_blocks = 0;
    std::uint32_t lock_count = 0;
    std::uint32_t generation : 29 = 0;
    std::uint32_t in_use : 1 = 0;
    std::uint32_t ready : 1 = 0;
    std::uint32_t detached : 1 = 0;
    NodeIndex parent = kNoNode;
    NodeIndex first_child = kNoNode;
    NodeIndex previous_sibling = kNoNode;
    NodeIndex next_sibling = kNoNode;  // of a free node: the next free one
  };
  // A place in the tree: `num_blocks` of the sequence reach into `node`, of whose run they use `num_in_node`.
  struct Position {
    NodeIndex node = kRoot;
    std::size_t num_in_node = 0;
    std::size_t num_blocks = 0;
  };
  struct Walk {
    Position present;
    Position ready;
  };
  static constexpr NodeIndex kRoot = 0;
  static constexpr std::size_t kChunkNodes = 1024;  // nodes never move: they live in chunks

  Node& node(NodeIndex index) { return chunks_[index / kChunkNodes][index % kChunkNodes]; }
  const Node& node(NodeIndex index) const { return chunks_[index / kChunkNodes][index % kChunkNodes]; }
  Handle handle_of(NodeIndex index) const;
  NodeIndex resolve(Handle handle) const;

  NodeIndex new_node(std::size_t num_blocks);
  void free_node(NodeIndex index);
  void link(NodeIndex parent, NodeIndex child);
  void unlink(NodeIndex child);

  Walk walk(Digests sequence) const;
  std::size_t equal_blocks(const Node& node, const std::uint8_t* digests, std::size_t count) const;
  NodeIndex find_child(NodeIndex parent, const std::uint8_t* first_digest) const;
  NodeIndex split(NodeIndex index, std::size_t num_prefix_blocks);
  NodeIndex top_of_suffix(NodeIndex bottom, std::size_t num_blocks) const;
  void detach(NodeIndex index, bool servable, Removal& removal);
  void take_block_ids(const Node& node, std::size_t first, std::vector<std::int64_t>& out) const;
  void take_digests(const Node& node, std::size_t first, std::vector<std::uint8_t>& out) const;
  bool is_evictable(NodeIndex index) const;
  void update_evictable(NodeIndex index);

  void check_node(NodeIndex index) const;
  void check_links(NodeIndex index) const;

  std::size_t digest_size_;
  PriorityFunction priority_;
  std::uint64_t clock_ = 0;
  std::vector<std::unique_ptr<Node[]>> chunks_;
  std::size_t num_slots_ = 0;  // nodes ever handed out, free ones included
  NodeIndex free_nodes_ = kNoNode;
  ChildTable children_;
  EvictionQueue evictable_;
  TreeCounts counts_;
  std::size_t run_bytes_ = 0;
};

}  // namespace flexkv
