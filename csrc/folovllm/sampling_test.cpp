// argmax and sample against a plain sort in double precision; the same token at every level and in any batch.
#include "sampling.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu_features.h"
#include "sampling_row.h"

using namespace folovllm;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Isa kLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

struct Options {
  float temperature = 1.0F;
  std::int64_t top_k = 0;
  float top_p = 1.0F;
  float min_p = 0.0F;
};

// By definition: sort, cut, renormalise. The tokens that may be drawn, in order, and the ends of their shares of [0, 1).
struct Naive {
  std::vector<std::size_t> order;
  std::vector<double> ends;

  Naive(const std::vector<float>& logits, const Options& options, double top_p) : order(logits.size()) {
    const float max = *std::max_element(logits.begin(), logits.end());
    std::vector<double> weights;
    for (const float x : logits) weights.push_back(std::exp((static_cast<double>(x) - max) / options.temperature));
    std::iota(order.begin(), order.end(), 0U);
    if (options.min_p > 0.0F) {
      std::erase_if(order, [&](std::size_t i) { return weights[i] < static_cast<double>(options.min_p); });
    }
    const bool has_top_k = options.top_k > 0 && static_cast<std::size_t>(options.top_k) < logits.size();
    if (has_top_k || options.top_p < 1.0F) {
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
    }
    if (has_top_k) order.resize(std::min(order.size(), static_cast<std::size_t>(options.top_k)));
    for (const std::size_t i : order) ends.push_back((ends.empty() ? 0.0 : ends.back()) + weights[i]);
    if (options.top_p < 1.0F) {
      const double wanted = top_p * ends.back();
      const auto last = std::lower_bound(ends.begin(), ends.end(), wanted);
      ends.resize(std::min(ends.size(), static_cast<std::size_t>(last - ends.begin()) + 1));
      order.resize(ends.size());
    }
    const double total = ends.back();
    for (double& end : ends) end /= total;
  }

  std::size_t rank_of(double uniform) const {
    const auto passed = std::upper_bound(ends.begin(), ends.end(), uniform) - ends.begin();
    return std::min(static_cast<std::size_t>(passed), order.size() - 1);
  }
};

// Whether `token` is what the definition gives, or what fp32 weights may make of it where a border is within their
// rounding.
bool is_right(const std::array<Naive, 3>& near, std::int64_t token, double uniform) {
  return std::any_of(near.begin(), near.end(), [&](const Naive& naive) {
    for (std::size_t rank = naive.rank_of(uniform - 2e-6); rank <= naive.rank_of(uniform + 2e-6); ++rank) {
      if (static_cast<std::int64_t>(naive.order[rank]) == token) return true;
    }
    return false;
  });
}

std::int64_t draw(const std::vector<float>& logits, const Options& options, double uniform) {
  std::int64_t token = -1;
  sample({logits.data(), 1, static_cast<std::int64_t>(logits.size()), 0, &options.temperature, &options.top_k,
          &options.top_p, &options.min_p, &uniform, &token});
  return token;
}

std::vector<float> random_logits(std::size_t size, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> logits(size);
  for (float& x : logits) x = normal(random);
  return logits;
}

void check_draws(const std::vector<float>& logits, const Options& options) {
  CAPTURE(logits.size());
  CAPTURE(options.temperature);
  CAPTURE(options.top_k);
  CAPTURE(options.top_p);
  CAPTURE(options.min_p);
  const std::array<Naive, 3> near = {Naive(logits, options, options.top_p),
                                     Naive(logits, options, options.top_p * (1.0 - 2e-6)),
                                     Naive(logits, options, options.top_p * (1.0 + 2e-6))};
  for (const double uniform : {0.0, 0.123, 0.5, 0.871, 0.9999, 1.0 - 0x1p-53}) {
    CAPTURE(uniform);
    for (const Isa isa : kLevels) {
      limit_isa(isa);
      CHECK(is_right(near, draw(logits, options, uniform), uniform));
    }
  }
}

