// Every kernel this machine can run gives the products of plain double arithmetic, and its bits depend on neither the
// number of rows nor that of threads; weights come back as they were packed, in whatever pieces.
#include "packed_linear.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "fused_ops.h"
#include "thread_pool.h"

using namespace folovllm;

namespace {

using Bytes = std::vector<std::byte>;

float value_at(const Bytes& bytes, DType dtype, std::int64_t index) {
  return with_type(dtype, [&]<typename T>(T) {
    T value;
    std::memcpy(&value, bytes.data() + static_cast<std::size_t>(index) * sizeof(T), sizeof(T));
    return to_float(value);
  });
}

void set_value(Bytes& bytes, DType dtype, std::int64_t index, float value) {
  with_type(dtype, [&]<typename T>(T) {
    const T converted = from_float<T>(value);
    std::memcpy(bytes.data() + static_cast<std::size_t>(index) * sizeof(T), &converted, sizeof(T));
  });
}

Bytes random_values(std::int64_t count, DType dtype, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  Bytes bytes(static_cast<std::size_t>(count) * size_of(dtype));
  for (std::int64_t i = 0; i < count; ++i) set_value(bytes, dtype, i, uniform(generator));
  return bytes;
}

// Activations in memory of exactly their size, so that a kernel that reads on is caught.
struct Case {
  DType dtype;
  std::int64_t num_rows, out_features, in_features;
  std::int64_t x_stride, out_stride;
  DType out_dtype;
  Bytes w, x, bias;

  Case(DType dtype_, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t x_gap = 0, std::int64_t out_gap = 0)
      : dtype(dtype_), num_rows(m), out_features(n), in_features(k), x_stride(k + x_gap), out_stride(n + out_gap),
        out_dtype(dtype_), w(random_values(n * k, dtype_, 1)), x(random_values((m - 1) * (k + x_gap) + k, dtype_, 2)),
        bias(random_values(n, DType::kFloat32, 3)) {}

  std::unique_ptr<PackedLinear> layer() const {
    auto made = std::make_unique<PackedLinear>(out_features, in_features, dtype);
    made->weights().fill(0, out_features, w.data(), in_features, dtype);
    made->set_bias(bias.data(), DType::kFloat32);
    return made;
  }

  Bytes run(const PackedLinear& made, std::int64_t first_row, std::int64_t rows, bool is_invariant = false) const {
    Bytes out(static_cast<std::size_t>((rows - 1) * out_stride + out_features) * size_of(out_dtype), std::byte{0x7f});
    made.forward(x.data() + static_cast<std::size_t>(first_row * x_stride) * size_of(dtype), rows, x_stride, out.data(),
                 out_stride, out_dtype, is_invariant);
    return out;
  }

  double expected(std::int64_t row, std::int64_t column) const {
    double sum = value_at(bias, DType::kFloat32, column);
    for (std::int64_t k = 0; k < in_features; ++k) {
      sum += double{value_at(x, dtype, row * x_stride + k)} * double{value_at(w, dtype, column * in_features + k)};
    }
    return sum;
  }

  // The rounding of the result, and that of as many additions.
  double tolerance(double wanted) const {
    const double rounding = out_dtype == DType::kFloat32 ? 0x1p-24 : out_dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
    return rounding * std::abs(wanted) + 0x1p-22 * static_cast<double>(in_features + 1);
  }

  void check() const {
    const Bytes out = run(*layer(), 0, num_rows);
    double worst = 0;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (std::int64_t column = 0; column < out_features; ++column) {
        const double actual = value_at(out, out_dtype, row * out_stride + column);
        const double wanted = expected(row, column);
        const double error = std::abs(actual - wanted) / tolerance(wanted);
        worst = error <= worst ? worst : error;  // NaN too
      }
    }
    INFO("isa ", isa_name(current_isa()), " dtype ", static_cast<int>(dtype), " m ", num_rows, " n ", out_features,
         " k ", in_features);
    CHECK(worst <= 1);
    const std::byte untouched{0x7f};
    for (std::int64_t row = 0; row + 1 < num_rows && out_stride > out_features; ++row) {
      CHECK(out[static_cast<std::size_t>(row * out_stride + out_features) * size_of(out_dtype)] == untouched);
    }
  }
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

template <typename F>
void for_each_isa(F&& function) {
  const Isa best = detected_isa();
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    limit_isa(static_cast<Isa>(level));
    function();
  }
  limit_isa(best);
}

}  // namespace

