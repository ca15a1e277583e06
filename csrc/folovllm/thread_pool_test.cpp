// Every item is done once, whatever the number of threads and of callers; levels of instructions have names.
#include "thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu_features.h"

using namespace folovllm;

TEST_CASE("each thread runs a job once") {
  for (const int count : {1, 2, 5}) {
    set_num_threads(count);
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
    auto job = [&](int thread, int num) {
      CHECK(num == count);
      runs[static_cast<std::size_t>(thread)].fetch_add(1);
    };
    for (int i = 0; i < 200; ++i) run_on_all(job);
    for (const auto& run : runs) CHECK(run.load() == 200);
  }
}

TEST_CASE("each item is done once") {
  set_num_threads(3);
  for (const int num_items : {0, 1, 7, 64, 1000}) {
    std::vector<std::atomic<int>> done(static_cast<std::size_t>(num_items));
    parallel_for(num_items, 7, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = begin; i < end; ++i) done[static_cast<std::size_t>(i)].fetch_add(1);
    });
    for (const auto& item : done) CHECK(item.load() == 1);
  }
}

TEST_CASE("two callers at once both get their work done") {
  set_num_threads(2);
  auto caller = [] {
    for (int i = 0; i < 500; ++i) {
      std::atomic<int> sum{0};
      parallel_for(100, 9, [&](std::int64_t begin, std::int64_t end) { sum.fetch_add(static_cast<int>(end - begin)); });
      CHECK(sum.load() == 100);
    }
  };
  std::thread other(caller);
  caller();
  other.join();
}

TEST_CASE("bad sizes are refused") {
  CHECK_THROWS_AS(set_num_threads(0), std::invalid_argument);
  CHECK_THROWS_AS(set_num_threads(257), std::invalid_argument);
  CHECK_THROWS_AS(set_num_threads(2, {0}), std::invalid_argument);
}

TEST_CASE("levels can be limited and named") {
  const Isa best = detected_isa();
  limit_isa(Isa::kPortable);
  CHECK(current_isa() == Isa::kPortable);
  limit_isa(Isa::kAmx);
  CHECK(current_isa() == best);
  CHECK(isa_of("avx2") == Isa::kAvx2);
  CHECK(isa_name(Isa::kAvx512Bf16) == "avx512_bf16");
  CHECK_THROWS_AS(isa_of("mmx"), std::invalid_argument);
}