const std::vector<Options> kOptions = {
    {},
    {0.3F},
    {2.0F},
    {1.0F, 1},
    {1.0F, 7},
    {0.8F, 64},
    {1.0F, 100, 0.9F},
    {1.0F, 3000, 0.95F},
    {1.0F, 3000},
    {1.0F, 1 << 30, 0.5F},
    {1.0F, 0, 0.1F},
    {1.0F, 0, 0.9F},
    {3.0F, 0, 0.999F},
    {1.0F, 0, 1e-7F},
    {1.0F, 0, 1.0F, 0.05F},
    {1.5F, 50, 0.8F, 0.02F},
    {1.0F, 0, 0.9F, 0.3F},
};

}  // namespace

TEST_CASE("draws follow the definition for every size and restriction") {
  for (const std::size_t size : {1U, 2U, 15U, 255U, 256U, 513U, 3001U, 20000U, 40007U}) {
    for (const float scale : {0.3F, 3.0F}) {
      const auto logits = random_logits(size, scale, static_cast<unsigned>(size));
      for (const Options& options : kOptions) check_draws(logits, options);
    }
  }
}

TEST_CASE("likely tokens side by side, and far apart") {
  auto logits = random_logits(40000, 1.0F, 3);
  for (std::size_t i = 1000; i < 1200; ++i) logits[i] += 12.0F;
  logits[0] = logits[39999] = 11.0F;
  for (const Options& options : kOptions) check_draws(logits, options);
}

TEST_CASE("of equal logits at a border the lowest ids remain") {
  for (const std::size_t size : {20U, 700U, 12000U}) {
    std::vector<float> logits(size);
    std::mt19937 random(5);
    for (float& x : logits) x = 0.5F * static_cast<float>(random() % 4);
    logits[7] = -0.0F;  // equals 0
    for (const Options& options : kOptions) check_draws(logits, options);
    const std::vector<float> flat(size, 1.5F);
    for (const Options& options : kOptions) check_draws(flat, options);
    CHECK(draw(flat, {1.0F, 5}, 0.999) == 4);
  }
}

TEST_CASE("impossible tokens are never drawn") {
  for (const std::size_t size : {40U, 9001U}) {
    std::vector<float> logits(size, -kInfinity);
    logits[3] = logits[size - 2] = 1.0F;
    logits[5] = kNaN;
    logits[size - 1] = -200.0F;
    for (const Options& options : kOptions) {
      for (const Isa isa : kLevels) {
        limit_isa(isa);
        const auto last = static_cast<std::int64_t>(size) - 2;
        const std::int64_t low = draw(logits, options, 0.0);
        const std::int64_t high = draw(logits, options, 1.0 - 0x1p-53);
        CHECK(low == 3);
        CHECK((high == last || (high == 3 && (options.top_k == 1 || options.top_p <= 0.5F))));
      }
    }
  }
}

TEST_CASE("infinite logits share all, NaN has nothing, and rows without a choice end") {
  std::vector<float> logits(600, 1e30F);
  logits[17] = logits[512] = kInfinity;
  for (const Options& options : {Options{}, Options{1.0F, 3}, Options{0.5F, 0, 0.9F}, Options{1.0F, 0, 1.0F, 0.1F}}) {
    CHECK(draw(logits, options, 0.2) == 17);
    CHECK(draw(logits, options, 0.7) == 512);
  }
  std::vector<float> nothing(600, kNaN);
  CHECK(draw(nothing, {}, 0.5) == 0);
  nothing[100] = -kInfinity;
  CHECK(draw(nothing, {1.0F, 5, 0.5F}, 0.5) == 100);
  const std::vector<float> huge = {3e38F, -3e38F, 3e38F};
  CHECK(draw(huge, {}, 0.7) == 2);
  CHECK(draw(huge, {1e-38F, 2}, 0.7) == 2);
}

