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
// Two by two tiles do four products for four loads, which the second level cache serves at three quarters of the tiles'
// own rate: a piece's activations and the panels in use must fit it, and the panels to come are read ahead.
#if defined(__x86_64__)

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

// The sums of one block of 32 x 32 outputs, which are written a few rows at a step while the next block is computed.
// Written at once, they would wait for the stores of the tiles, and these for the lines of the outputs before.
class DelayedOutputs {
 public:
  explicit DelayedOutputs(const Gemm& gemm)
      : gemm_(gemm), rows_per_step_(static_cast<int>((kBlockRows + k_blocks(gemm) - 1) / k_blocks(gemm))) {}

  static constexpr std::int64_t kBlockRows = 2 * kTileRows;
  static constexpr std::int64_t kStride = 2 * kPanelWidth;

  // Where the block that is computed now puts its sums, [32][32].
  float* next_sums() { return sums_[next_]; }

  // They are there; the block before is written to its end.
  void put(std::int64_t row, std::int64_t num_rows, std::int64_t panel, std::int64_t num_panels) {
    flush();
    sums_at_ = sums_[next_];
    next_ ^= 1;
    row_ = row;
    end_row_ = row + num_rows;
    column_ = panel * kPanelWidth;
    const std::int64_t left = gemm_.out_features - column_;
    const std::int64_t width = num_panels * kPanelWidth;
    const std::int64_t count = left < width ? left : width;
    mask_ = count >= 32 ? ~0U : (1U << count) - 1;
    if (gemm_.bias == nullptr) return;
    low_bias_ = _mm512_maskz_loadu_ps(low_mask(), gemm_.bias + column_);
    high_bias_ = _mm512_maskz_loadu_ps(high_mask(), gemm_.bias + column_ + kPanelWidth);
  }

  void step() {
    for (int i = 0; i < rows_per_step_ && row_ < end_row_; ++i) write_row();
  }

  void flush() {
    while (row_ < end_row_) write_row();
  }

 private:
  __mmask16 low_mask() const { return static_cast<__mmask16>(mask_); }
  __mmask16 high_mask() const { return static_cast<__mmask16>(mask_ >> 16); }

  void write_row() {
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums_at_), low_bias_);
    const __m512 high = _mm512_add_ps(_mm512_load_ps(sums_at_ + kPanelWidth), high_bias_);
    const std::int64_t index = row_ * gemm_.out_stride + column_;
    if (gemm_.out_dtype == DType::kFloat32) {
      float* const to = reinterpret_cast<float*>(gemm_.out) + index;
      _mm512_mask_storeu_ps(to, low_mask(), low);
      _mm512_mask_storeu_ps(to + kPanelWidth, high_mask(), high);
    } else {
      _mm512_mask_storeu_epi16(reinterpret_cast<std::uint16_t*>(gemm_.out) + index, mask_,
                               reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
    sums_at_ += kStride;
    ++row_;
  }

  const Gemm& gemm_;
  const int rows_per_step_;
  std::int64_t row_ = 0;
  std::int64_t end_row_ = 0;
  std::int64_t column_ = 0;
  __mmask32 mask_ = 0;
  __m512 low_bias_ = _mm512_setzero_ps();
  __m512 high_bias_ = _mm512_setzero_ps();
  const float* sums_at_ = nullptr;
  int next_ = 0;
  alignas(64) float sums_[2][kBlockRows * kStride] = {};
};

