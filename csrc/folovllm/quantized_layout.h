// How quantised weights lie in memory, shared by the packer and the kernels of each instruction set.
//
// A column is one output feature; a word holds 32 / bits consecutive weights of one column. 64 columns form a panel,
// which a kernel reads from front to back:
//
//   weights  [panel][word][column 0 .. 63]     32-bit words, K * bits / 32 per column; one byte more can be read
//   scales   [panel][group][column 0 .. 63]    as the checkpoint has them
//   zeros    [panel][group][column 0 .. 63]    int8, the zero point minus 2^(bits-1); only if some differ from that
//
// Inside a word, weights at even places of K fill the low half and those at odd places the high half, so that shifting
// a word by 4j leaves in its two 16-bit halves the nibbles of a neighbouring pair, which is what a bf16 dot product
// takes:
//
//   bits = 4:  | k6 k4 k2 k0 | low half        bits = 8:  | k2 k0 | low half
//              | k7 k5 k3 k1 | high half                  | k3 k1 | high half        (most significant first)
//
// With q' = q - 2^(bits-1), an integer that bf16 holds exactly, an output is
//
//   y[n] = sum over groups g of scale[g][n] * (sum over k in g of q'[n][k] x[k] - zeros[g][n] * sum over k in g of x[k])
//
// in fp32, in an order that depends neither on the rows beside nor on the threads; a row alone may have another one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "number_formats.h"
#include "packed_weights.h"

namespace folovllm::quantized {

constexpr std::int64_t kPanelColumns = 64;

constexpr std::int64_t scale_bytes(DType type) { return static_cast<std::int64_t>(size_of(type)); }

// What all panels of a layer have in common.
struct Shape {
  int bits;
  std::int64_t num_words;    // per column
  std::int64_t group_words;  // per group; the last group may be shorter
  std::int64_t num_groups;
  DType scale_type;
};

// The shift at which a word holds its k-th weight.
constexpr int place_in_word(int bits, int k) { return (k / 2) * bits + (k % 2) * 16; }

// Where one panel begins.
struct Panel {
  const std::uint32_t* weights;
  const std::byte* scales;
  const std::int8_t* zeros;  // null when all zero points are 2^(bits-1)
};

// Input rows as a kernel takes them: fp32 or bf16 by the kernel, K contiguous elements each.
struct Rows {
  const void* x;
  std::int64_t x_stride;  // elements
  const float* sums;      // [row][group]: sum of the group's x; read only if the panel has zeros
  std::int64_t num_rows;
};

// Writes out[row][column] of one panel, 64 columns per row.
using PanelKernel = void (*)(const Shape& shape, const Panel& panel, const Rows& rows, float* out);

void run_panel_portable(const Shape& shape, const Panel& panel, const Rows& rows, float* out);     // x is fp32
void run_panel_avx2(const Shape& shape, const Panel& panel, const Rows& rows, float* out);         // x is fp32
void run_panel_avx512(const Shape& shape, const Panel& panel, const Rows& rows, float* out);       // x is fp32
void run_panel_avx512_bf16(const Shape& shape, const Panel& panel, const Rows& rows, float* out);  // x is bf16

// One row of bf16 in integers of 16 bits, whose results differ from those above by less than bf16's rounding. Memory for
// K bytes, rounded up to 16, of each part, and a value per group, is the caller's.
struct SplitRow {
  std::int32_t* high;
  std::int32_t* low;
  float* scales;
  std::int32_t* sums;
};
// Whether the machine can, and groups are short enough for 32-bit sums.
bool can_split_row(const Shape& shape);
// False for a row with infinities or NaN, which integers cannot stand for.
bool split_row(const Shape& shape, const std::uint16_t* x, std::int64_t depth, const SplitRow& row);
void run_split_row(const Shape& shape, const Panel& panel, const SplitRow& row, float* out);

// x is what amx_prepare has made of bf16 rows.
void run_panel_amx(const Shape& shape, const Panel& panel, const Rows& rows, float* out);

// Puts rows [begin, end) into tiles, and sums up their groups.
void amx_prepare(const Shape& shape, const std::uint16_t* x, std::int64_t x_stride, std::int64_t begin, std::int64_t end,
                 std::byte* prepared, float* sums);
std::int64_t amx_prepared_bytes(const Shape& shape, std::int64_t num_rows);

// bf16 elements of a dequantised panel: four panels of packed_weights.h, whose K is padded to kTileDepth.
constexpr std::int64_t dequantized_elements(const Shape& shape) {
  const std::int64_t depth = shape.num_words * (32 / shape.bits);
  return (depth + kTileDepth - 1) / kTileDepth * kTileDepth * kPanelColumns;
}

// Writes a panel as scale * (q - zero), rounded to bf16; `out` beyond K is not written.
using PanelDequantizer = void (*)(const Shape& shape, const Panel& panel, std::uint16_t* out);

void dequantize_portable(const Shape& shape, const Panel& panel, std::uint16_t* out);
void dequantize_avx2(const Shape& shape, const Panel& panel, std::uint16_t* out);
void dequantize_avx512(const Shape& shape, const Panel& panel, std::uint16_t* out);
void dequantize_avx512_bf16(const Shape& shape, const Panel& panel, std::uint16_t* out);

}  // namespace folovllm::quantized
