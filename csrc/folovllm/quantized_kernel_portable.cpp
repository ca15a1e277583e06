// Quantised panels in plain C++ and fp32.
#include <cstring>

#include "quantized_layout.h"
#include "quantized_tables.h"

#define FOLOVLLM_ISA
#define FOLOVLLM_INLINE inline

namespace folovllm::quantized {
namespace {

struct Vector {
  static constexpr int kWidth = 8;
  using RowCounts = KernelsByRows<1, 2>;
  static constexpr int kFewRows = 1;

  struct Value {
    float lanes[kWidth];
  };

  template <typename F>
  static Value of_each(F function) {
    Value value;
    for (int i = 0; i < kWidth; ++i) value.lanes[i] = function(i);
    return value;
  }

  static Value zero() { return of_each([](int) { return 0.0F; }); }
  static Value load(const float* address) {
    return of_each([=](int i) { return address[i]; });
  }
  static void store(float* address, const Value& value) { std::memcpy(address, value.lanes, sizeof(value.lanes)); }
  static Value broadcast(float value) {
    return of_each([=](int) { return value; });
  }
  static Value multiply_add(const Value& a, const Value& b, const Value& c) {
    return of_each([&](int i) { return a.lanes[i] * b.lanes[i] + c.lanes[i]; });
  }

  static Value scales(const std::byte* address, DType type) {
    if (type == DType::kFloat32) {
      Value value;
      std::memcpy(value.lanes, address, sizeof(value.lanes));
      return value;
    }
    std::uint16_t bits[kWidth];
    std::memcpy(bits, address, sizeof(bits));
    const bool is_fp16 = type == DType::kFloat16;
    return of_each([&](int i) { return is_fp16 ? to_float(Float16{bits[i]}) : to_float(BFloat16{bits[i]}); });
  }

  static Value zeros(const std::int8_t* address) {
    return of_each([=](int i) { return static_cast<float>(address[i]); });
  }

  template <int BITS, int K>
  static Value weights(const std::uint32_t* words) {
    constexpr int kPlace = place_in_word(BITS, K);
    return of_each([=](int i) {
      const auto value = static_cast<std::int32_t>(words[i] >> kPlace & ((1U << BITS) - 1));
      return static_cast<float>(value - (1 << (BITS - 1)));
    });
  }

  static void store_pairs(std::uint16_t* address, const Value& even, const Value& odd) {
    for (int i = 0; i < kWidth; ++i) {
      address[2 * i] = from_float<BFloat16>(even.lanes[i]).bits;
      address[2 * i + 1] = from_float<BFloat16>(odd.lanes[i]).bits;
    }
  }
};

#include "quantized_kernel_fp32_inl.h"

#include "quantized_dequantize_inl.h"

}  // namespace

void run_panel_portable(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  run_panel(shape, panel, rows, out);
}

void dequantize_portable(const Shape& shape, const Panel& panel, std::uint16_t* out) {
  dequantize_panel<Vector>(shape, panel, out);
}

}  // namespace folovllm::quantized
