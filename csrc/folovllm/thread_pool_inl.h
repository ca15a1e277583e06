// Templates of thread_pool.h.
#pragma once

#include <algorithm>
#include <atomic>

namespace folovllm {

template <typename F>
void parallel_for(std::int64_t num_items, std::int64_t grain, F&& body) {
  if (num_items <= 0) return;
  if (num_items <= grain || num_threads() == 1) {
    body(std::int64_t{0}, num_items);
    return;
  }
  std::atomic<std::int64_t> next{0};
  auto work = [&](int, int) {
    while (true) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= num_items) return;
      body(begin, std::min(begin + grain, num_items));
    }
  };
  run_together(work);
}

}  // namespace folovllm