TEST_CASE("any number of rows") {
  set_num_threads(2);
  for_each_isa([] {
    for (const DType dtype : kDTypes) {
      for (std::int64_t m = 1; m <= 70; ++m) Case(dtype, m, 40, 64).check();
      Case(dtype, 300, 33, 65).check();
    }
  });
}

TEST_CASE("odd sizes, strides and fp32 results") {
  set_num_threads(3);
  const std::tuple<std::int64_t, std::int64_t> sizes[] = {{1, 1},   {2, 3},    {15, 31},  {16, 32}, {17, 33},
                                                          {50, 97}, {130, 34}, {65, 1100}, {700, 5}};
  for_each_isa([&] {
    for (const DType dtype : kDTypes) {
      for (const auto& [n, k] : sizes) {
        for (const std::int64_t m : {1, 3, 7, 18, 37}) {
          Case here(dtype, m, n, k, 5, 3);
          here.check();
          here.out_dtype = DType::kFloat32;
          here.check();
        }
      }
    }
  });
}

TEST_CASE("more rows than are taken at once") {
  set_num_threads(2);
  for_each_isa([] {
    for (const DType dtype : kDTypes) Case(dtype, 1043, 20, 40).check();
  });
}

TEST_CASE("bits depend neither on the rows around nor on the threads") {
  for_each_isa([] {
    for (const DType dtype : kDTypes) {
      set_num_threads(1);
      const Case all(dtype, 90, 150, 1027, 1, 0);
      const auto layer = all.layer();
      const Bytes reference = all.run(*layer, 0, all.num_rows, true);
      for (const int threads : {2, 3}) {
        set_num_threads(threads);
        for (const std::int64_t m : {1, 2, 5, 8, 16, 17, 31, 33, 64, 90}) {
          const std::int64_t first = 90 - m;
          const Bytes some = all.run(*layer, first, m, true);
          const auto offset = static_cast<std::size_t>(first * all.out_stride) * size_of(dtype);
          INFO("isa ", isa_name(current_isa()), " dtype ", static_cast<int>(dtype), " m ", m);
          CHECK(std::memcmp(some.data(), reference.data() + offset, some.size()) == 0);
        }
      }
    }
  });
}

TEST_CASE("bits are the same where threads own rows, and outputs go around the caches") {
  constexpr std::int64_t kRows = 500;
  constexpr std::int64_t kOut = 1088;
  const Case all(DType::kBFloat16, kRows, kOut, 600);
  const auto layer = all.layer();
  set_num_threads(1);
  constexpr std::int64_t kPart = 20;
  std::vector<Bytes> parts;
  for (std::int64_t row = 0; row < kRows; row += kPart) parts.push_back(all.run(*layer, row, kPart));
  constexpr std::size_t kLine = 64;
  Bytes memory(kRows * kOut * 2 + kLine);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  REQUIRE(std::align(kLine, kRows * kOut * 2, aligned, space) != nullptr);
  for (const int threads : {1, 2, 3}) {
    set_num_threads(threads);
    layer->forward(all.x.data(), kRows, all.x_stride, static_cast<std::byte*>(aligned), kOut, DType::kBFloat16, false);
    bool is_equal = true;
    for (std::size_t part = 0; part < parts.size(); ++part) {
      const std::byte* const whole = static_cast<std::byte*>(aligned) + part * kPart * kOut * 2;
      is_equal = is_equal && std::memcmp(whole, parts[part].data(), parts[part].size()) == 0;
    }
    INFO("threads ", threads);
    CHECK(is_equal);
  }
}

TEST_CASE("a gated product has the bits of a product and its activation") {
  const std::tuple<std::int64_t, std::int64_t> sizes[] = {{32, 40}, {160, 70}, {992, 300}};
  for_each_isa([&] {
    for (const DType dtype : kDTypes) {
      for (const auto& [n, k] : sizes) {
        for (const std::int64_t m : {1, 16, 33, 70, 400}) {
          set_num_threads(2);
          const Case here(dtype, m, n, k, 5, 0);
          const auto layer = here.layer();
          const Bytes gate_up = here.run(*layer, 0, m);
          const std::int64_t stride = n / 2 + 3;
          Bytes wanted(static_cast<std::size_t>(m * stride) * size_of(dtype), std::byte{0x7f});
          Bytes actual = wanted;
          silu_mul({gate_up.data(), wanted.data(), stride, m, n / 2}, dtype);
          layer->forward_silu_mul(here.x.data(), m, here.x_stride, actual.data(), stride, false);
          INFO("isa ", isa_name(current_isa()), " dtype ", static_cast<int>(dtype), " m ", m, " n ", n, " k ", k);
          CHECK(actual == wanted);
        }
      }
    }
  });
  const PackedLinear odd(48, 8, DType::kFloat32);
  CHECK_THROWS_AS(odd.forward_silu_mul(nullptr, 1, 8, nullptr, 24, false), std::invalid_argument);
}

