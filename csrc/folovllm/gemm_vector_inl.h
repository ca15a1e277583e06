// The kernel of every instruction set that has vectors but no tiles, over an `Ops` that names its instructions:
//
//   Ops::kLanes            outputs per vector; kPanelWidth / kLanes vectors make a panel
//   Ops::kDepth            k's per step: 2 for the pairs of bfloat16, else 1
//   Ops::X                 element of the prepared activations
//   Ops::Acc, Weights, Input
//   Ops::load(bytes)       Weights of one vector and one step; kVectorBytes of them
//   Ops::broadcast(x)      Input of one row and one step
//   Ops::fma(acc, w, x)    one step of the chain
//   Ops::panels(rows)      panels taken together with so many rows: what the registers hold, and enough chains at once
//   Ops::kMaxRows          rows taken together at most
//   Ops::store(out, dtype, acc), Ops::zero(), Ops::add(acc, bias)
//
//                 panels(R) panels              Each step loads panels(R) vectors of weights, broadcasts R inputs and
//              +----+----+----+----+            does R x panels(R) fma's. The rows of a piece pass over its weights
//   R rows     | .. | .. | .. | .. |  acc       while these are in the cache; the weights come from memory once.
//              +----+----+----+----+
#pragma once

#include "gemm.h"

namespace folovllm {
namespace {  // each file has its own, compiled for its instruction set

template <typename Ops>
struct VectorGemm {
  using X = typename Ops::X;
  static constexpr int kVectors = static_cast<int>(kPanelWidth) / Ops::kLanes;

  static std::int64_t num_steps(const Gemm& gemm) { return (gemm.in_features + Ops::kDepth - 1) / Ops::kDepth; }

  struct Inputs {
    const X* data;
    std::int64_t stride;
  };

  // One vector of outputs of a row, the last of which may lie beyond the layer.
  static void store(const Gemm& gemm, std::int64_t row, std::int64_t column, typename Ops::Acc acc) {
    if (column >= gemm.out_features) return;
    if (gemm.bias != nullptr) acc = Ops::add(acc, gemm.bias + column);
    const std::int64_t size = gemm.out_dtype == DType::kFloat32 ? 4 : 2;
    std::byte* const out = gemm.out + (row * gemm.out_stride + column) * size;
    if (column + Ops::kLanes <= gemm.out_features) {
      Ops::store(out, gemm.out_dtype, acc);
      return;
    }
    alignas(64) std::byte whole[Ops::kLanes * 4];
    Ops::store(whole, gemm.out_dtype, acc);
    __builtin_memcpy(out, whole, static_cast<std::size_t>((gemm.out_features - column) * size));
  }

  template <int kRows, int kPanels>
  static void block(const Gemm& gemm, const Inputs& x, std::int64_t row, std::int64_t panel) {
    constexpr int kColumns = kPanels * kVectors;
    typename Ops::Acc acc[kRows][kColumns];
    for (auto& line : acc) {
      for (auto& element : line) element = Ops::zero();
    }
    const std::byte* weights[kPanels];
    for (int p = 0; p < kPanels; ++p) weights[p] = gemm.weights + (panel + p) * gemm.panel_bytes;
    const X* input = x.data + row * x.stride;
    const std::int64_t steps = num_steps(gemm);
    for (std::int64_t step = 0; step < steps; ++step, input += Ops::kDepth) {
      typename Ops::Weights w[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        w[c] = Ops::load(weights[c / kVectors] + (step * kVectors + c % kVectors) * Ops::kVectorBytes);
      }
      for (int r = 0; r < kRows; ++r) {
        const typename Ops::Input in = Ops::broadcast(input + r * x.stride);
        for (int c = 0; c < kColumns; ++c) acc[r][c] = Ops::fma(acc[r][c], w[c], in);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        store(gemm, row + r, panel * kPanelWidth + c * Ops::kLanes, acc[r][c]);
      }
    }
  }

  template <int kRows>
  static void row_block(const Gemm& gemm, const Inputs& x, std::int64_t row, Range panels) {
    constexpr int kTogether = Ops::panels(kRows);
    std::int64_t panel = panels.begin;
    for (; panel + kTogether <= panels.end; panel += kTogether) block<kRows, kTogether>(gemm, x, row, panel);
    for (; panel < panels.end; ++panel) block<kRows, 1>(gemm, x, row, panel);
  }

  template <int kRows>
  static void dispatch(const Gemm& gemm, const Inputs& x, std::int64_t row, std::int64_t num_rows, Range panels) {
    if constexpr (kRows > 0) {
      if (num_rows == kRows) return row_block<kRows>(gemm, x, row, panels);
      dispatch<kRows - 1>(gemm, x, row, num_rows, panels);
    }
  }

  static void compute(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels) {
    Inputs x{reinterpret_cast<const X*>(gemm.x), gemm.x_stride};
    if (prepared != nullptr) x = {reinterpret_cast<const X*>(prepared), num_steps(gemm) * Ops::kDepth};
    const std::int64_t count = rows.end - rows.begin;
    const std::int64_t num_blocks = (count + Ops::kMaxRows - 1) / Ops::kMaxRows;
    // Few panels at a time, so that they stay near while the rows pass.
    constexpr std::int64_t kGroup = Ops::panels(1);
    for (std::int64_t panel = panels.begin; panel < panels.end; panel += kGroup) {
      const Range group{panel, panel + kGroup < panels.end ? panel + kGroup : panels.end};
      // Blocks of nearly equal height: 7 rows are 4 and 3, not 6 and 1.
      std::int64_t row = rows.begin;
      for (std::int64_t i = 0; i < num_blocks; ++i) {
        const std::int64_t end = rows.begin + count * (i + 1) / num_blocks;
        dispatch<Ops::kMaxRows>(gemm, x, row, end - row, group);
        row = end;
      }
    }
  }

  static std::int64_t prepared_bytes(const Gemm& gemm) {
    // Activations are read where they are if there is nothing to convert and no half of a last pair to add.
    if (!Ops::kConverts && gemm.in_features % Ops::kDepth == 0) return 0;
    return gemm.num_rows * num_steps(gemm) * Ops::kDepth * static_cast<std::int64_t>(sizeof(X));
  }

  static void prepare(const Gemm& gemm, Range rows, std::byte* prepared) {
    const std::int64_t width = num_steps(gemm) * Ops::kDepth;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      X* const to = reinterpret_cast<X*>(prepared) + row * width;
      Ops::convert(gemm.x, row * gemm.x_stride, gemm.in_features, to);
      for (std::int64_t k = gemm.in_features; k < width; ++k) to[k] = X{};
    }
  }

  static constexpr GemmKernel kKernel = {&prepared_bytes, &prepare, &compute, 96};
};

}  // namespace
}  // namespace folovllm
