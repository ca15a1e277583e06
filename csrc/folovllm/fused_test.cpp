// Every kernel against plain double arithmetic; the same bits at every level, in any batch, with any number of threads.
#include "fused_ops.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "thread_pool.h"

using namespace folovllm;

namespace {

constexpr DType kDtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr std::int64_t kSizes[] = {1, 2, 7, 16, 33, 64, 100, 257, 1024};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rounds to `bits` of significand (the leading one included) with exponents from `min_exponent`, ties to even.
float round_to(double x, int bits, int min_exponent, double max) {
  if (!std::isfinite(x) || x == 0.0) return static_cast<float>(x);
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double unit = std::ldexp(1.0, exponent - bits + 1);
  const double rounded = std::nearbyint(x / unit) * unit;
  return static_cast<float>(std::fabs(rounded) > max ? std::copysign(kInfinity, x) : rounded);
}

float rounded(double x, DType dtype) {
  if (dtype == DType::kBFloat16) return round_to(x, 8, -126, 0x1.fep127);
  if (dtype == DType::kFloat16) return round_to(x, 11, -14, 65504.0);
  return static_cast<float>(x);
}

// One step between neighbouring values, relative: what two orders of summation may differ by.
double step(DType dtype) { return dtype == DType::kBFloat16 ? 0x1p-7 : dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-20; }

std::uint16_t half_bits(float x) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (x == 0.0F) return sign;
  const int exponent = std::max(std::ilogb(x), -14);
  const auto significand = static_cast<int>(std::fabs(std::ldexp(x, 10 - exponent)));
  return static_cast<std::uint16_t>(sign | (significand + ((exponent + 14) << 10)));
}

float half_value(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double significand = bits & 1023;
  double x = exponent == 0 ? std::ldexp(significand, -24) : std::ldexp(significand + 1024, exponent - 25);
  if (exponent == 31) x = significand == 0 ? kInfinity : std::numeric_limits<float>::quiet_NaN();
  return static_cast<float>(bits >> 15 ? -x : x);
}

// A tensor in one dtype, on exactly as many bytes as it needs, so that a sanitizer sees each step beyond.
struct Tensor {
  DType dtype;
  std::vector<std::byte> bytes;

  Tensor(DType type, std::size_t size) : dtype(type), bytes(size * (type == DType::kFloat32 ? 4 : 2)) {}
  Tensor(DType type, const std::vector<float>& values) : Tensor(type, values.size()) {
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void* at(std::size_t i) { return bytes.data() + i * (dtype == DType::kFloat32 ? 4 : 2); }
  void* data() { return bytes.data(); }
  void set(std::size_t i, float x) {
    if (dtype == DType::kFloat32) {
      std::memcpy(at(i), &x, 4);
    } else {
      const std::uint16_t half =
          dtype == DType::kFloat16 ? half_bits(x) : static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
      std::memcpy(at(i), &half, 2);
    }
  }
  float operator[](std::size_t i) {
    if (dtype == DType::kFloat32) {
      float x;
      std::memcpy(&x, at(i), 4);
      return x;
    }
    std::uint16_t half;
    std::memcpy(&half, at(i), 2);
    return dtype == DType::kFloat16 ? half_value(half) : std::bit_cast<float>(std::uint32_t{half} << 16);
  }
};

Tensor random_tensor(DType dtype, std::int64_t size, unsigned seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& x : values) x = rounded(normal(random), dtype);
  return {dtype, values};
}

void check_near(float actual, double expected, DType dtype, double floor = 1e-6) {
  if (std::isnan(expected)) {
    CHECK(std::isnan(actual));
  } else if (std::isinf(expected) || actual == static_cast<float>(expected)) {
    CHECK(actual == static_cast<float>(expected));
  } else {
    CHECK(std::fabs(actual - expected) <= step(dtype) * 1.01 * std::max(std::fabs(expected), floor));
  }
}

std::vector<double> naive_norm(Tensor& x, std::size_t begin, Tensor& weight, std::size_t size, double eps) {
  double squares = 0.0;
  for (std::size_t i = 0; i < size; ++i) squares += static_cast<double>(x[begin + i]) * x[begin + i];
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(size) + eps);
  std::vector<double> out;
  for (std::size_t i = 0; i < size; ++i) {
    out.push_back(rounded(static_cast<double>(rounded(x[begin + i] * scale, x.dtype)) * weight[i], x.dtype));
  }
  return out;
}

