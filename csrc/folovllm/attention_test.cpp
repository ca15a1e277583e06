// Every instruction set and dtype computes what the formula says in double precision; garbage behind a request's end
// changes nothing; a row of exact arithmetic has the same bits in any chunk, batch and number of threads.
#include "attention_paged.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu_features.h"
#include "number_formats.h"
#include "thread_pool.h"

using namespace folovllm;

namespace {

template <typename T>
constexpr DType kDtype = DType::kFloat32;
template <>
constexpr DType kDtype<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDtype<Float16> = DType::kFloat16;

struct Sizes {
  int num_heads;
  int num_kv_heads;
  int head_size;
  int block_size;
};

struct Lens {
  int query;
  int seq;
};

// Requests in scattered blocks of a pool; what no request owns is NaN.
template <typename T>
struct Problem {
  Sizes sizes;
  std::vector<Lens> lens;
  std::vector<T> query;
  std::vector<T> kv_cache;
  std::vector<std::int32_t> starts{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> tables;
  int columns = 1;

  Problem(Sizes given_sizes, std::vector<Lens> given_lens, unsigned seed = 1)
      : sizes(given_sizes), lens(std::move(given_lens)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (const Lens& l : lens) columns = std::max(columns, (l.seq + sizes.block_size - 1) / sizes.block_size + 1);
    const int num_blocks = static_cast<int>(lens.size()) * columns + 1;
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_blocks - 1));
    for (int i = 1; i < num_blocks; ++i) order[static_cast<std::size_t>(i - 1)] = i;
    std::shuffle(order.begin(), order.end(), random);
    tables = order;
    const auto block = static_cast<std::size_t>(2 * sizes.num_kv_heads * sizes.block_size * sizes.head_size);
    kv_cache.assign(static_cast<std::size_t>(num_blocks) * block,
                    from_float<T>(std::numeric_limits<float>::quiet_NaN()));
    for (std::size_t req = 0; req < lens.size(); ++req) {
      for (int pos = 0; pos < lens[req].seq; ++pos) {
        for (int kind = 0; kind < 2; ++kind) {
          for (int head = 0; head < sizes.num_kv_heads; ++head) {
            for (int d = 0; d < sizes.head_size; ++d) kv(req, pos, kind, head, d) = from_float<T>(normal(random));
          }
        }
      }
      starts.push_back(starts.back() + lens[req].query);
      seq_lens.push_back(lens[req].seq);
    }
    query.resize(static_cast<std::size_t>(starts.back() * width()));
    for (T& x : query) x = from_float<T>(normal(random) * 2.0F);
  }

