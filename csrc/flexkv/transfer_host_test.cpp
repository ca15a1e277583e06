#include "transfer_host.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

namespace {

using flexkv::DeviceSide;
using flexkv::Dim;
using flexkv::Direction;
using flexkv::HostTransfer;
using flexkv::PoolSide;

// Layers of [num_blocks, kv, tokens, heads, element], copied as [kv, heads, tokens, element].
struct Fixture {
  int64_t layers, blocks, kv, heads, tokens, element, pool_blocks;
  std::vector<std::vector<std::byte>> tensors;
  std::vector<std::byte> pool;

  Fixture(int64_t layers, int64_t blocks, int64_t kv, int64_t heads, int64_t tokens, int64_t element)
      : layers(layers), blocks(blocks), kv(kv), heads(heads), tokens(tokens), element(element), pool_blocks(blocks) {
    std::mt19937 random(7);
    for (int64_t l = 0; l < layers; ++l) {
      tensors.emplace_back(static_cast<size_t>(blocks * layer_bytes()));
      for (std::byte& b : tensors.back()) b = static_cast<std::byte>(random());
    }
    pool.resize(static_cast<size_t>(pool_blocks * layers * layer_bytes()));
  }
  int64_t layer_bytes() const { return kv * heads * tokens * element; }
  DeviceSide device() {
    DeviceSide side;
    for (auto& tensor : tensors) side.layers.push_back(tensor.data());
    side.num_blocks = blocks;
    side.block_stride = layer_bytes();
    side.element_bytes = element;
    side.dims = {Dim{kv, heads * tokens * element}, Dim{heads, element}, Dim{tokens, heads * element}};
    return side;
  }
  PoolSide pool_side() { return {pool.data(), pool_blocks, layers * layer_bytes(), 0}; }
  std::byte device_byte(int64_t l, int64_t b, int64_t k, int64_t h, int64_t t, int64_t e) const {
    return tensors[static_cast<size_t>(l)][static_cast<size_t>(
        ((((b * kv) + k) * tokens + t) * heads + h) * element + e)];
  }
  std::byte pool_byte(int64_t p, int64_t l, int64_t k, int64_t h, int64_t t, int64_t e) const {
    return pool[static_cast<size_t>((((((p * layers) + l) * kv + k) * heads + h) * tokens + t) * element + e)];
  }
};

void check_round_trip(Fixture fixture, int threads) {
  std::vector<int64_t> device_ids(static_cast<size_t>(fixture.blocks)), pool_ids(device_ids.size());
  std::iota(device_ids.begin(), device_ids.end(), 0);
  std::iota(pool_ids.begin(), pool_ids.end(), 0);
  std::reverse(pool_ids.begin(), pool_ids.end());
  HostTransfer transfer(fixture.device(), fixture.pool_side(), threads);
  transfer.copy(Direction::kToPool, device_ids, pool_ids, 0, fixture.layers);
  bool equal = true;
  for (int64_t b = 0; b < fixture.blocks; ++b)
    for (int64_t l = 0; l < fixture.layers; ++l)
      for (int64_t k = 0; k < fixture.kv; ++k)
        for (int64_t h = 0; h < fixture.heads; ++h)
          for (int64_t t = 0; t < fixture.tokens; ++t)
            for (int64_t e = 0; e < fixture.element; ++e)
              equal &= fixture.pool_byte(fixture.blocks - 1 - b, l, k, h, t, e) ==
                       fixture.device_byte(l, b, k, h, t, e);
  CHECK(equal);
  const auto original = fixture.tensors;
  for (auto& tensor : fixture.tensors) std::fill(tensor.begin(), tensor.end(), std::byte{0});
  transfer.copy(Direction::kToDevice, device_ids, pool_ids, 0, fixture.layers);
  CHECK(fixture.tensors == original);
}

}  // namespace

TEST_CASE("strided blocks survive the round trip, alone and on several threads") {
  check_round_trip(Fixture(3, 5, 2, 2, 4, 7), 1);
  check_round_trip(Fixture(1, 1, 1, 1, 1, 1), 2);
  check_round_trip(Fixture(2, 9, 2, 1, 16, 129), 2);   // one head: tokens merge into one odd run
  check_round_trip(Fixture(4, 40, 2, 4, 16, 256), 3);  // large enough to use every thread
  check_round_trip(Fixture(2, 7, 2, 1, 1, 2048), 1);   // one run per plane, several gathered
  check_round_trip(Fixture(2, 7, 2, 3, 1, 2053), 2);   // odd runs that are streamed, unaligned
  check_round_trip(Fixture(1, 3, 1, 1, 1, 65573), 2);  // one large run with a tail
}

TEST_CASE("a layer range leaves the other layers alone") {
  Fixture fixture(3, 2, 2, 2, 4, 8);
  HostTransfer transfer(fixture.device(), fixture.pool_side(), 1);
  const std::vector<int64_t> ids = {1};
  transfer.copy(Direction::kToPool, ids, ids, 1, 1);
  const auto bytes = static_cast<size_t>(fixture.layer_bytes());
  const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
  const auto block = fixture.pool.begin() + static_cast<ptrdiff_t>(3 * bytes);
  CHECK(std::all_of(fixture.pool.begin(), block + static_cast<ptrdiff_t>(bytes), is_zero));
  CHECK_FALSE(std::all_of(block + static_cast<ptrdiff_t>(bytes), block + static_cast<ptrdiff_t>(2 * bytes), is_zero));
  CHECK(std::all_of(block + static_cast<ptrdiff_t>(2 * bytes), fixture.pool.end(), is_zero));
}

TEST_CASE("a bad block or layer is refused before any byte moves") {
  Fixture fixture(2, 3, 2, 1, 2, 4);
  HostTransfer transfer(fixture.device(), fixture.pool_side(), 1);
  const std::vector<int64_t> good = {0, 1}, bad = {0, 3}, negative = {0, -1}, one = {0};
  CHECK_THROWS_AS(transfer.copy(Direction::kToPool, good, bad, 0, 2), std::out_of_range);
  CHECK_THROWS_AS(transfer.copy(Direction::kToPool, negative, good, 0, 2), std::out_of_range);
  CHECK_THROWS_AS(transfer.copy(Direction::kToPool, good, good, 1, 2), std::out_of_range);
  CHECK_THROWS_AS(transfer.copy(Direction::kToPool, good, one, 0, 2), std::invalid_argument);
  CHECK(std::all_of(fixture.pool.begin(), fixture.pool.end(), [](std::byte b) { return b == std::byte{0}; }));
}

TEST_CASE("sides that disagree on the size of a block are refused") {
  Fixture fixture(2, 3, 2, 1, 2, 4);
  PoolSide pool = fixture.pool_side();
  pool.offset = 1;
  CHECK_THROWS_AS(HostTransfer(fixture.device(), pool, 1), std::invalid_argument);
}

TEST_CASE("concurrent copies from several threads do not disturb one another") {
  Fixture fixture(2, 64, 2, 2, 16, 256);
  HostTransfer transfer(fixture.device(), fixture.pool_side(), 2);
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      std::vector<int64_t> ids(16);
      std::iota(ids.begin(), ids.end(), caller * 16);
      for (int i = 0; i < 20; ++i) transfer.copy(Direction::kToPool, ids, ids, 0, 2);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(fixture.pool_byte(63, 1, 1, 1, 15, 255) == fixture.device_byte(1, 63, 1, 1, 15, 255));
}
