// The three floating-point formats of weights and activations, and conversions that any machine can do.
//
// Files compiled for different instruction sets include this, so its functions are local to each: the linker must not
// take one file's copy for all.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace folovllm {

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16 };

// "float32", "bfloat16" or "float16"; throws std::invalid_argument, which lists them, for another.
DType dtype_of(std::string_view name);

constexpr std::size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

namespace {

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  // Shifted into place the exponent lacks 127 - 15, which one exact multiplication adds, for subnormals too.
  const std::uint32_t magnitude = (value.bits & 0x7fffU) << 13;
  const std::uint32_t sign = (value.bits & 0x8000U) << 16;
  if (magnitude >= 0x7c00U << 13) return std::bit_cast<float>(magnitude | 0x7f800000U | sign);  // infinite, NaN
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112F) | sign);
}

// To the nearest, ties to even, as the processors' conversions do.
template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return {static_cast<std::uint16_t>(bits >> 16 | 0x40U)};  // NaN stays NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (magnitude >= 0x477ff000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};  // rounds to 65536 or more
  if (magnitude < 0x38800000U) {
    // Subnormal: adding 0.5 aligns the last bit kept with the last bit of a float, so the addition rounds.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5F;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000U))};
  }
  magnitude += 0xc8000fffU + (magnitude >> 13 & 1U);
  return {static_cast<std::uint16_t>(sign | magnitude >> 13)};
}

// Call function(T{}) with the type of a dtype.
template <typename F>
decltype(auto) with_type(DType dtype, F&& function) {
  if (dtype == DType::kFloat32) return function(float{});
  if (dtype == DType::kBFloat16) return function(BFloat16{});
  return function(Float16{});
}

}  // namespace
}  // namespace folovllm