TEST_CASE("a row's token depends neither on its batch nor on the threads") {
  constexpr std::int64_t kRows = 24, kVocab = 40007, kStride = kVocab + 5;
  const auto logits = random_logits(kRows * kStride, 2.0F, 9);
  std::vector<float> temperature, top_p, min_p;
  std::vector<std::int64_t> top_k;
  std::vector<double> uniform;
  for (std::size_t i = 0; i < kRows; ++i) {
    const Options& options = kOptions[i % kOptions.size()];
    temperature.push_back(options.temperature);
    top_k.push_back(options.top_k);
    top_p.push_back(options.top_p);
    min_p.push_back(options.min_p);
    uniform.push_back(std::fmod(0.618 * static_cast<double>(i), 1.0));
  }
  std::vector<std::int64_t> expected;
  for (const int count : {1, 2, 5, 7}) {
    set_num_threads(count);
    std::vector<std::int64_t> tokens(kRows);
    sample({logits.data(), kRows, kVocab, kStride, temperature.data(), top_k.data(), top_p.data(), min_p.data(),
            uniform.data(), tokens.data()});
    if (expected.empty()) expected = tokens;
    CHECK(tokens == expected);
    for (std::size_t i = 0; i < kRows; ++i) {
      std::int64_t token = -1;
      sample({logits.data() + i * kStride, 1, kVocab, 0, &temperature[i], &top_k[i], &top_p[i], &min_p[i], &uniform[i],
              &token});
      CHECK(token == expected[i]);
    }
  }
}

TEST_CASE("left out options restrict nothing") {
  const auto logits = random_logits(1000, 1.0F, 4);
  const double uniform = 0.4;
  std::int64_t token = -1;
  sample({logits.data(), 1, 1000, 1000, nullptr, nullptr, nullptr, nullptr, &uniform, &token});
  CHECK(token == draw(logits, {}, uniform));
}

TEST_CASE("argmax takes the lowest of equals in every dtype and skips NaN") {
  for (const std::size_t size : {1U, 2U, 31U, 300U, 20000U, 70001U}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      auto logits = random_logits(2 * size, 3.0F, static_cast<unsigned>(size));
      if (size > 30) logits[size + 3] = logits[5] = kNaN;
      if (size > 300) logits[size - 1] = logits[size - 7] = logits[19000] = 64.0F;
      std::vector<std::uint16_t> narrow;
      for (float& x : logits) {
        if (dtype == DType::kBFloat16) {
          narrow.push_back(from_float<BFloat16>(x).bits);
          x = to_float(BFloat16{narrow.back()});
        } else if (dtype == DType::kFloat16) {
          narrow.push_back(from_float<Float16>(x).bits);
          x = to_float(Float16{narrow.back()});
        }
      }
      const void* const data = narrow.empty() ? static_cast<const void*>(logits.data()) : narrow.data();
      for (const Isa isa : kLevels) {
        limit_isa(isa);
        std::int64_t out[2] = {-1, -1};
        argmax({data, 2, static_cast<std::int64_t>(size), static_cast<std::int64_t>(size), out}, dtype);
        for (std::size_t row = 0; row < 2; ++row) {
          std::size_t best = 0;
          for (std::size_t i = 1; i < size; ++i) {
            if (logits[row * size + i] > logits[row * size + best]) best = i;
          }
          CHECK(out[row] == static_cast<std::int64_t>(best));
        }
      }
    }
  }
}

TEST_CASE("argmax of rows without a number") {
  std::vector<float> logits(40000, kNaN);
  std::int64_t out = -1;
  const auto find = [&] {
    argmax({logits.data(), 1, 40000, 0, &out}, DType::kFloat32);
    return out;
  };
  CHECK(find() == 0);
  logits[39998] = logits[39999] = -kInfinity;
  CHECK(find() == 39998);
  logits[20000] = -3e38F;
  CHECK(find() == 20000);
}

TEST_CASE("ranks fall with logits, rise with ids, and keep both") {
  const std::vector<float> falling = {kInfinity, 3e38F, 1.5F, 1e-45F, 0.0F, -1e-45F, -2.0F, -kInfinity};
  for (std::size_t i = 0; i < falling.size(); ++i) {
    CHECK(logit_of(rank_key(falling[i], 7)) == falling[i]);
    CHECK(token_of(rank_key(falling[i], 7)) == 7);
    if (i > 0) CHECK(rank_key(falling[i - 1], 9) < rank_key(falling[i], 2));
  }
  CHECK(rank_key(-0.0F, 1) == rank_key(0.0F, 1));
  CHECK(rank_key(1.0F, 1) < rank_key(1.0F, 2));
}
