// Matrix tiles (AMX-BF16). A tile is 16 rows of 64 bytes: of activations 16 rows x 32 k's, of weights 16 pairs of k's x
// 16 outputs (packed_weights.h), of results 16 x 16 floats.
//
//   prepared activations    [row tile][k block][16 rows][32 k's]     rows and k's that do not exist are zero
//
//   gemm_amx_many_rows.h           gemm_amx_few_rows.h
//            W4  W5                         W5 W6 W5 W6
//       A6 | C0  C1                    A4 | C0 C1 C2 C3             Every C adds its k blocks in order.
//       A7 | C2  C3
//
// Two by two tiles do four products for four loads, of which the second level cache serves two without holding up the
// tiles: activations come from there, a stretch of weights stays in the first level, and the next is read ahead.
#if defined(__x86_64__)

#include "gemm_amx_many_rows.h"

namespace folovllm {
namespace {

void compute(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels) {
  const std::int64_t num_tiles = (gemm.num_rows + kTileRows - 1) / kTileRows;
  if (num_tiles == 1 || num_tiles == 3 || num_tiles == 4) return few_rows(gemm, prepared, rows, panels);
  const TileConfig config;
  ManyRows(gemm, prepared, rows).run(panels);
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

constexpr GemmKernel kKernel = {&prepared_bytes, &prepare, &compute, kRowsPerPiece};

}  // namespace

const GemmKernel& gemm_amx() { return kKernel; }

}  // namespace folovllm

#endif
