// Values of nibbles, and the choice of a kernel by the number of rows, shared by the kernels of quantised panels.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "quantized_layout.h"

namespace folovllm::quantized {

constexpr std::uint16_t bf16_of_small_int(int value) {  // exact up to 256 in magnitude
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(value)) >> 16);
}

// 32 entries: entry i and entry i + 16 are factor * i + offset.
constexpr std::array<std::uint16_t, 32> bf16_table(int factor, int offset) {
  std::array<std::uint16_t, 32> table{};
  for (std::size_t i = 0; i < table.size(); ++i) {
    table[i] = bf16_of_small_int(factor * static_cast<int>(i % 16) + offset);
  }
  return table;
}

alignas(64) inline constexpr auto kInt4Table = bf16_table(1, -8);
alignas(64) inline constexpr auto kInt8LowTable = bf16_table(1, 0);
alignas(64) inline constexpr auto kInt8HighTable = bf16_table(16, -128);
inline constexpr const std::uint16_t* kInt4Bf16 = kInt4Table.data();
inline constexpr const std::uint16_t* kInt8LowBf16 = kInt8LowTable.data();
inline constexpr const std::uint16_t* kInt8HighBf16 = kInt8HighTable.data();

// Kernels for these numbers of rows, ascending from 1: kernel_of.operator()<ROWS>().
template <int... ROWS>
struct KernelsByRows {
  static constexpr std::array<int, sizeof...(ROWS)> kRows{ROWS...};

  template <typename F>
  constexpr explicit KernelsByRows(F kernel_of) : kernels{kernel_of.template operator()<ROWS>()...} {}

  std::array<PanelKernel, sizeof...(ROWS)> kernels;
};

// Run all rows, as many at a time as there is a kernel for; `x_bytes` is the size of an element of x.
template <int... ROWS>
void run_by_rows(const KernelsByRows<ROWS...>& by_rows, std::int64_t x_bytes, const Shape& shape, const Panel& panel,
                 const Rows& rows, float* out) {
  std::size_t choice = by_rows.kernels.size() - 1;
  for (std::int64_t row = 0; row < rows.num_rows; row += by_rows.kRows[choice]) {
    while (by_rows.kRows[choice] > rows.num_rows - row) --choice;
    const Rows part{static_cast<const std::byte*>(rows.x) + row * rows.x_stride * x_bytes, rows.x_stride,
                    rows.sums + row * shape.num_groups, by_rows.kRows[choice]};
    by_rows.kernels[choice](shape, panel, part, out + row * kPanelColumns);
  }
}

}  // namespace folovllm::quantized
