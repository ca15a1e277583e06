// Packed weights come back as the checkpoint holds them; every kernel gives their product, for any rows and threads.
#include "quantized_linear.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "thread_pool.h"

using namespace folovllm;

namespace {

struct Checkpoint {
  std::int64_t columns;
  std::int64_t depth;
  int bits;
  std::int64_t group_size;
  std::int64_t zero_offset;
  std::vector<std::uint32_t> qweight;
  std::vector<std::uint32_t> qzeros;
  std::vector<float> scales;
  std::vector<float> weight;  // [columns][depth]

  std::int64_t num_groups() const { return (depth + group_size - 1) / group_size; }

  QuantizedLinear::Source source() const {
    return {qweight.data(), columns, qzeros.data(), columns * bits / 32, reinterpret_cast<const std::byte*>(scales.data()),
            columns, columns, zero_offset};
  }
};

Checkpoint make_checkpoint(std::int64_t columns, std::int64_t depth, int bits, std::int64_t group_size, bool sym,
                           std::int64_t zero_offset) {
  Checkpoint c{columns, depth, bits, group_size, zero_offset, {}, {}, {}, {}};
  std::mt19937 random(static_cast<unsigned>(columns + depth + bits));
  const std::int64_t pack = 32 / bits;
  const std::uint32_t mask = (1U << bits) - 1;
  std::vector<std::uint32_t> zeros(static_cast<std::size_t>(c.num_groups() * columns));
  // From 1 on: the older format takes one off each word of them, which must not borrow here.
  for (auto& zero : zeros) zero = sym ? 1U << (bits - 1) : 1 + random() % mask;
  c.scales.resize(zeros.size());
  for (auto& scale : c.scales) scale = 0.01F + 0.001F * static_cast<float>(random() % 10);
  c.qzeros.resize(zeros.size() * static_cast<std::size_t>(bits) / 32);
  for (std::size_t i = 0; i < zeros.size(); ++i) {
    const auto place = static_cast<std::uint32_t>(i % static_cast<std::size_t>(pack)) * static_cast<std::uint32_t>(bits);
    c.qzeros[i / static_cast<std::size_t>(pack)] |= (zeros[i] - static_cast<std::uint32_t>(zero_offset)) << place;
  }
  c.qweight.resize(static_cast<std::size_t>(depth / pack * columns));
  c.weight.resize(static_cast<std::size_t>(columns * depth));
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t n = 0; n < columns; ++n) {
      const std::uint32_t q = random() & mask;
      const auto place = static_cast<std::uint32_t>(k % pack * bits);
      c.qweight[static_cast<std::size_t>(k / pack * columns + n)] |= q << place;
      const auto group = static_cast<std::size_t>(k / group_size * columns + n);
      const auto value = static_cast<float>(static_cast<int>(q) - static_cast<int>(zeros[group]));
      c.weight[static_cast<std::size_t>(n * depth + k)] = c.scales[group] * value;
    }
  }
  return c;
}

std::vector<float> random_rows(std::int64_t num_rows, std::int64_t depth) {
  std::mt19937 random(3);
  std::vector<float> x(static_cast<std::size_t>(num_rows * depth));
  for (auto& value : x) {
    // Exact in bf16.
    const float wide = static_cast<float>(random() % 2048) / 1024.0F - 1.0F;
    value = to_float(from_float<BFloat16>(wide));
  }
  return x;
}

std::vector<float> run(const QuantizedLinear& layer, const std::vector<float>& x, std::int64_t num_rows, DType dtype,
                       bool batch_invariant) {
  std::vector<float> out(static_cast<std::size_t>(num_rows * layer.out_features()));
  std::vector<std::uint16_t> bf16;
  for (const float value : x) bf16.push_back(from_float<BFloat16>(value).bits);
  const auto* const source = dtype == DType::kFloat32 ? static_cast<const void*>(x.data()) : bf16.data();
  layer.forward(static_cast<const std::byte*>(source), num_rows, layer.in_features(),
                reinterpret_cast<std::byte*>(out.data()), layer.out_features(), DType::kFloat32, batch_invariant);
  return out;
}

void check_product(const Checkpoint& c, const std::vector<float>& x, const std::vector<float>& out,
                   std::int64_t num_rows, double tolerance) {
  double worst = 0;
  double largest = 0;
  for (std::int64_t m = 0; m < num_rows; ++m) {
    for (std::int64_t n = 0; n < c.columns; ++n) {
      double expected = 0;
      for (std::int64_t k = 0; k < c.depth; ++k) {
        expected += static_cast<double>(x[static_cast<std::size_t>(m * c.depth + k)]) *
                    static_cast<double>(c.weight[static_cast<std::size_t>(n * c.depth + k)]);
      }
      worst = std::max(worst, std::abs(expected - static_cast<double>(out[static_cast<std::size_t>(m * c.columns + n)])));
      largest = std::max(largest, std::abs(expected));
    }
  }
  CHECK(worst <= tolerance * largest);
}

}  // namespace

