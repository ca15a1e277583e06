#include "kvrouter/block_index.h"

#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>
#include <thread>

namespace kvrouter {
namespace {

struct Pod {
  BlockIndex& index;
  std::shared_ptr<PodSource> source;
  std::string tier = "gpu";

  Pod(BlockIndex& in, const std::string& name) : index(in), source(in.source(name, "")) {}

  std::uint32_t owner() { return *index.local_owner(*source, {tier, 0, 0}); }

  void store(std::span<const std::uint64_t> keys) {
    std::vector<StoredBlock> blocks;
    for (const std::uint64_t key : keys) blocks.push_back({key, key, 0});
    const std::lock_guard lock(source->mutex);
    index.store(*source, owner(), blocks, {});
  }

  void remove(std::span<const std::uint64_t> keys) {
    const std::lock_guard lock(source->mutex);
    index.remove(*source, owner(), keys);
  }

  std::size_t clear() {
    const std::lock_guard lock(source->mutex);
    return index.clear(*source, std::nullopt);
  }
};

std::map<std::string, double> score(const BlockIndex& index, const std::vector<std::uint64_t>& keys) {
  std::map<std::string, double> scores;
  for (const auto& [pod, value] : index.score(keys, std::nullopt, {{"cpu", 0.5}}, 1.0)) scores[std::string(pod)] = value;
  return scores;
}

std::vector<std::uint64_t> range(std::uint64_t first, std::size_t count) {
  std::vector<std::uint64_t> keys(count);
  for (std::size_t i = 0; i < count; ++i) keys[i] = first + i;
  return keys;
}

}  // namespace

TEST_CASE("scores follow the longest run across chunk borders") {
  BlockIndex index(1 << 20, 10);
  Pod a(index, "a"), b(index, "b");
  const auto keys = range(1, 10'000);
  a.store(keys);
  b.store(std::span(keys).first(5'000));
  CHECK(score(index, keys) == std::map<std::string, double>{{"a", 10'000.0}, {"b", 5'000.0}});
  b.tier = "cpu";
  b.store(std::span(keys).subspan(5'000));
  CHECK(score(index, keys)["b"] == doctest::Approx(7'500.0));
  CHECK(a.clear() == 10'000);
  CHECK(score(index, keys).count("a") == 0);
  CHECK(b.clear() == 10'000);
  CHECK(index.stats().num_blocks == 0);
}

TEST_CASE("random operations agree with a map of sets") {
  for (const unsigned seed : {1u, 2u, 3u}) {
    BlockIndex index(1 << 16, 100);
    std::vector<Pod> pods;
    for (int i = 0; i < 5; ++i) pods.emplace_back(index, "pod" + std::to_string(i));
    std::map<std::uint64_t, std::map<int, int>> model;  // key -> pod -> references
    std::mt19937 random(seed);
    for (int step = 0; step < 20'000; ++step) {
      const int pod = static_cast<int>(random() % pods.size());
      const auto keys = range(random() % 3'000, random() % 40);
      switch (random() % 8) {
        case 0: case 1: case 2:
          pods[pod].store(keys);
          for (const auto key : keys) ++model[key][pod];
          break;
        case 3: case 4: case 5:
          pods[pod].remove(keys);
          for (const auto key : keys) {
            const auto entry = model.find(key);
            if (entry != model.end() && entry->second.count(pod) && --entry->second[pod] == 0) entry->second.erase(pod);
          }
          break;
        case 6:
          if (random() % 50 == 0) {
            pods[pod].clear();
            for (auto& [key, holders] : model) holders.erase(pod);
          }
          break;
        default: {
          std::map<std::string, double> expected;
          for (const auto& [holder, count] : keys.empty() ? std::map<int, int>{} : model[keys[0]]) {
            double run = 0;
            while (run < static_cast<double>(keys.size()) && model[keys[static_cast<std::size_t>(run)]].count(holder)) ++run;
            expected["pod" + std::to_string(holder)] = run;
          }
          REQUIRE(score(index, keys) == expected);
        }
      }
    }
    for (Pod& pod : pods) pod.clear();
    CHECK(index.stats().num_blocks == 0);
    CHECK(index.stats().num_records == 0);
  }
}

TEST_CASE("a full index stays within its bound and consistent") {
  BlockIndex index(500, 2);
  Pod a(index, "a"), b(index, "b"), c(index, "c");
  std::mt19937 random(7);
  for (int step = 0; step < 5'000; ++step) {
    const auto keys = range(random() % 5'000, 30);
    Pod& pod = step % 3 == 0 ? a : step % 3 == 1 ? b : c;
    if (random() % 4 == 0) {
      pod.remove(keys);
    } else {
      pod.store(keys);
    }
    CHECK(index.stats().num_blocks <= 500);
    for (const auto& run : index.lookup(keys, std::nullopt)) CHECK(run.owners.size() <= 2);
  }
  a.clear(), b.clear(), c.clear();
  CHECK(index.stats().num_blocks == 0);
}

TEST_CASE("threads may store, remove, look up, score and clear at once") {
  BlockIndex index(2'000, 4);
  std::vector<std::thread> threads;
  for (int number = 0; number < 8; ++number) {
    threads.emplace_back([&index, number] {
      Pod pod(index, "pod" + std::to_string(number % 3));
      std::mt19937 random(static_cast<unsigned>(number));
      for (int step = 0; step < 300; ++step) {
        const auto keys = range(random() % 3'000, 50);
        pod.store(keys);
        score(index, keys);
        index.lookup(keys, BlockIndex::PodFilter({"pod0", "pod1"}));
        pod.remove(std::span(keys).first(25));
        index.find_request_key(keys[0]);
        if (step % 100 == 0) pod.clear();
        index.stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int number = 0; number < 3; ++number) Pod(index, "pod" + std::to_string(number)).clear();
  CHECK(index.stats().num_blocks == 0);
}

TEST_CASE("digests are kept with their blocks") {
  BlockIndex index(100, 4);
  Pod pod(index, "a");
  std::vector<std::uint8_t> digest(32);
  for (std::size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<std::uint8_t>(i + 1);
  const std::uint64_t key = 0x191a1b1c1d1e1f20;  // its last eight bytes
  {
    const std::lock_guard lock(pod.source->mutex);
    const StoredBlock block{7, key, 0};
    index.store(*pod.source, pod.owner(), {&block, 1}, digest);
  }
  std::vector<std::uint8_t> found(32);
  CHECK(index.read_digest(key, found));
  CHECK(found == digest);
  pod.clear();
  CHECK_FALSE(index.read_digest(key, found));
  pod.store(std::vector<std::uint64_t>{key});
  CHECK_FALSE(index.read_digest(key, found));
}

TEST_CASE("bounds are checked") {
  CHECK_THROWS_AS(BlockIndex(0, 1), std::invalid_argument);
  CHECK_THROWS_AS(BlockIndex(1, 0), std::invalid_argument);
  CHECK_THROWS_AS(BlockIndex(kMaxBlocks + 1, 1), std::invalid_argument);
}

}  // namespace kvrouter