  int width() const { return sizes.num_heads * sizes.head_size; }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(sizes.head_size)); }
  AttentionLayout layout() const {
    return {sizes.num_heads, sizes.num_kv_heads, sizes.head_size, sizes.block_size, scale(), kDtype<T>};
  }

  T& kv(std::size_t req, int pos, int kind, int head, int d) {
    const std::int64_t block = tables[req * static_cast<std::size_t>(columns) +
                                      static_cast<std::size_t>(pos / sizes.block_size)];
    const std::int64_t rows = ((block * 2 + kind) * sizes.num_kv_heads + head) * sizes.block_size;
    const std::int64_t row = rows + pos % sizes.block_size;
    return kv_cache[static_cast<std::size_t>(row * sizes.head_size + d)];
  }

  // Requests [first, last), of each the tokens [from, to) of its query, on rows `stride` apart.
  std::vector<T> attend(PagedAttention& kernel, AttentionMode mode, std::size_t req, int from, int to) {
    const std::int32_t part_starts[2] = {0, to - from};
    const std::int32_t part_len = lens[req].seq - lens[req].query + to;
    std::vector<T> out(static_cast<std::size_t>((to - from) * width()));
    const T* const first = query.data() + static_cast<std::int64_t>(starts[req] + from) * width();
    kernel.forward({first, width(), kv_cache.data(), part_starts, &part_len,
                    tables.data() + req * static_cast<std::size_t>(columns), columns, 1, out.data(), width()},
                   mode);
    return out;
  }

  std::vector<T> attend_all(AttentionMode mode, int extra_stride = 0) {
    const std::int64_t stride = width() + extra_stride;
    std::vector<T> strided(static_cast<std::size_t>(starts.back() * stride));
    for (int row = 0; row < starts.back(); ++row) {
      std::copy_n(query.begin() + row * width(), width(), strided.begin() + row * stride);
    }
    std::vector<T> out(strided.size(), from_float<T>(7.0F));
    PagedAttention kernel(layout());
    kernel.forward({strided.data(), stride, kv_cache.data(), starts.data(), seq_lens.data(), tables.data(), columns,
                    static_cast<std::int64_t>(lens.size()), out.data(), stride},
                   mode);
    std::vector<T> packed(query.size());
    for (int row = 0; row < starts.back(); ++row) {
      std::copy_n(out.begin() + row * stride, width(), packed.begin() + row * width());
      for (int i = width(); i < stride; ++i) CHECK(to_float(out[static_cast<std::size_t>(row * stride + i)]) == 7.0F);
    }
    return packed;
  }

  std::vector<double> by_formula() {
    std::vector<double> out;
    for (std::size_t req = 0; req < lens.size(); ++req) {
      for (int token = 0; token < lens[req].query; ++token) {
        for (int head = 0; head < sizes.num_heads; ++head) append_row(req, token, head, out);
      }
    }
    return out;
  }

 private:
  void append_row(std::size_t req, int token, int head, std::vector<double>& out) {
    const int visible = lens[req].seq - lens[req].query + token + 1;
    const int kv_head = head / (sizes.num_heads / sizes.num_kv_heads);
    const T* const q = query.data() + static_cast<std::int64_t>(starts[req] + token) * width() + head * sizes.head_size;
    std::vector<double> weights(static_cast<std::size_t>(visible));
    double sum = 0;
    for (int pos = 0; pos < visible; ++pos) {
      double score = 0;
      for (int d = 0; d < sizes.head_size; ++d) score += double{to_float(q[d])} * to_float(kv(req, pos, 0, kv_head, d));
      weights[static_cast<std::size_t>(pos)] = std::exp(score * double{scale()});
      sum += weights[static_cast<std::size_t>(pos)];
    }
    for (int d = 0; d < sizes.head_size; ++d) {
      double x = 0;
      for (int pos = 0; pos < visible; ++pos) {
        x += weights[static_cast<std::size_t>(pos)] * to_float(kv(req, pos, 1, kv_head, d));
      }
      out.push_back(x / sum);
    }
  }
};

// The largest difference, a NaN counting as infinite.
template <typename T>
double error_of(const std::vector<T>& out, const std::vector<double>& expected) {
  double worst = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(to_float(out[i]) - expected[i]);
    if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  return worst;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const T* b) {
  return std::equal(a.begin(), a.end(), b, [](T x, T y) { return to_float(x) == to_float(y); });
}

std::vector<Isa> levels() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) all.push_back(static_cast<Isa>(i));
  return all;
}

const std::vector<Lens> kMixed = {{1, 1}, {1, 63}, {9, 9}, {1, 64}, {5, 70}, {1, 65}, {40, 40}, {1, 200}, {33, 150}};
const std::vector<Sizes> kSizes = {
    {4, 2, 64, 16}, {2, 2, 32, 8},   {8, 1, 128, 32}, {6, 2, 80, 64}, {3, 3, 36, 16},
    {5, 1, 96, 24}, {14, 2, 64, 5},  {4, 4, 2, 16},   {2, 1, 256, 8}, {20, 1, 48, 128},
};

template <typename T>
void check_formula(AttentionMode mode, double tolerance) {
  for (const Sizes& sizes : kSizes) {
    Problem<T> problem(sizes, kMixed);
    const std::vector<double> expected = problem.by_formula();
    for (const Isa isa : levels()) {
      limit_isa(isa);
      CAPTURE(isa_name(isa));
      CAPTURE(sizes.head_size);
      CHECK(error_of(problem.attend_all(mode, 6), expected) < tolerance);
    }
  }
  limit_isa(detected_isa());
}

template <typename T>
void check_bits() {
  for (const Isa isa : levels()) {
    limit_isa(isa);
    CAPTURE(isa_name(isa));
    for (const Sizes& sizes : {Sizes{4, 2, 64, 16}, Sizes{3, 1, 40, 8}, Sizes{16, 1, 32, 32}}) {
      Problem<T> problem(sizes, {{150, 150}, {1, 90}, {30, 1100}, {3, 2100}});
      set_num_threads(1);
      const std::vector<T> whole = problem.attend_all(AttentionMode::kBatchInvariant);
      for (const int threads : {2, 5}) {
        set_num_threads(threads);
        CHECK(same_bits(whole, problem.attend_all(AttentionMode::kBatchInvariant).data()));
      }
      set_num_threads(2);
      PagedAttention kernel(problem.layout());
      for (std::size_t req = 0; req < problem.lens.size(); ++req) {
        for (const int chunk : {1, 2, 3, 7, 64, 100}) {
          for (int from = 0; from < problem.lens[req].query; from += chunk) {
            const int to = std::min(problem.lens[req].query, from + chunk);
            const auto part = problem.attend(kernel, AttentionMode::kBatchInvariant, req, from, to);
            const bool same = same_bits(part, whole.data() + (problem.starts[req] + from) * problem.width());
            if (!same) FAIL_CHECK("request ", req, " rows ", from, " to ", to, " differ");
          }
        }
      }
    }
  }
  limit_isa(detected_isa());
}

}  // namespace