TEST_CASE("weights come back as they were packed, in whatever pieces") {
  set_num_threads(2);
  constexpr std::int64_t kRows = 77;
  for (const DType dtype : kDTypes) {
    for (const DType source_dtype : kDTypes) {
      for (const std::int64_t k : {1, 2, 33, 64}) {
        const std::int64_t stride = k + 3;
        const Bytes source = random_values(kRows * stride, source_dtype, 7);
        PackedWeights weights(kRows, k, dtype);
        std::int64_t first = 0;
        for (const std::int64_t count : {0, 1, 18, 3, 30, 25}) {
          const auto offset = static_cast<std::size_t>(first * stride) * size_of(source_dtype);
          weights.fill(first, count, source.data() + offset, stride, source_dtype);
          first += count;
        }
        REQUIRE(first == kRows);
        Bytes back(static_cast<std::size_t>(70 * k) * size_of(dtype));
        weights.unpack(5, 70, back.data());
        bool is_equal = true;
        for (std::int64_t i = 0; i < 70 * k; ++i) {
          Bytes wanted(4);
          set_value(wanted, dtype, 0, value_at(source, source_dtype, (i / k + 5) * stride + i % k));
          is_equal = is_equal && value_at(back, dtype, i) == value_at(wanted, dtype, 0);
        }
        CHECK(is_equal);
      }
    }
  }
}

TEST_CASE("a large layer lies on huge pages and is zero where it has no weights") {
  const PackedWeights weights(1000, 4097, DType::kBFloat16);
  CHECK(reinterpret_cast<std::uintptr_t>(weights.data()) % (2 << 20) == 0);
  CHECK(weights.panel_bytes() == 4128 * 16 * 2);
  CHECK(weights.num_bytes() >= static_cast<std::size_t>(63 * 4128 * 16 * 2));
  CHECK(weights.data()[weights.num_bytes() - 1] == std::byte{0});
}

TEST_CASE("formats convert as the processor does") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(half);
    if (std::isnan(wide)) continue;
    CHECK(from_float<Float16>(wide).bits == bits);
    // Halfway to the next one: to the even of the two.
    const float next = to_float(Float16{static_cast<std::uint16_t>(bits + 1)});
    if ((bits & 0x7fffU) < 0x7bffU) CHECK((from_float<Float16>((wide + next) / 2).bits & 1U) == 0);
  }
  CHECK(from_float<Float16>(65519.0F).bits == 0x7bff);
  CHECK(from_float<Float16>(65520.0F).bits == 0x7c00);
  CHECK(std::isnan(to_float(from_float<Float16>(NAN))));
  CHECK(std::isnan(to_float(from_float<BFloat16>(NAN))));
  CHECK(from_float<BFloat16>(1.00390625F).bits == 0x3f80);
  CHECK(from_float<BFloat16>(1.01171875F).bits == 0x3f82);
}

TEST_CASE("what cannot be is refused") {
  CHECK_THROWS_AS(PackedLinear(0, 4, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(PackedLinear(4, -1, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(dtype_of("float64"), std::invalid_argument);
  PackedLinear layer(4, 4, DType::kBFloat16);
  const Bytes bytes(64);
  Bytes out(64);
  CHECK_THROWS_AS(layer.weights().fill(3, 2, bytes.data(), 4, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(layer.weights().fill(-1, 1, bytes.data(), 4, DType::kFloat32), std::invalid_argument);
  CHECK_THROWS_AS(layer.weights().unpack(0, 5, out.data()), std::invalid_argument);
  CHECK_THROWS_AS(layer.forward(bytes.data(), 1, 4, out.data(), 4, DType::kFloat16, false), std::invalid_argument);
  CHECK_THROWS_AS(layer.forward(bytes.data(), -1, 4, out.data(), 4, DType::kFloat32, false), std::invalid_argument);
  CHECK_THROWS_AS(layer.forward(bytes.data(), 2, 3, out.data(), 4, DType::kFloat32, false), std::invalid_argument);
  CHECK_THROWS_AS(layer.forward(bytes.data(), 2, 4, out.data(), 3, DType::kFloat32, false), std::invalid_argument);
  layer.forward(bytes.data(), 0, 4, out.data(), 4, DType::kFloat32, false);
}
