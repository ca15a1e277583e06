#include "flexkv/radix_tree.h"

#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "flexkv/errors.h"
#include "flexkv/mempool.h"

using flexkv::Digests;
using flexkv::Handle;
using flexkv::RadixTree;
using flexkv::Removal;
using flexkv::StateError;
using Ids = std::vector<std::int64_t>;

namespace {

constexpr std::size_t kDigestSize = 16;

// A sequence of blocks named by numbers; equal numbers at one place are equal digests.
class Sequence {
 public:
  Sequence(std::initializer_list<int> names) : Sequence(std::vector<int>(names)) {}
  explicit Sequence(const std::vector<int>& names) : bytes_(names.size() * kDigestSize) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        bytes_[i * kDigestSize + byte] = static_cast<std::uint8_t>(names[i] >> (8 * byte));
      }
      bytes_[i * kDigestSize + kDigestSize - 1] = static_cast<std::uint8_t>(names[i]);
    }
  }
  Digests from(std::size_t first) const {
    return {bytes_.data() + first * kDigestSize, bytes_.size() / kDigestSize - first};
  }
  operator Digests() const { return from(0); }

 private:
  std::vector<std::uint8_t> bytes_;
};

Sequence numbers(int first, int count) {
  std::vector<int> names(count);
  std::iota(names.begin(), names.end(), first);
  return Sequence(names);
}

// Inserts what is missing of `sequence` with ids counted from `first_id`; the caller holds the lock.
Handle insert_missing(RadixTree& tree, const Sequence& sequence, std::int64_t first_id) {
  const auto prefix = tree.lock_prefix(sequence, false);
  const Digests missing = sequence.from(prefix.num_blocks);
  Ids ids(missing.count);
  std::iota(ids.begin(), ids.end(), first_id);
  return tree.insert(prefix.handle, missing, ids);
}

void store(RadixTree& tree, const Sequence& sequence, std::int64_t first_id) {
  const std::size_t present = tree.match(sequence).num_present;
  const Handle handle = insert_missing(tree, sequence, first_id);
  tree.set_ready(handle, Digests(sequence).count - present);
  tree.unlock(handle);
  tree.check_integrity();
}

Ids path(const RadixTree& tree, Handle handle, std::size_t count) {
  Ids ids(count);
  tree.path_block_ids(handle, 0, ids);
  return ids;
}

}  // namespace

TEST_CASE("a tree refuses digests and policies it cannot have") {
  CHECK_THROWS_AS(RadixTree(4, "lru"), std::invalid_argument);
  CHECK_THROWS_AS(RadixTree(18, "lru"), std::invalid_argument);
  CHECK_THROWS_AS(RadixTree(16, "random"), std::invalid_argument);
}

TEST_CASE("only a ready prefix is served") {
  RadixTree tree(kDigestSize, "lru");
  const Sequence sequence{1, 2, 3, 4};
  store(tree, {1, 2}, 10);
  const Handle handle = insert_missing(tree, sequence, 20);
  CHECK(tree.match(sequence).num_present == 4);
  CHECK(tree.match(sequence).num_ready == 2);
  CHECK(tree.set_ready(handle, 2));
  CHECK(tree.match(sequence).num_ready == 4);
  CHECK(path(tree, handle, 4) == Ids{10, 11, 20, 21});
  tree.unlock(handle);
  tree.check_integrity();
}

TEST_CASE("digests that agree in 64 bits are different blocks") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2}, 0);
  std::vector<std::uint8_t> forged(2 * kDigestSize);
  forged[0] = 1;
  forged[kDigestSize - 1] = 9;
  CHECK(tree.match({forged.data(), 2}).num_present == 0);
}

TEST_CASE("a split keeps blocks, locks and handles") {
  RadixTree tree(kDigestSize, "lru");
  const Handle writer = insert_missing(tree, {1, 2, 3, 4}, 10);
  const Handle other = insert_missing(tree, {1, 2, 7}, 20);
  tree.check_integrity();
  CHECK(tree.counts().num_nodes == 3);
  CHECK(tree.set_ready(writer, 4));
  CHECK(tree.set_ready(other, 1));
  CHECK(path(tree, writer, 4) == Ids{10, 11, 12, 13});
  CHECK(path(tree, other, 3) == Ids{10, 11, 20});
  CHECK(tree.evict(10).block_ids.empty());
  tree.unlock(writer);
  CHECK(tree.evict(10).block_ids == Ids{12, 13});
  tree.unlock(other);
  tree.check_integrity();
  CHECK(tree.evict(10).block_ids.size() == 3);
  CHECK(tree.counts().num_nodes == 0);
  CHECK_THROWS_AS(tree.unlock(writer), StateError);
}

TEST_CASE("eviction takes the ends of the leaves used longest ago") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2, 3}, 0);
  store(tree, {1, 2, 4, 5}, 10);
  store(tree, {8, 9}, 20);
  const auto used = tree.lock_prefix(Sequence{1, 2, 3}, true);
  tree.unlock(used.handle);
  CHECK(tree.evict(1).block_ids == Ids{11});
  const Removal removal = tree.evict(3);
  CHECK(removal.block_ids == Ids{10, 20, 21});
  CHECK(removal.digests.size() == 3 * kDigestSize);
  CHECK(removal.digests[0] == 4);
  CHECK(tree.match(Sequence{1, 2, 3}).num_ready == 3);
  tree.check_integrity();
}

TEST_CASE("a partial use locks and refreshes that part alone") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2, 3, 4}, 0);
  const auto prefix = tree.lock_prefix(Sequence{1, 2, 9}, true);
  CHECK(prefix.num_blocks == 2);
  CHECK(tree.evict(10).block_ids == Ids{2, 3});
  tree.unlock(prefix.handle);
  tree.check_integrity();
}

