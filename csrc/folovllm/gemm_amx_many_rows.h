// More than 64 rows with matrix tiles, for gemm_amx.cpp. Included by it alone: everything is local to it.
#pragma once

#include "gemm_amx_few_rows.h"

namespace folovllm {
namespace {

// What will be wanted next is fetched a few lines at a step, evenly over all steps.
struct ReadAhead {
  const std::byte* first;
  const std::byte* second;
  int lines_per_step;
  std::int64_t bytes_per_step;

  void step() {
    for (int line = 0; line < lines_per_step; ++line) {
      _mm_prefetch(first + line * kLineBytes, _MM_HINT_T1);
      _mm_prefetch(second + line * kLineBytes, _MM_HINT_T1);
    }
    first += bytes_per_step;
    second += bytes_per_step;
  }
};

// Sums of 32 rows x 32 outputs, row by row.
constexpr std::int64_t kBlockRows = 2 * kTileRows;
constexpr std::int64_t kSumsStride = 2 * kPanelWidth;
constexpr std::int64_t kSumsBytes = kSumsStride * 4;
constexpr std::int64_t kLowerSums = kTileRows * kSumsStride;
constexpr std::int64_t kBlockFloats = kBlockRows * kSumsStride;

enum class Store {
  kFloats,
  kHalves,
  // Around the caches, whole lines only: outputs that no cache would hold until they are read need not be fetched to be
  // written, and leave the caches to weights and activations.
  kStreamedHalves,
};

// The outputs of one block of 32 x 32, a few rows at a step. A copy of it stays in registers, which the asm of the tiles
// would not leave to anything else.
struct OutputRows {
  const float* sums;
  std::byte* out;
  std::int64_t out_bytes;  // from row to row
  std::int64_t left;
  Store store;
  __mmask32 mask;
  __m512 low_bias;
  __m512 high_bias;

  void write(int num_rows) {
    switch (store) {
      case Store::kFloats: return write_rows<Store::kFloats>(num_rows);
      case Store::kHalves: return write_rows<Store::kHalves>(num_rows);
      case Store::kStreamedHalves: return write_rows<Store::kStreamedHalves>(num_rows);
    }
  }

 private:
  template <Store kStore>
  void write_rows(int num_rows) {
    for (int i = 0; i < num_rows && left > 0; ++i, --left, sums += kSumsStride, out += out_bytes) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sums), low_bias);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + kPanelWidth), high_bias);
      if constexpr (kStore == Store::kFloats) {
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), low);
        _mm512_mask_storeu_ps(out + 64, static_cast<__mmask16>(mask >> 16), high);
        continue;
      }
      const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      if constexpr (kStore == Store::kHalves) _mm512_mask_storeu_epi16(out, mask, halves);
      if constexpr (kStore == Store::kStreamedHalves) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), halves);
    }
  }
};

// The k blocks of a piece in stretches. That of two panels stays in the first level cache while all rows of the piece pass,
// and their sums wait in the second. A single pass of rows uses nothing twice, and has one stretch.
struct Stretches {
  static constexpr std::int64_t kMostBlocks = 8;

  Stretches(std::int64_t num_blocks, std::int64_t num_passes)
      : blocks(num_blocks), count(num_passes == 1 ? 1 : (num_blocks + kMostBlocks - 1) / kMostBlocks) {}

  std::int64_t begin(std::int64_t stretch) const { return blocks * stretch / count; }
  // How many rows of a block's outputs are written at each step of even the shortest stretch.
  int rows_per_step() const {
    const std::int64_t shortest = blocks / count;
    return static_cast<int>((kBlockRows + shortest - 1) / shortest);
  }

  std::int64_t blocks;
  std::int64_t count;
};

// One pass of a stretch: up to 32 rows x one or two panels.
struct Pass {
  const std::byte* upper;
  const std::byte* lower;
  const std::byte* first;
  const std::byte* second;
  std::int64_t bytes;  // of the stretch in each of them
  float* sums;
  bool begins;  // no sums yet
};

