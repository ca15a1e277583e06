// Up to 64 rows with matrix tiles, for gemm_amx.cpp. Included by it alone: everything is local to it.
#pragma once

#include <immintrin.h>

#include "amx_tiles.h"
#include "gemm.h"

namespace folovllm {
namespace {

constexpr std::int64_t kLineBytes = 64;

std::int64_t k_blocks(const Gemm& gemm) { return (gemm.in_features + kTileDepth - 1) / kTileDepth; }

// `num_rows` x 16 sums to the outputs of a panel.
void write_outputs(const Gemm& gemm, const float* sums, std::int64_t sums_stride, std::int64_t row,
                   std::int64_t num_rows, std::int64_t panel) {
  const std::int64_t column = panel * kPanelWidth;
  const std::int64_t left = gemm.out_features - column;
  const auto mask = static_cast<__mmask16>(left >= kPanelWidth ? 0xffff : (1 << left) - 1);
  const __m512 bias = gemm.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(gemm.bias + column);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const __m512 values = _mm512_add_ps(_mm512_load_ps(sums + r * sums_stride), bias);
    const std::int64_t index = (row + r) * gemm.out_stride + column;
    if (gemm.out_dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(reinterpret_cast<float*>(gemm.out) + index, mask, values);
    } else {
      _mm256_mask_storeu_epi16(reinterpret_cast<std::uint16_t*>(gemm.out) + index, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }
  }
}

constexpr std::int64_t kMostTiles = 4;
constexpr std::int64_t kTileFloats = kTileRows * kPanelWidth;

// Adds a tile of rows x some panels over a run of k blocks to the tiles 0 ... kPanels - 1.
template <int kPanels, typename Between>
void add_products(const std::byte* left, const std::byte* right, std::int64_t panel_bytes, std::int64_t num_blocks,
                  Between&& between) {
  for (std::int64_t k = 0; k < num_blocks; ++k) {
    const std::byte* const at = right + k * kTileBytes;
    between(k);
    load_tile<4>(left + k * kTileBytes, 64);
    load_tile<5>(at, 64);
    multiply_tiles<0, 4, 5>();
    if constexpr (kPanels > 1) {
      load_tile<6>(at + panel_bytes, 64);
      multiply_tiles<1, 4, 6>();
    }
    if constexpr (kPanels > 2) {
      load_tile<5>(at + 2 * panel_bytes, 64);
      multiply_tiles<2, 4, 5>();
    }
    if constexpr (kPanels > 3) {
      load_tile<6>(at + 3 * panel_bytes, 64);
      multiply_tiles<3, 4, 6>();
    }
  }
}

template <int kPanels>
void zero_sums() {
  zero_tile<0>();
  if constexpr (kPanels > 1) zero_tile<1>();
  if constexpr (kPanels > 2) zero_tile<2>();
  if constexpr (kPanels > 3) zero_tile<3>();
}

template <int kPanels>
void load_sums(const float* from) {
  load_tile<0>(from, 64);
  if constexpr (kPanels > 1) load_tile<1>(from + kTileFloats, 64);
  if constexpr (kPanels > 2) load_tile<2>(from + 2 * kTileFloats, 64);
  if constexpr (kPanels > 3) load_tile<3>(from + 3 * kTileFloats, 64);
}

template <int kPanels>
void store_sums(float* to) {
  store_tile<0>(to, 64);
  if constexpr (kPanels > 1) store_tile<1>(to + kTileFloats, 64);
  if constexpr (kPanels > 2) store_tile<2>(to + 2 * kTileFloats, 64);
  if constexpr (kPanels > 3) store_tile<3>(to + 3 * kTileFloats, 64);
}

// So few rows wait for the weights, which four panels at a time read fastest. The tiles of rows take turns at a stretch of
// k blocks that the first level cache holds; the first of them reads it from memory, the others look ahead.
template <int kPanels>
void few_rows_block(const Gemm& gemm, const std::byte* prepared, Range rows, std::int64_t panel) {
  constexpr std::int64_t kStretch = 8;
  const std::int64_t blocks = k_blocks(gemm);
  const std::int64_t num_tiles = (rows.end - rows.begin + kTileRows - 1) / kTileRows;
  const std::int64_t stretch = num_tiles == 1 ? blocks : kStretch;
  const std::byte* const left = prepared + rows.begin / kTileRows * blocks * kTileBytes;
  const std::byte* const right = gemm.weights + panel * gemm.panel_bytes;
  alignas(64) float sums[kMostTiles][kPanels * kTileFloats];
  for (std::int64_t begin = 0; begin < blocks; begin += stretch) {
    const std::int64_t count = begin + stretch < blocks ? stretch : blocks - begin;
    const bool ends = begin + count == blocks;
    const std::byte* const next = right + (ends ? kPanels * gemm.panel_bytes : (begin + count) * kTileBytes);
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      begin == 0 ? zero_sums<kPanels>() : load_sums<kPanels>(sums[tile]);
      const std::byte* ahead = next + (tile - 1) * count * kLineBytes;
      add_products<kPanels>(left + (tile * blocks + begin) * kTileBytes, right + begin * kTileBytes, gemm.panel_bytes,
                            count, [&](std::int64_t k) {
                              if (tile == 0) return;
                              for (int p = 0; p < kPanels; ++p) {
                                _mm_prefetch(ahead + p * gemm.panel_bytes + k * kLineBytes, _MM_HINT_T1);
                              }
                            });
      store_sums<kPanels>(sums[tile]);
      if (!ends) continue;
      const std::int64_t row = rows.begin + tile * kTileRows;
      const std::int64_t num_rows = rows.end - row < kTileRows ? rows.end - row : kTileRows;
      for (int p = 0; p < kPanels; ++p) {
        write_outputs(gemm, sums[tile] + p * kTileFloats, kPanelWidth, row, num_rows, panel + p);
      }
    }
  }
}

void few_rows(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels) {
  // A single tile has only the rows there are.
  const TileConfig config(gemm.num_rows < kTileRows ? gemm.num_rows : kTileRows, 0b0001'1111);
  std::int64_t panel = panels.begin;
  for (; panel + 4 <= panels.end; panel += 4) few_rows_block<4>(gemm, prepared, rows, panel);
  for (; panel < panels.end; ++panel) few_rows_block<1>(gemm, prepared, rows, panel);
}

}  // namespace
}  // namespace folovllm
