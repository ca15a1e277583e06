#include "flexkv/mempool.h"

#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "flexkv/errors.h"

using flexkv::Mempool;
using flexkv::StateError;
using Ids = std::vector<std::int64_t>;

namespace {

Ids allocate(Mempool& pool, std::size_t count) {
  Ids ids(count);
  pool.allocate(ids);
  return ids;
}

}  // namespace

TEST_CASE("a fresh pool hands out every block once, in order") {
  for (const std::size_t size : {0u, 1u, 63u, 64u, 65u, 4096u, 5000u}) {
    Mempool pool(size);
    const Ids ids = allocate(pool, size);
    Ids expected(size);
    std::iota(expected.begin(), expected.end(), 0);
    CHECK(ids == expected);
    CHECK(pool.num_free() == 0);
    CHECK_THROWS_AS(allocate(pool, 1), StateError);
  }
}

TEST_CASE("allocating more than is free changes nothing") {
  Mempool pool(10);
  allocate(pool, 4);
  CHECK_THROWS_AS(allocate(pool, 7), StateError);
  CHECK(pool.num_free() == 6);
  CHECK(allocate(pool, 6).size() == 6);
}

TEST_CASE("a bad id frees nothing") {
  Mempool pool(10);
  allocate(pool, 4);
  for (const Ids& bad : {Ids{0, 9}, Ids{0, 1, 0}, Ids{0, -1}, Ids{0, 10}}) {
    CHECK_THROWS_AS(pool.recycle(bad), StateError);
    CHECK(pool.num_free() == 6);
    CHECK_FALSE(pool.is_free(0));
  }
  pool.recycle(Ids{0, 3});
  CHECK(pool.num_free() == 8);
}

TEST_CASE("random use agrees with a set") {
  std::mt19937 random(7);
  Mempool pool(1000);
  std::set<std::int64_t> used;
  for (int step = 0; step < 2000; ++step) {
    if (random() % 2 == 0) {
      const std::size_t count = random() % 60;
      if (count > pool.num_free()) continue;
      for (const std::int64_t id : allocate(pool, count)) CHECK(used.insert(id).second);
    } else {
      Ids back;
      for (const std::int64_t id : used) {
        if (random() % 3 == 0) back.push_back(id);
      }
      pool.recycle(back);
      for (const std::int64_t id : back) used.erase(id);
    }
    CHECK(pool.num_free() == 1000 - used.size());
  }
}