TEST_CASE("float32 equals the formula") { check_formula<float>(AttentionMode::kFast, 4e-6); }

TEST_CASE("float16 equals the formula") { check_formula<Float16>(AttentionMode::kFast, 2e-3); }

TEST_CASE("bfloat16 equals the formula") { check_formula<BFloat16>(AttentionMode::kFast, 1.6e-2); }

TEST_CASE("bfloat16 equals the formula in exact arithmetic") {
  check_formula<BFloat16>(AttentionMode::kBatchInvariant, 1.6e-2);
}

TEST_CASE("long sequences equal the formula, split or not") {
  Problem<float> exact({4, 2, 64, 16}, {{1, 5000}, {20, 2100}});
  Problem<BFloat16> fast({4, 2, 64, 16}, {{1, 5000}, {70, 2100}});
  const auto exact_expected = exact.by_formula();
  const auto fast_expected = fast.by_formula();
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    for (const Isa isa : levels()) {
      limit_isa(isa);
      CHECK(error_of(exact.attend_all(AttentionMode::kFast), exact_expected) < 4e-6);
      CHECK(error_of(fast.attend_all(AttentionMode::kFast), fast_expected) < 4e-3);
    }
  }
  limit_isa(detected_isa());
}

TEST_CASE("scores far apart neither overflow nor vanish") {
  Problem<float> problem({1, 1, 32, 16}, {{20, 300}, {1, 300}});
  for (float& x : problem.query) x *= 1e3F;
  for (const Isa isa : levels()) {
    limit_isa(isa);
    for (const float x : problem.attend_all(AttentionMode::kFast)) CHECK(std::isfinite(x));
  }
  limit_isa(detected_isa());
}

TEST_CASE("a row has the same bits in any chunk, batch and number of threads") {
  SUBCASE("float32") { check_bits<float>(); }
  SUBCASE("float16") { check_bits<Float16>(); }
  SUBCASE("bfloat16") { check_bits<BFloat16>(); }
}

TEST_CASE("callers of one object take turns") {
  set_num_threads(2);
  Problem<float> problem({4, 2, 64, 16}, {{1, 3000}, {40, 40}});
  PagedAttention kernel(problem.layout());
  const auto expected = problem.attend(kernel, AttentionMode::kFast, 0, 0, 1);
  auto call = [&] {
    for (int i = 0; i < 20; ++i) {
      CHECK(same_bits(expected, problem.attend(kernel, AttentionMode::kFast, 0, 0, 1).data()));
    }
  };
  std::thread other(call);
  call();
  other.join();
}

TEST_CASE("no requests, and requests without tokens, are no work") {
  Problem<float> problem({2, 1, 32, 16}, {{3, 3}, {0, 5}, {1, 7}});
  CHECK(error_of(problem.attend_all(AttentionMode::kFast), problem.by_formula()) < 1e-5);
  PagedAttention kernel(problem.layout());
  const std::int32_t start = 0;
  kernel.forward({nullptr, 64, nullptr, &start, nullptr, nullptr, 1, 0, nullptr, 64}, AttentionMode::kFast);
}

TEST_CASE("layouts that cannot be served are refused by name") {
  const auto make = [](int heads, int kv_heads, int head_size, int block_size, float scale) {
    PagedAttention kernel({heads, kv_heads, head_size, block_size, scale, DType::kFloat32});
  };
  CHECK_THROWS_AS(make(3, 2, 64, 16, 1.0F), std::invalid_argument);
  CHECK_THROWS_AS(make(2, 2, 63, 16, 1.0F), std::invalid_argument);
  CHECK_THROWS_AS(make(2, 2, 1024, 16, 1.0F), std::invalid_argument);
  CHECK_THROWS_AS(make(2, 2, 64, 0, 1.0F), std::invalid_argument);
  CHECK_THROWS_AS(make(0, 2, 64, 16, 1.0F), std::invalid_argument);
  CHECK_THROWS_AS(make(2, 2, 64, 16, std::numeric_limits<float>::infinity()), std::invalid_argument);
}