// Runs `compute`, which returns its output's bytes, at each level this machine has and checks that all from `lowest` on
// are the same.
template <typename F>
void same_at_each_level(F&& compute, Isa lowest = Isa::kPortable) {
  limit_isa(lowest);
  const auto expected = compute();
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    limit_isa(isa);
    CAPTURE(isa_name(current_isa()));
    const bool is_same = compute() == expected;
    CHECK(is_same);
  }
}

}  // namespace

TEST_CASE("rms_norm normalises strided rows") {
  for (const DType dtype : kDtypes) {
    for (const std::int64_t size : kSizes) {
      CAPTURE(size);
      const std::int64_t stride = size + 3;
      Tensor x = random_tensor(dtype, 2 * stride + size, 1, 3.0F);
      Tensor weight = random_tensor(dtype, size, 2);
      Tensor out(dtype, static_cast<std::size_t>(3 * size));
      same_at_each_level([&] {
        rms_norm({x.data(), stride, weight.data(), out.data(), 3, size, 1e-6F}, dtype);
        return out.bytes;
      });
      for (std::size_t row = 0; row < 3; ++row) {
        const auto n = static_cast<std::size_t>(size);
        const auto expected = naive_norm(x, row * static_cast<std::size_t>(stride), weight, n, 1e-6);
        for (std::size_t i = 0; i < n; ++i) check_near(out[row * n + i], expected[i], dtype);
      }
    }
  }
}

TEST_CASE("add_rms_norm adds to the residual and may overwrite its input") {
  for (const DType dtype : kDtypes) {
    for (const std::int64_t size : kSizes) {
      CAPTURE(size);
      const auto n = static_cast<std::size_t>(size);
      Tensor x = random_tensor(dtype, 2 * size, 1, 3.0F);
      Tensor residual = random_tensor(dtype, 2 * size, 2, 5.0F);
      Tensor weight = random_tensor(dtype, size, 3);
      Tensor sum = residual;
      for (std::size_t i = 0; i < 2 * n; ++i) sum.set(i, rounded(static_cast<double>(residual[i]) + x[i], dtype));
      Tensor out = x;
      same_at_each_level([&] {
        Tensor added = residual;
        out = x;
        add_rms_norm({out.data(), added.data(), weight.data(), out.data(), 2, size, 1e-5F}, dtype);
        const bool is_sum = added.bytes == sum.bytes;
        CHECK(is_sum);
        return out.bytes;
      });
      for (std::size_t row = 0; row < 2; ++row) {
        const auto expected = naive_norm(sum, row * n, weight, n, 1e-5);
        for (std::size_t i = 0; i < n; ++i) check_near(out[row * n + i], expected[i], dtype);
      }
    }
  }
}

TEST_CASE("silu_mul rounds the activation before the product") {
  for (const DType dtype : kDtypes) {
    for (const std::int64_t size : kSizes) {
      CAPTURE(size);
      const auto n = static_cast<std::size_t>(size);
      Tensor gate_up = random_tensor(dtype, 2 * size, 1, 6.0F);
      gate_up.set(0, size == 7 ? -88.0F : size == 16 ? -104.0F : 40.0F);
      if (size == 33) gate_up.set(5, kInfinity);
      if (size == 64) gate_up.set(5, std::numeric_limits<float>::quiet_NaN());
      Tensor out(dtype, n);
      const auto compute = [&] {
        silu_mul({gate_up.data(), out.data(), size, 1, size}, dtype);
        for (std::size_t i = 0; i < n; ++i) {
          const double x = gate_up[i];
          const double silu = rounded(x / (1.0 + std::exp(-x)), dtype);
          check_near(out[i], rounded(silu * gate_up[n + i], dtype), dtype, 1e-30);
        }
        return out.bytes;
      };
      limit_isa(Isa::kPortable);
      compute();
      same_at_each_level(compute, Isa::kAvx2);
    }
  }
}

TEST_CASE("embed gathers and converts") {
  const std::vector<std::int32_t> ids = {4, 0, 3, 4};
  for (const DType table_dtype : kDtypes) {
    for (const DType dtype : kDtypes) {
      for (const std::int64_t size : kSizes) {
        const std::int64_t stride = size + 2;
        const auto n = static_cast<std::size_t>(size);
        Tensor table = random_tensor(table_dtype, 4 * stride + size, 7, 0.01F);
        if (size > 2) table.set(static_cast<std::size_t>(4 * stride + 2), -kInfinity);
        if (size > 3) table.set(static_cast<std::size_t>(4 * stride + 3), rounded(3e-6, table_dtype));
        Tensor out(dtype, 4 * n);
        same_at_each_level([&] {
          embed({table.data(), stride, ids.data(), 4, size, out.data()}, table_dtype, dtype);
          return out.bytes;
        });
        for (std::size_t row = 0; row < 4; ++row) {
          for (std::size_t i = 0; i < n; ++i) {
            const float from = table[static_cast<std::size_t>(ids[row] * stride) + i];
            CHECK(out[row * n + i] == rounded(from, dtype));
          }
        }
      }
    }
  }
}

