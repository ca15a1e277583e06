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

// The outputs of one block of 32 x 32, a few rows at a step. A copy of it stays in registers, which the asm of the tiles
// would not leave to anything else.
struct OutputRows {
  const float* sums;  // [32][32]
  std::byte* out;
  std::int64_t out_bytes;  // from row to row
  std::int64_t left;
  __mmask32 mask;
  bool is_float;
  __m512 low_bias;
  __m512 high_bias;

  // Fetches lines before they are written.
  void fetch(int num_rows) {
    for (int i = 0; i < num_rows && left > 0; ++i, --left, out += out_bytes) __builtin_prefetch(out, 1);
  }

  void write(int num_rows) {
    for (int i = 0; i < num_rows && left > 0; ++i, --left, sums += 2 * kPanelWidth, out += out_bytes) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sums), low_bias);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + kPanelWidth), high_bias);
      if (is_float) {
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), low);
        _mm512_mask_storeu_ps(out + 64, static_cast<__mmask16>(mask >> 16), high);
      } else {
        _mm512_mask_storeu_epi16(out, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
    }
  }
};

// The sums of a block are written while the next block is computed. Written at once, they would wait for the stores of
// the tiles, and these for the lines of the outputs before.
class DelayedOutputs {
 public:
  static constexpr std::int64_t kBlockRows = 2 * kTileRows;
  static constexpr std::int64_t kStride = 2 * kPanelWidth;

  explicit DelayedOutputs(const Gemm& gemm)
      : rows_per_step(static_cast<int>((kBlockRows + k_blocks(gemm) - 1) / k_blocks(gemm))), gemm_(gemm) {}

  const int rows_per_step;

  // The block before, whose sums are there.
  const OutputRows& waiting() const { return waiting_; }

  // A block to be computed now.
  OutputRows next(std::int64_t row, std::int64_t num_rows, std::int64_t panel, std::int64_t num_panels) const {
    const std::int64_t column = panel * kPanelWidth;
    const std::int64_t left = gemm_.out_features - column;
    const std::int64_t width = num_panels * kPanelWidth;
    const std::int64_t count = left < width ? left : width;
    const __mmask32 mask = count >= 32 ? ~0U : (1U << count) - 1;
    const bool is_float = gemm_.out_dtype == DType::kFloat32;
    const std::int64_t size = is_float ? 4 : 2;
    return {.sums = sums_[next_],
            .out = gemm_.out + (row * gemm_.out_stride + column) * size,
            .out_bytes = gemm_.out_stride * size,
            .left = num_rows,
            .mask = mask,
            .is_float = is_float,
            .low_bias = bias(column, static_cast<__mmask16>(mask)),
            .high_bias = bias(column + kPanelWidth, static_cast<__mmask16>(mask >> 16))};
  }
  float* next_sums() { return sums_[next_]; }

  // It is computed, and the one before is written.
  void put(const OutputRows& block) {
    waiting_ = block;
    next_ ^= 1;
  }

  void flush() { waiting_.write(kBlockRows); }

 private:
  __m512 bias(std::int64_t column, __mmask16 mask) const {
    return gemm_.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, gemm_.bias + column);
  }

  const Gemm& gemm_;
  OutputRows waiting_{};
  int next_ = 0;
  alignas(64) float sums_[2][kBlockRows * kStride] = {};
};

// One or two tiles of rows x one or two panels.
template <bool kTwoRows, bool kTwoPanels>
void tile_block(const Gemm& gemm, const std::byte* left, std::int64_t panel, OutputRows own, ReadAhead& ahead,
                DelayedOutputs& outputs) {
  zero_tile<0>();
  if constexpr (kTwoPanels) zero_tile<1>();
  if constexpr (kTwoRows) zero_tile<2>();
  if constexpr (kTwoRows && kTwoPanels) zero_tile<3>();
  const std::int64_t blocks = k_blocks(gemm);
  const std::byte* lower = left + blocks * kTileBytes;
  const std::byte* right = gemm.weights + panel * gemm.panel_bytes;
  const std::byte* second = right + gemm.panel_bytes;
  const std::byte* const end = right + blocks * kTileBytes;
  const int rows_per_step = outputs.rows_per_step;
  OutputRows before = outputs.waiting();
  ReadAhead coming = ahead;
  for (; right < end; left += kTileBytes, lower += kTileBytes, right += kTileBytes, second += kTileBytes) {
    coming.step();
    own.fetch(rows_per_step);
    before.write(rows_per_step);
    load_tile<6>(left, 64);
    load_tile<4>(right, 64);
    multiply_tiles<0, 6, 4>();
    if constexpr (kTwoPanels) {
      load_tile<5>(second, 64);
      multiply_tiles<1, 6, 5>();
    }
    if constexpr (kTwoRows) {
      load_tile<7>(lower, 64);
      multiply_tiles<2, 7, 4>();
    }
    if constexpr (kTwoRows && kTwoPanels) multiply_tiles<3, 7, 5>();
  }
  ahead = coming;
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
    const OutputRows own = outputs.next(row, num_rows, panel, kTwoPanels ? 2 : 1);
    if (num_rows > kTileRows) {
      tile_block<true, kTwoPanels>(gemm, tiles, panel, own, ahead, outputs);
    } else {
      tile_block<false, kTwoPanels>(gemm, tiles, panel, own, ahead, outputs);
    }
    outputs.put(own);
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
