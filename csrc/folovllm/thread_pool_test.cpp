// Every item is done once, whatever the number of threads and of callers; levels of instructions have names.
#include "thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu_features.h"

using namespace folovllm;

TEST_CASE("the caller runs each job once, a worker at most once") {
  for (const int count : {1, 2, 5}) {
    set_num_threads(count);
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
    auto job = [&](int thread, int num) {
      CHECK(num == count);
      runs[static_cast<std::size_t>(thread)].fetch_add(1);
    };
    for (int i = 0; i < 200; ++i) run_together(job);
    CHECK(runs[0].load() == 200);
    for (const auto& run : runs) CHECK(run.load() <= 200);
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

TEST_CASE("workers come to jobs that last") {
  set_num_threads(4);
  std::vector<std::atomic<bool>> came(4);
  std::atomic<int> num_here{0};
  auto job = [&](int thread, int num) {
    if (!came[static_cast<std::size_t>(thread)].exchange(true)) num_here.fetch_add(1);
    while (num_here.load() < num) std::this_thread::yield();
  };
  run_together(job);
  CHECK(num_here.load() == 4);
}

TEST_CASE("nobody is inside a job that has returned") {
  set_num_threads(3);
  for (int i = 0; i < 2000; ++i) {
    std::atomic<int> num_inside{0};
    auto job = [&](int, int) {
      num_inside.fetch_add(1);
      num_inside.fetch_sub(1);
    };
    run_together(job);
    CHECK(num_inside.load() == 0);
  }
}

TEST_CASE("threads come and go between jobs") {
  for (int i = 0; i < 50; ++i) {
    set_num_threads(1 + i % 4);
    std::atomic<int> sum{0};
    parallel_for(64, 4, [&](std::int64_t begin, std::int64_t end) { sum.fetch_add(static_cast<int>(end - begin)); });
    CHECK(sum.load() == 64);
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
