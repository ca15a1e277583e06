// Matrix tiles (AMX-BF16). A tile is 16 rows of 64 bytes: of activations 16 rows x 32 k's, of weights 16 pairs of k's x
// 16 outputs (packed_weights.h), of results 16 x 16 floats.
//
//   prepared activations    [row tile][k block][16 rows][32 k's]     rows and k's that do not exist are zero
//
//   more than 16 rows:             up to 16 rows:
//            W4  W5                         W5 W6 W5 W6
//       A6 | C0  C1                    A4 | C0 C1 C2 C3             Every C adds its k blocks in order.
//       A7 | C2  C3
//
// Two by two tiles do four products for four loads. Loads at that rate must come from the first level cache, so a
// stretch of k of two panels of weights stays there while the rows of a piece pass over it, and the sums wait in memory
// (as fp32, so nothing is rounded) for the next stretch. Meanwhile the next two panels come into the second level.
// Measured per core on 2.9 GHz cores whose limit is 1.9 to 3.0 TFLOP/s, 256 rows, K 1024: 1.34 TFLOP/s; with a stretch
// of 16 blocks 1.10, of all 1.10; without reading ahead 1.14.
#if defined(__x86_64__)

#include <immintrin.h>

#include "amx_tiles.h"
#include "gemm.h"