TEST_CASE("removed nodes give their blocks back with their last lock") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1}, 0);
  const Handle failed = insert_missing(tree, {1, 2, 3}, 10);
  const Handle below = insert_missing(tree, {1, 2, 3, 4}, 20);
  CHECK_FALSE(tree.set_ready(below, 1));
  CHECK(tree.remove(failed, 2).block_ids.empty());
  tree.check_integrity();
  CHECK(tree.match(Sequence{1, 2, 3, 4}).num_present == 1);
  CHECK(tree.counts().num_detached_blocks == 3);
  CHECK(tree.remove(failed, 2).block_ids.empty());
  CHECK_FALSE(tree.is_attached(below));
  CHECK(tree.unlock(failed) == Ids{});
  CHECK(tree.unlock(below) == Ids{20, 10, 11});
  tree.check_integrity();
  CHECK(tree.counts().num_blocks == 1);
  CHECK(tree.counts().num_locks == 0);
}

TEST_CASE("removing what could be served names it") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2}, 0);
  store(tree, {1, 2, 3}, 10);
  const auto held = tree.lock_prefix(Sequence{1, 2}, true);
  const Removal removal = tree.remove(held.handle, 2);
  CHECK(removal.digests.size() == 3 * kDigestSize);
  CHECK(removal.block_ids == Ids{10});
  CHECK(tree.unlock(held.handle).size() == 2);
  tree.check_integrity();
}

TEST_CASE("removing a part of a node splits it") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2, 3, 4}, 0);
  const auto held = tree.lock_prefix(Sequence{1, 2, 3, 4}, true);
  CHECK(tree.remove(held.handle, 3).digests.size() == 3 * kDigestSize);
  tree.check_integrity();
  CHECK(tree.match(Sequence{1, 2}).num_ready == 1);
  CHECK(path(tree, held.handle, 4) == Ids{0, 1, 2, 3});
  CHECK(tree.unlock(held.handle) == Ids{1, 2, 3});
  tree.check_integrity();
  CHECK(tree.evict(4).block_ids == Ids{0});
}

TEST_CASE("misuse is refused and changes nothing") {
  RadixTree tree(kDigestSize, "lru");
  store(tree, {1, 2}, 0);
  const auto held = tree.lock_prefix(Sequence{1, 2}, true);
  const Sequence more{3, 4};
  CHECK_THROWS_AS(tree.insert(held.handle, more, Ids{1}), StateError);
  CHECK_THROWS_AS(tree.insert(held.handle, more, Ids{1, -1}), StateError);
  CHECK_THROWS_AS(tree.set_ready(held.handle, 1), StateError);
  CHECK_THROWS_AS(tree.set_ready(held.handle, 3), StateError);
  CHECK_THROWS_AS(path(tree, held.handle, 3), StateError);
  CHECK_THROWS_AS(tree.remove(held.handle, 3), StateError);
  CHECK_THROWS_AS(tree.remove(held.handle, 0), StateError);
  CHECK_THROWS_AS(tree.unlock(held.handle + 1), StateError);
  const Handle writer = tree.insert(held.handle, more, Ids{5, 6});
  CHECK_THROWS_AS(tree.unlock(writer), StateError);
  tree.remove(writer, 2);
  tree.unlock(writer);
  CHECK_THROWS_AS(tree.unlock(held.handle), StateError);
  CHECK_THROWS_AS(tree.insert(held.handle, more, Ids{5, 6}), StateError);
  tree.check_integrity();
}

TEST_CASE("a chain of ten thousand nodes is removed at once") {
  RadixTree tree(kDigestSize, "lru");
  auto at = tree.lock_prefix(Sequence{}, false).handle;
  for (int block = 0; block < 10'000; ++block) {
    at = tree.insert(at, numbers(block, 1), Ids{block});
  }
  CHECK(tree.set_ready(at, 10'000));
  tree.remove(at, 10'000);
  CHECK(tree.unlock(at).size() == 10'000);
  tree.check_integrity();
}

TEST_CASE("a full pool turns over without losing a block") {
  std::mt19937 random(11);
  constexpr std::size_t kBlocks = 500;
  flexkv::Mempool pool(kBlocks);
  RadixTree tree(kDigestSize, "lru");
  for (int step = 0; step < 3000; ++step) {
    const int conversation = static_cast<int>(random() % 40);
    const Sequence sequence = numbers(conversation * 1000, 1 + static_cast<int>(random() % 60));
    const auto prefix = tree.lock_prefix(sequence, false);
    const Digests missing = sequence.from(prefix.num_blocks);
    if (missing.count > pool.num_free()) pool.recycle(tree.evict(missing.count - pool.num_free()).block_ids);
    const std::size_t stored = std::min(missing.count, pool.num_free());
    Handle handle = prefix.handle;
    if (stored > 0) {
      Ids ids(stored);
      pool.allocate(ids);
      handle = tree.insert(handle, {missing.data, stored}, ids);
      if (random() % 5 == 0) {
        pool.recycle(tree.remove(handle, stored).block_ids);
      } else {
        tree.set_ready(handle, stored);
      }
    }
    pool.recycle(tree.unlock(handle));
    if (step % 100 == 0) tree.check_integrity();
    CHECK(pool.num_free() + tree.counts().num_blocks == kBlocks);
  }
  pool.recycle(tree.evict(kBlocks).block_ids);
  CHECK(pool.num_free() == kBlocks);
}