TEST_CASE("conversions keep NaN, round large numbers to infinity and small ones to the nearest") {
  const std::vector<float> values = {std::numeric_limits<float>::quiet_NaN(), 65519.9F, 65520.0F, -1e6F, 3.3e-8F,
                                     -2.9e-8F, 6.1e-5F, 0x1.ffcp-15F, 0x1.ffep-15F, -0.0F, 3.4e38F, 1e-40F, 2049.0F,
                                     0x1.01p0F, 0x1.03p0F, 0x1.0100001p0F, 1.0F};
  Tensor table(DType::kFloat32, values);
  const std::int32_t id = 0;
  const auto size = static_cast<std::int64_t>(values.size());
  for (const DType dtype : kDtypes) {
    Tensor out(dtype, values.size());
    same_at_each_level([&] {
      embed({table.data(), size, &id, 1, size, out.data()}, DType::kFloat32, dtype);
      return out.bytes;
    });
    CHECK(std::isnan(out[0]));
    for (std::size_t i = 1; i < values.size(); ++i) CHECK(out[i] == rounded(values[i], dtype));
  }
}

namespace {

struct QKVCase {
  DType dtype;
  std::int64_t head_size;
  bool has_norm;
  static constexpr std::int64_t kHeads = 4, kKvHeads = 2, kBlockSize = 3, kNumBlocks = 4, kTokens = 5, kPositions = 9;
  static constexpr float kEps = 1e-6F;
  std::vector<std::int64_t> positions = {8, 0, 3, 4, 5};
  std::vector<std::int64_t> slots = {5, 3, -1, 11, 9};
  std::int64_t stride = (kHeads + 2 * kKvHeads) * head_size + 5;
  Tensor qkv = random_tensor(dtype, (kTokens - 1) * stride + (kHeads + 2 * kKvHeads) * head_size, 1, 2.0F);
  Tensor cos_sin = random_tensor(dtype, kPositions * head_size, 2, 0.7F);
  Tensor q_norm = random_tensor(dtype, head_size, 3);
  Tensor k_norm = random_tensor(dtype, head_size, 4);

  QKVLayout layout() {
    return {kHeads, kKvHeads, head_size, kBlockSize, dtype, cos_sin.data(), has_norm ? q_norm.data() : nullptr,
            has_norm ? k_norm.data() : nullptr, kEps};
  }

  std::vector<double> expected_head(std::size_t token, std::size_t head, Tensor& norm) {
    const auto size = static_cast<std::size_t>(head_size), half = size / 2;
    const std::size_t begin = token * static_cast<std::size_t>(stride) + head * size;
    std::vector<double> x;
    for (std::size_t i = 0; i < size; ++i) x.push_back(qkv[begin + i]);
    if (has_norm) x = naive_norm(qkv, begin, norm, size, kEps);
    std::vector<double> out(size);
    for (std::size_t i = 0; i < half; ++i) {
      const std::size_t angles = static_cast<std::size_t>(positions[token]) * size;
      const double cos = cos_sin[angles + i], sin = cos_sin[angles + half + i];
      out[i] = x[i] * cos - x[half + i] * sin;
      out[half + i] = x[half + i] * cos + x[i] * sin;
    }
    return out;
  }
};

void check_head(Tensor& actual, std::size_t begin, const std::vector<double>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    // The two products are rounded, and their difference may be small.
    CHECK(std::fabs(actual[begin + i] - expected[i]) <= step(actual.dtype) * 4.0 * std::max(std::fabs(expected[i]), 2.0));
  }
}

}  // namespace