template <bool kTwoRows, bool kTwoPanels>
void begin_pass(const Pass& pass) {
  if (pass.begins) {
    zero_tile<0>();
    if constexpr (kTwoPanels) zero_tile<1>();
    if constexpr (kTwoRows) zero_tile<2>();
    if constexpr (kTwoRows && kTwoPanels) zero_tile<3>();
    return;
  }
  load_tile<0>(pass.sums, kSumsBytes);
  if constexpr (kTwoPanels) load_tile<1>(pass.sums + kPanelWidth, kSumsBytes);
  if constexpr (kTwoRows) load_tile<2>(pass.sums + kLowerSums, kSumsBytes);
  if constexpr (kTwoRows && kTwoPanels) load_tile<3>(pass.sums + kLowerSums + kPanelWidth, kSumsBytes);
}

// Computes the sums of `pass` and writes the outputs of the pass before, which at once would wait for the stores of tiles.
template <bool kTwoRows, bool kTwoPanels>
void run_pass(const Pass& pass, int rows_per_step, OutputRows before, ReadAhead& ahead) {
  begin_pass<kTwoRows, kTwoPanels>(pass);
  ReadAhead coming = ahead;
  for (std::int64_t at = 0; at < pass.bytes; at += kTileBytes) {
    coming.step();
    before.write(rows_per_step);
    load_tile<6>(pass.upper + at, 64);
    load_tile<4>(pass.first + at, 64);
    multiply_tiles<0, 6, 4>();
    if constexpr (kTwoPanels) {
      load_tile<5>(pass.second + at, 64);
      multiply_tiles<1, 6, 5>();
    }
    if constexpr (kTwoRows) {
      load_tile<7>(pass.lower + at, 64);
      multiply_tiles<2, 7, 4>();
    }
    if constexpr (kTwoRows && kTwoPanels) multiply_tiles<3, 7, 5>();
  }
  ahead = coming;
  store_tile<0>(pass.sums, kSumsBytes);
  if constexpr (kTwoPanels) store_tile<1>(pass.sums + kPanelWidth, kSumsBytes);
  if constexpr (kTwoRows) store_tile<2>(pass.sums + kLowerSums, kSumsBytes);
  if constexpr (kTwoRows && kTwoPanels) store_tile<3>(pass.sums + kLowerSums + kPanelWidth, kSumsBytes);
}

constexpr std::int64_t kRowsPerPiece = 256;
// As much as a second level cache holds.
constexpr std::int64_t kStreamedBytes = 1 << 20;

// Some rows over some panels, two panels at a time.
class ManyRows {
 public:
  ManyRows(const Gemm& gemm, const std::byte* prepared, Range rows)
      : gemm_(gemm),
        prepared_(prepared),
        rows_(rows),
        num_passes_((rows.end - rows.begin + kBlockRows - 1) / kBlockRows),
        stretches_(k_blocks(gemm), num_passes_) {}

  void run(Range panels) {
    std::int64_t panel = panels.begin;
    for (; panel + 2 <= panels.end; panel += 2) run_panels<true>(panel);
    if (panel < panels.end) run_panels<false>(panel);
    waiting_.write(kBlockRows);
    _mm_sfence();
  }

 private:
  template <bool kTwoPanels>
  void run_panels(std::int64_t panel) {
    const std::byte* const first = gemm_.weights + panel * gemm_.panel_bytes;
    for (std::int64_t stretch = 0; stretch < stretches_.count; ++stretch) {
      const bool ends = stretch + 1 == stretches_.count;
      ReadAhead ahead = read_ahead(first, stretch);
      for (std::int64_t pass = 0; pass < num_passes_; ++pass) {
        const std::int64_t num_rows = rows_in(pass);
        const OutputRows own = ends ? outputs(pass, num_rows, panel, kTwoPanels ? 2 : 1) : OutputRows{};
        const Pass work = pass_of(pass, first, stretch);
        if (num_rows > kTileRows) {
          run_pass<true, kTwoPanels>(work, rows_per_step_, waiting_, ahead);
        } else {
          run_pass<false, kTwoPanels>(work, rows_per_step_, waiting_, ahead);
        }
        waiting_ = own;
      }
    }
  }