TEST_CASE("every kernel gives the product of the dequantised weights") {
  set_num_threads(3);
  for (const auto isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    limit_isa(isa);
    if (current_isa() != isa) continue;
    for (const int bits : {4, 8}) {
      for (const bool sym : {true, false}) {
        const Checkpoint c = make_checkpoint(72, 136, bits, 32, sym, sym ? 0 : 1);
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
          QuantizedLinear layer(c.columns, c.depth, bits, c.group_size, dtype, DType::kFloat32);
          layer.fill(0, c.source());
          for (const std::int64_t num_rows : {1, 3, 13, 70}) {
            const auto x = random_rows(num_rows, c.depth);
            check_product(c, x, run(layer, x, num_rows, dtype, true), num_rows, 1e-5);
            check_product(c, x, run(layer, x, num_rows, dtype, false), num_rows, 1e-2);
          }
        }
      }
    }
  }
  limit_isa(Isa::kAmx);
}

TEST_CASE("a row has the same bits alone, among others and on any number of threads") {
  const Checkpoint c = make_checkpoint(200, 256, 4, 128, false, 1);
  constexpr std::int64_t kRows = 250;
  const auto x = random_rows(kRows, c.depth);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    QuantizedLinear layer(c.columns, c.depth, 4, c.group_size, dtype, DType::kFloat32);
    layer.fill(0, c.source());
    set_num_threads(1);
    const auto all = run(layer, x, kRows, dtype, true);
    const auto fast = run(layer, x, kRows, dtype, false);
    set_num_threads(4);
    CHECK(run(layer, x, kRows, dtype, true) == all);
    CHECK(run(layer, x, kRows, dtype, false) == fast);
    for (const std::int64_t row : {0, 100, 249}) {
      const auto first = static_cast<std::ptrdiff_t>(row * c.depth);
      const std::vector<float> alone(x.begin() + first, x.begin() + first + c.depth);
      const auto out = run(layer, alone, 1, dtype, true);
      CHECK(std::equal(out.begin(), out.end(), all.begin() + row * c.columns));
    }
  }
}

TEST_CASE("parts, a bias and a permutation of K") {
  set_num_threads(2);
  const Checkpoint first = make_checkpoint(40, 64, 4, 32, true, 1);
  const Checkpoint second = make_checkpoint(56, 64, 4, 32, false, 1);
  QuantizedLinear layer(96, 64, 4, 32, DType::kFloat32, DType::kFloat32);
  std::vector<std::int32_t> order(64);
  for (int i = 0; i < 64; ++i) order[static_cast<std::size_t>(i)] = (i * 7) % 64;
  layer.set_permutation(order.data());
  layer.fill(0, first.source());
  layer.fill(40, second.source());
  std::vector<float> bias(96);
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i);
  layer.set_bias(bias.data());

  std::vector<float> weight(96 * 64);
  layer.unpack(0, 96, weight.data());
  const auto x = random_rows(1, 64);
  const auto out = run(layer, x, 1, DType::kFloat32, false);
  for (std::size_t n = 0; n < 96; ++n) {
    double expected = bias[n];
    for (std::size_t k = 0; k < 64; ++k) expected += double{x[k]} * double{weight[n * 64 + k]};
    CHECK(out[n] == doctest::Approx(expected).epsilon(1e-4));
  }
  // The group of the i-th weight in the permuted order is i / 32, so scales move while q stays where it is.
  for (std::size_t i = 0; i < 64; ++i) {
    const auto k = static_cast<std::size_t>(order[i]);
    const float stored = first.weight[k] / first.scales[k / 32 * 40];
    CHECK(weight[k] == doctest::Approx(stored * first.scales[i / 32 * 40]));
  }
}

TEST_CASE("what does not fit is refused") {
  CHECK_THROWS_AS(QuantizedLinear(64, 64, 3, 32, DType::kFloat32, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(QuantizedLinear(0, 64, 4, 32, DType::kFloat32, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(QuantizedLinear(64, 60, 4, 32, DType::kFloat32, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(QuantizedLinear(64, 64, 4, 12, DType::kFloat32, DType::kFloat32), std::invalid_argument);
  QuantizedLinear layer(64, 64, 4, 32, DType::kFloat32, DType::kFloat32);
  const Checkpoint c = make_checkpoint(64, 64, 4, 32, true, 0);
  CHECK_THROWS_AS(layer.fill(8, c.source()), std::invalid_argument);
  std::vector<std::int32_t> order(64, 0);
  CHECK_THROWS_AS(layer.set_permutation(order.data()), std::invalid_argument);
}