TEST_CASE("rotate_and_write rotates queries and keys and fills the slots") {
  for (const DType dtype : kDtypes) {
    for (const std::int64_t head_size : {2, 6, 64, 80, 128}) {
      for (const bool has_norm : {false, true}) {
        CAPTURE(head_size);
        QKVCase c{dtype, head_size, has_norm};
        const auto size = static_cast<std::size_t>(head_size);
        const std::size_t cache_size = c.kNumBlocks * 2 * c.kKvHeads * c.kBlockSize * size;
        Tensor cache(dtype, std::vector<float>(cache_size, 77.0F));
        Tensor query(dtype, c.kTokens * c.kHeads * size);
        same_at_each_level([&] {
          rotate_and_write(c.layout(), {c.qkv.data(), c.stride, c.positions.data(), c.slots.data(), cache.data(),
                                        query.data(), c.kTokens});
          auto both = cache.bytes;
          both.insert(both.end(), query.bytes.begin(), query.bytes.end());
          return both;
        });
        for (std::size_t token = 0; token < c.kTokens; ++token) {
          for (std::size_t h = 0; h < c.kHeads; ++h) {
            check_head(query, (token * c.kHeads + h) * size, c.expected_head(token, h, c.q_norm));
          }
          if (c.slots[token] < 0) continue;
          const auto slot = static_cast<std::size_t>(c.slots[token]);
          for (std::size_t h = 0; h < c.kKvHeads; ++h) {
            const auto at = [&](std::size_t kind) {
              const std::size_t head = (slot / c.kBlockSize * 2 + kind) * c.kKvHeads + h;
              return (head * c.kBlockSize + slot % c.kBlockSize) * size;
            };
            check_head(cache, at(0), c.expected_head(token, c.kHeads + h, c.k_norm));
            const auto v = token * static_cast<std::size_t>(c.stride) + (c.kHeads + c.kKvHeads + h) * size;
            for (std::size_t i = 0; i < size; ++i) CHECK(cache[at(1) + i] == c.qkv[v + i]);
          }
        }
        std::size_t untouched = 0;
        for (std::size_t i = 0; i < cache_size; ++i) untouched += cache[i] == 77.0F ? 1 : 0;
        CHECK(untouched == cache_size - 4 * 2 * c.kKvHeads * size);
      }
    }
  }
}

TEST_CASE("a row has the same bits alone, in a batch, and with any number of threads") {
  const std::int64_t size = 1000, num_rows = 150;
  const auto n = static_cast<std::size_t>(size);
  for (const DType dtype : kDtypes) {
    Tensor x = random_tensor(dtype, num_rows * 2 * size, 1, 3.0F);
    Tensor weight = random_tensor(dtype, size, 2);
    Tensor norm(dtype, num_rows * n), activation(dtype, num_rows * n);
    for (const int count : {1, 3}) {
      set_num_threads(count);
      rms_norm({x.data(), 2 * size, weight.data(), norm.data(), num_rows, size, 1e-6F}, dtype);
      silu_mul({x.data(), activation.data(), size, num_rows, size}, dtype);
      Tensor row(dtype, n);
      for (std::size_t i = 0; i < num_rows; ++i) {
        rms_norm({x.at(i * 2 * n), size, weight.data(), row.data(), 1, size, 1e-6F}, dtype);
        CHECK(std::memcmp(row.data(), norm.at(i * n), row.bytes.size()) == 0);
        silu_mul({x.at(i * 2 * n), row.data(), size, 1, size}, dtype);
        CHECK(std::memcmp(row.data(), activation.at(i * n), row.bytes.size()) == 0);
      }
    }
  }
}

TEST_CASE("a row with NaN or infinity stays that row's") {
  Tensor x(DType::kFloat32, {1.0F, 2.0F, std::numeric_limits<float>::quiet_NaN(), 4.0F, 3.0F, kInfinity, 5.0F, 6.0F});
  Tensor weight(DType::kFloat32, {1.0F, 1.0F});
  Tensor out(DType::kFloat32, 8);
  rms_norm({x.data(), 2, weight.data(), out.data(), 4, 2, 0.0F}, DType::kFloat32);
  CHECK(std::isfinite(out[0]));
  CHECK(std::isnan(out[2]));
  CHECK(std::isnan(out[3]));
  CHECK(std::isnan(out[5]));
  CHECK(std::isfinite(out[6]));
}

TEST_CASE("bad layouts and names are refused") {
  float table[8] = {};
  const auto check = [&](std::int64_t heads, std::int64_t head_size, const void* cos_sin) {
    QKVLayout{heads, 1, head_size, 16, DType::kFloat32, cos_sin, nullptr, nullptr, 0.0F}.check();
  };
  check(1, 8, table);
  CHECK_THROWS_AS(check(0, 8, table), std::invalid_argument);
  CHECK_THROWS_AS(check(1, 7, table), std::invalid_argument);
  CHECK_THROWS_AS(check(1, 0, table), std::invalid_argument);
  CHECK_THROWS_AS(check(1, 8, nullptr), std::invalid_argument);
  CHECK(dtype_of("bfloat16") == DType::kBFloat16);
  CHECK_THROWS_AS(dtype_of("int8"), std::invalid_argument);
}