namespace folovllm {
namespace {

constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kMaxPieceRows = 256;
// Of k, in blocks of 32: 16 KiB of weights and as much of activations.
constexpr std::int64_t kStretch = 8;

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

// -- up to 16 rows ----------------------------------------------------------------------------------------------------

template <int kPanels>
void few_rows_block(const Gemm& gemm, const std::byte* left, std::int64_t row, std::int64_t num_rows,
                    std::int64_t panel) {
  const std::byte* const right = gemm.weights + panel * gemm.panel_bytes;
  const std::int64_t blocks = k_blocks(gemm);
  zero_tile<0>();
  if constexpr (kPanels > 1) zero_tile<1>();
  if constexpr (kPanels > 2) zero_tile<2>();
  if constexpr (kPanels > 3) zero_tile<3>();
  for (std::int64_t k = 0; k < blocks; ++k) {
    const std::byte* const at = right + k * kTileBytes;
    load_tile<4>(left + k * kTileBytes, 64);
    load_tile<5>(at, 64);
    multiply_tiles<0, 4, 5>();
    if constexpr (kPanels > 1) {
      load_tile<6>(at + gemm.panel_bytes, 64);
      multiply_tiles<1, 4, 6>();
    }
    if constexpr (kPanels > 2) {
      load_tile<5>(at + 2 * gemm.panel_bytes, 64);
      multiply_tiles<2, 4, 5>();
    }
    if constexpr (kPanels > 3) {
      load_tile<6>(at + 3 * gemm.panel_bytes, 64);
      multiply_tiles<3, 4, 6>();
    }
  }
  alignas(64) float sums[4][kTileRows * kPanelWidth];
  store_tile<0>(sums[0], 64);
  if constexpr (kPanels > 1) store_tile<1>(sums[1], 64);
  if constexpr (kPanels > 2) store_tile<2>(sums[2], 64);
  if constexpr (kPanels > 3) store_tile<3>(sums[3], 64);
  for (int p = 0; p < kPanels; ++p) write_outputs(gemm, sums[p], kPanelWidth, row, num_rows, panel + p);
}

void few_rows(const Gemm& gemm, const std::byte* left, Range rows, Range panels) {
  const std::int64_t num_rows = rows.end - rows.begin;
  const TileConfig config(num_rows, 0b0001'1111);
  std::int64_t panel = panels.begin;
  for (; panel + 4 <= panels.end; panel += 4) few_rows_block<4>(gemm, left, rows.begin, num_rows, panel);
  for (; panel < panels.end; ++panel) few_rows_block<1>(gemm, left, rows.begin, num_rows, panel);
}

// -- more -------------------------------------------------------------------------------------------------------------

// What will be wanted next is fetched a few lines at a step, evenly over all steps.
struct ReadAhead {
  const std::byte* at;
  int lines_per_step;

  void step() {
    for (int line = 0; line < lines_per_step; ++line, at += kLineBytes) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// Lines to be written are fetched before their sums are ready.
void fetch_outputs(const Gemm& gemm, std::int64_t row, std::int64_t num_rows, std::int64_t panel) {
  const std::int64_t size = gemm.out_dtype == DType::kFloat32 ? 4 : 2;
  for (std::int64_t r = 0; r < num_rows; ++r) {
    __builtin_prefetch(gemm.out + ((row + r) * gemm.out_stride + panel * kPanelWidth) * size, 1);
  }
}

// One or two tiles of rows x one or two panels: adds k blocks [ks.begin, ks.end) to `sums`, [32][32].
template <bool kTwoRows, bool kTwoPanels>
void tile_block(const Gemm& gemm, const std::byte* left, std::int64_t panel, Range ks, float* sums, ReadAhead& ahead) {
  constexpr std::int64_t kSumsStride = 2 * kPanelWidth * 4;
  constexpr std::int64_t kHalf = kTileRows * 2 * kPanelWidth;
  if (ks.begin == 0) {
    zero_tile<0>();
    if constexpr (kTwoPanels) zero_tile<1>();
    if constexpr (kTwoRows) zero_tile<2>();
    if constexpr (kTwoRows && kTwoPanels) zero_tile<3>();
  } else {
    load_tile<0>(sums, kSumsStride);
    if constexpr (kTwoPanels) load_tile<1>(sums + kPanelWidth, kSumsStride);
    if constexpr (kTwoRows) load_tile<2>(sums + kHalf, kSumsStride);
    if constexpr (kTwoRows && kTwoPanels) load_tile<3>(sums + kHalf + kPanelWidth, kSumsStride);
  }
  const std::byte* const lower = left + k_blocks(gemm) * kTileBytes;
  const std::byte* const right = gemm.weights + panel * gemm.panel_bytes;
  for (std::int64_t k = ks.begin; k < ks.end; ++k) {
    const std::int64_t at = k * kTileBytes;
    ahead.step();
    load_tile<6>(left + at, 64);
    load_tile<4>(right + at, 64);
    multiply_tiles<0, 6, 4>();
    if constexpr (kTwoPanels) {
      load_tile<5>(right + gemm.panel_bytes + at, 64);
      multiply_tiles<1, 6, 5>();
    }
    if constexpr (kTwoRows) {
      load_tile<7>(lower + at, 64);
      multiply_tiles<2, 7, 4>();
    }
    if constexpr (kTwoRows && kTwoPanels) multiply_tiles<3, 7, 5>();
  }
  store_tile<0>(sums, kSumsStride);
  if constexpr (kTwoPanels) store_tile<1>(sums + kPanelWidth, kSumsStride);
  if constexpr (kTwoRows) store_tile<2>(sums + kHalf, kSumsStride);
  if constexpr (kTwoRows && kTwoPanels) store_tile<3>(sums + kHalf + kPanelWidth, kSumsStride);
}

// The rows of a piece over one or two panels.
template <bool kTwoPanels>
void panel_block(const Gemm& gemm, const std::byte* left, Range rows, std::int64_t panel) {
  alignas(64) float sums[kMaxPieceRows * 2 * kPanelWidth];
  const std::int64_t blocks = k_blocks(gemm);
  const std::int64_t passes = (rows.end - rows.begin + 2 * kTileRows - 1) / (2 * kTileRows);
  // A single pass uses nothing twice, and waits for memory anyway.
  const std::int64_t stretch = passes == 1 ? blocks : kStretch;
  constexpr std::int64_t kLinesPerBlock = 2 * kTileBytes / kLineBytes;
  ReadAhead ahead{gemm.weights + (panel + 2) * gemm.panel_bytes,
                  passes == 1 ? 0 : static_cast<int>((kLinesPerBlock + passes - 1) / passes)};
  for (Range ks{0, 0}; ks.begin < blocks; ks.begin = ks.end) {
    ks.end = ks.begin + stretch < blocks ? ks.begin + stretch : blocks;
    for (std::int64_t row = rows.begin; row < rows.end; row += 2 * kTileRows) {
      const std::byte* const tiles = left + row / kTileRows * blocks * kTileBytes;
      float* const here = sums + (row - rows.begin) * 2 * kPanelWidth;
      const std::int64_t num_rows = rows.end - row < 2 * kTileRows ? rows.end - row : 2 * kTileRows;
      if (ks.end == blocks) fetch_outputs(gemm, row, num_rows, panel);
      if (num_rows > kTileRows) {
        tile_block<true, kTwoPanels>(gemm, tiles, panel, ks, here, ahead);
      } else {
        tile_block<false, kTwoPanels>(gemm, tiles, panel, ks, here, ahead);
      }
      if (ks.end < blocks) continue;
      write_outputs(gemm, here, 2 * kPanelWidth, row, num_rows, panel);
      if constexpr (kTwoPanels) write_outputs(gemm, here + kPanelWidth, 2 * kPanelWidth, row, num_rows, panel + 1);
    }
  }
}

void compute(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels) {
  if (gemm.num_rows <= kTileRows) return few_rows(gemm, prepared, rows, panels);
  const TileConfig config;
  std::int64_t panel = panels.begin;
  for (; panel + 2 <= panels.end; panel += 2) panel_block<true>(gemm, prepared, rows, panel);
  if (panel < panels.end) panel_block<false>(gemm, prepared, rows, panel);
}

std::int64_t prepared_bytes(const Gemm& gemm) {
  return (gemm.num_rows + kTileRows - 1) / kTileRows * k_blocks(gemm) * kTileBytes;
}

void prepare(const Gemm& gemm, Range rows, std::byte* prepared) {
  const std::int64_t blocks = k_blocks(gemm);
  // A single tile has only the rows there are.
  const std::int64_t end =
      gemm.num_rows <= kTileRows ? gemm.num_rows : (rows.end + kTileRows - 1) / kTileRows * kTileRows;
  for (std::int64_t row = rows.begin; row < end; ++row) {
    std::byte* const to = prepared + row / kTileRows * blocks * kTileBytes + row % kTileRows * 64;
    const bool exists = row < gemm.num_rows;
    const std::byte* const from = gemm.x + (exists ? row : 0) * gemm.x_stride * 2;
    for (std::int64_t k = 0; k < blocks; ++k) {
      const std::int64_t left = exists ? gemm.in_features - k * kTileDepth : 0;
      const auto mask = static_cast<__mmask32>(left >= kTileDepth ? 0xffffffffU : (1U << left) - 1);
      _mm512_store_si512(to + k * kTileBytes, _mm512_maskz_loadu_epi16(mask, from + k * kTileDepth * 2));
    }
  }
}

constexpr GemmKernel kKernel = {&prepared_bytes, &prepare, &compute, kMaxPieceRows};

}  // namespace

const GemmKernel& gemm_amx() { return kKernel; }

}  // namespace folovllm

#endif