  // Fetches the stretch after this one. A single pass uses nothing twice, and waits for memory anyway: processors that
  // follow two streams by themselves are helped by half of the lines.
  ReadAhead read_ahead(const std::byte* first, std::int64_t stretch) const {
    if (num_passes_ == 1) {
      constexpr std::int64_t kDistance = 8 << 10;
      const std::byte* const coming = first + kDistance;
      return {coming, coming + gemm_.panel_bytes, kTileBytes / kLineBytes / 2, kTileBytes};
    }
    const bool ends = stretch + 1 == stretches_.count;
    const std::byte* const next = first + (ends ? 2 * gemm_.panel_bytes : stretches_.begin(stretch + 1) * kTileBytes);
    const std::int64_t lines = (kTileBytes / kLineBytes + num_passes_ - 1) / num_passes_;
    return {next, next + gemm_.panel_bytes, static_cast<int>(lines), lines * kLineBytes};
  }

  std::int64_t rows_in(std::int64_t pass) const {
    const std::int64_t left = rows_.end - rows_.begin - pass * kBlockRows;
    return left < kBlockRows ? left : kBlockRows;
  }

  Pass pass_of(std::int64_t pass, const std::byte* first, std::int64_t stretch) {
    const std::int64_t tile_row_bytes = stretches_.blocks * kTileBytes;
    const std::int64_t begin = stretches_.begin(stretch) * kTileBytes;
    const std::byte* const upper = prepared_ + (rows_.begin / kTileRows + 2 * pass) * tile_row_bytes + begin;
    // Sums that nobody adds to stay near.
    const std::int64_t block = stretches_.count > 1 ? pass : next_++ % 2;
    return {.upper = upper,
            .lower = upper + tile_row_bytes,
            .first = first + begin,
            .second = first + gemm_.panel_bytes + begin,
            .bytes = stretches_.begin(stretch + 1) * kTileBytes - begin,
            .sums = sums_ + block * kBlockFloats,
            .begins = stretch == 0};
  }

  OutputRows outputs(std::int64_t pass, std::int64_t num_rows, std::int64_t panel, std::int64_t num_panels) const {
    const std::int64_t column = panel * kPanelWidth;
    const std::int64_t left = gemm_.out_features - column;
    const std::int64_t width = num_panels * kPanelWidth;
    const std::int64_t count = left < width ? left : width;
    const __mmask32 mask = count >= 32 ? ~0U : (1U << count) - 1;
    const std::int64_t size = gemm_.out_dtype == DType::kFloat32 ? 4 : 2;
    const std::int64_t row = rows_.begin + pass * kBlockRows;
    return {.sums = sums_ + (stretches_.count > 1 ? pass : next_ % 2) * kBlockFloats,
            .out = gemm_.out + (row * gemm_.out_stride + column) * size,
            .out_bytes = gemm_.out_stride * size,
            .left = num_rows,
            .store = store_ == Store::kStreamedHalves && count < 2 * kPanelWidth ? Store::kHalves : store_,
            .mask = mask,
            .low_bias = bias(column, static_cast<__mmask16>(mask)),
            .high_bias = bias(column + kPanelWidth, static_cast<__mmask16>(mask >> 16))};
  }

  __m512 bias(std::int64_t column, __mmask16 mask) const {
    return gemm_.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, gemm_.bias + column);
  }

  static Store store_of(const Gemm& gemm) {
    if (gemm.out_dtype == DType::kFloat32) return Store::kFloats;
    const std::int64_t row_bytes = gemm.out_stride * 2;
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(gemm.out) % kLineBytes == 0 && row_bytes % kLineBytes == 0;
    return is_aligned && gemm.num_rows * row_bytes >= kStreamedBytes ? Store::kStreamedHalves : Store::kHalves;
  }

  const Gemm& gemm_;
  const Store store_ = store_of(gemm_);
  const std::byte* const prepared_;
  const Range rows_;
  const std::int64_t num_passes_;
  const Stretches stretches_;
  const int rows_per_step_ = stretches_.rows_per_step();
  OutputRows waiting_{};
  std::int64_t next_ = 0;
  alignas(64) float sums_[kRowsPerPiece / kBlockRows * kBlockFloats];
};

}  // namespace
}  // namespace folovllm