// One or two tiles of rows x one or two panels, to the sums of `outputs`.
template <bool kTwoRows, bool kTwoPanels>
void tile_block(const Gemm& gemm, const std::byte* left, std::int64_t panel, ReadAhead& ahead, DelayedOutputs& outputs) {
  zero_tile<0>();
  if constexpr (kTwoPanels) zero_tile<1>();
  if constexpr (kTwoRows) zero_tile<2>();
  if constexpr (kTwoRows && kTwoPanels) zero_tile<3>();
  const std::int64_t blocks = k_blocks(gemm);
  const std::byte* const lower = left + blocks * kTileBytes;
  const std::byte* const right = gemm.weights + panel * gemm.panel_bytes;
  for (std::int64_t k = 0; k < blocks; ++k) {
    const std::int64_t at = k * kTileBytes;
    ahead.step();
    outputs.step();
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
  constexpr std::int64_t kStrideBytes = DelayedOutputs::kStride * 4;
  constexpr std::int64_t kHalf = kTileRows * DelayedOutputs::kStride;
  float* const sums = outputs.next_sums();
  store_tile<0>(sums, kStrideBytes);
  if constexpr (kTwoPanels) store_tile<1>(sums + kPanelWidth, kStrideBytes);
  if constexpr (kTwoRows) store_tile<2>(sums + kHalf, kStrideBytes);
  if constexpr (kTwoRows && kTwoPanels) store_tile<3>(sums + kHalf + kPanelWidth, kStrideBytes);
}

// The rows of a piece over one or two panels.
template <bool kTwoPanels>
void panel_block(const Gemm& gemm, const std::byte* left, Range rows, std::int64_t panel, DelayedOutputs& outputs) {
  constexpr std::int64_t kStep = DelayedOutputs::kBlockRows;
  const std::int64_t blocks = k_blocks(gemm);
  const std::int64_t passes = (rows.end - rows.begin + kStep - 1) / kStep;
  // A single pass uses nothing twice, and waits for memory anyway.
  constexpr std::int64_t kLinesPerBlock = 2 * kTileBytes / kLineBytes;
  ReadAhead ahead{gemm.weights + (panel + 2) * gemm.panel_bytes,
                  passes == 1 ? 0 : static_cast<int>((kLinesPerBlock + passes - 1) / passes)};
  for (std::int64_t row = rows.begin; row < rows.end; row += kStep) {
    const std::byte* const tiles = left + row / kTileRows * blocks * kTileBytes;
    const std::int64_t num_rows = rows.end - row < kStep ? rows.end - row : kStep;
    if (num_rows > kTileRows) {
      tile_block<true, kTwoPanels>(gemm, tiles, panel, ahead, outputs);
    } else {
      tile_block<false, kTwoPanels>(gemm, tiles, panel, ahead, outputs);
    }
    outputs.put(row, num_rows, panel, kTwoPanels ? 2 : 1);
  }
}

void compute(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels) {
  if (gemm.num_rows <= kTileRows) return few_rows(gemm, prepared, rows, panels);
  const TileConfig config;
  DelayedOutputs outputs(gemm);
  std::int64_t panel = panels.begin;
  for (; panel + 2 <= panels.end; panel += 2) panel_block<true>(gemm, prepared, rows, panel, outputs);
  if (panel < panels.end) panel_block<false>(gemm, prepared, rows, panel, outputs);
  outputs.flush();
}

std::int64_t prepared_bytes(const Gemm& gemm) {
  return (gemm.num_rows + kTileRows - 1) / kTileRows * k_blocks(gemm) * kTileBytes;
}

void prepare(const Gemm& gemm, Range rows, std::byte* prepared) {
  const std::int64_t blocks = k_blocks(gemm);
  const std::int64_t row_bytes = gemm.x_stride * 2;
  for (std::int64_t row = rows.begin; row < rows.end; row += kTileRows) {
    std::byte* to = prepared + row / kTileRows * blocks * kTileBytes;
    const std::byte* const from = gemm.x + row * row_bytes;
    const std::int64_t num_rows = gemm.num_rows - row < kTileRows ? gemm.num_rows - row : kTileRows;
    // A single tile has only the rows there are.
    const std::int64_t padded_rows = gemm.num_rows <= kTileRows ? num_rows : kTileRows;
    for (std::int64_t k = 0; k < blocks; ++k, to += kTileBytes) {
      const std::int64_t left = gemm.in_features - k * kTileDepth;
      const auto mask = static_cast<__mmask32>(left >= kTileDepth ? 0xffffffffU : (1U << left) - 1);
      for (std::int64_t r = 0; r < num_rows; ++r) {
        _mm512_store_si512(to + r * 64, _mm512_maskz_loadu_epi16(mask, from + r * row_bytes + k * kTileDepth * 2));
      }
      for (std::int64_t r = num_rows; r < padded_rows; ++r) _mm512_store_si512(to + r * 64, _mm512_setzero_si512());
    }
  }
}

constexpr GemmKernel kKernel = {&prepared_bytes, &prepare, &compute, 1024};

}  // namespace

const GemmKernel& gemm_amx() { return kKernel; }

}  // namespace folovllm

#endif
