// Matrix tiles (AMX-BF16): eight registers of 16 rows x 64 bytes, for files compiled for AVX-512 at least.
#pragma once

#include <cstdint>

namespace folovllm {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileBytes = 1024;

// Written here because the intrinsics of gcc do not say that they read memory, so stores before them may be lost.
template <int kTile>
void load_tile(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
void store_tile(void* to, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kSum, int kLeft, int kRight>
void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// The shapes of this thread's tiles, until the end of a piece of work.
class TileConfig {
 public:
  // Tiles whose bit is set in `short_tiles` have `num_rows` rows, the others 16.
  explicit TileConfig(std::int64_t num_rows = kTileRows, unsigned short_tiles = 0) {
    struct alignas(64) Layout {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t num_rows[16] = {};
    } layout;
    for (unsigned tile = 0; tile < 8; ++tile) {
      layout.row_bytes[tile] = 64;
      layout.num_rows[tile] = static_cast<std::uint8_t>((short_tiles >> tile & 1U) != 0 ? num_rows : kTileRows);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(layout) : "memory");
  }
  ~TileConfig() { __asm__ volatile("tilerelease"); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

}  // namespace
}  // namespace folovllm
