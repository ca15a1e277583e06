// Quantised panels with matrix tiles. A chunk of up to 16 words of K is looked up as bf16 integers (as in
// quantized_kernel_avx512_bf16.cpp), multiplied, and its sums are scaled and added in fp32:
//
//   words of 64 columns --look up--> right tiles [4 x 16 columns][tile][16 pairs of k][2] --+
//                                                                                           |
//   rows of x --prepare--> left tiles [row tile][tile][16 rows][16 pairs of k][2] ----------+--> sums
//
//   out += scale * (sums - zero * sum of x)
//
// A word gives four lines of a right tile: 4-bit weights its four pairs, 8-bit weights each of its two pairs as a low
// and a high nibble, for which the left tiles have that pair twice. Each row keeps its own order of additions, the
// chunks', whatever rows there are beside it.
#include "quantized_layout.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "amx_tiles.h"
#include "quantized_tables.h"

#define FOLOVLLM_INLINE __attribute__((always_inline)) inline

namespace folovllm::quantized {
namespace {

#include "quantized_vector_avx512_inl.h"

constexpr std::int64_t kWordsPerTile = 4;
constexpr std::int64_t kChunkWords = 16;
constexpr std::int64_t kChunkTiles = kChunkWords / kWordsPerTile;
constexpr int kStrips = kPanelColumns / 16;

// Words of one group, and where their left tiles are.
struct Chunk {
  std::int64_t group;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t first_tile;
  bool begins_group;

  std::int64_t num_tiles() const { return (end - begin + kWordsPerTile - 1) / kWordsPerTile; }
};

template <typename F>
FOLOVLLM_INLINE void for_chunks(const Shape& shape, F&& function) {
  std::int64_t tile = 0;
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    const std::int64_t first = group * shape.group_words;
    const std::int64_t last = first + shape.group_words < shape.num_words ? first + shape.group_words : shape.num_words;
    for (std::int64_t begin = first; begin < last; begin += kChunkWords) {
      const std::int64_t end = begin + kChunkWords < last ? begin + kChunkWords : last;
      const Chunk chunk{group, begin, end, tile, begin == first};
      function(chunk);
      tile += chunk.num_tiles();
    }
  }
}

std::int64_t num_tiles(const Shape& shape) {
  std::int64_t tiles = 0;
  for_chunks(shape, [&](const Chunk& chunk) { tiles += chunk.num_tiles(); });
  return tiles;
}

// -- left: rows of x --------------------------------------------------------------------------------------------------

// The pairs of k of `count` words of a row, as lines of one tile have them; what is behind them is zero.
FOLOVLLM_INLINE __m512i load_pairs(const Shape& shape, const std::uint16_t* x, std::int64_t word, std::int64_t count) {
  if (shape.bits == 4) {
    const auto mask = static_cast<__mmask16>((1U << (count * 4)) - 1);
    return _mm512_maskz_loadu_epi32(mask, x + word * 8);
  }
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const auto mask = static_cast<__mmask16>((1U << (count * 2)) - 1);
  return _mm512_permutexvar_epi32(twice, _mm512_maskz_loadu_epi32(mask, x + word * 4));
}

void prepare_row(const Shape& shape, const std::uint16_t* x, std::byte* to, float* sums) {
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  const float share = shape.bits == 4 ? 1.0F : 0.5F;
  __m512 sum = _mm512_setzero_ps();
  for_chunks(shape, [&](const Chunk& chunk) {
    if (chunk.begins_group) sum = _mm512_setzero_ps();
    for (std::int64_t tile = 0; tile < chunk.num_tiles(); ++tile) {
      const std::int64_t word = chunk.begin + tile * kWordsPerTile;
      const std::int64_t count = chunk.end - word < kWordsPerTile ? chunk.end - word : kWordsPerTile;
      const __m512i pairs = load_pairs(shape, x, word, count);
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), ones);
      _mm512_storeu_si512(to + (chunk.first_tile + tile) * kTileBytes, pairs);
    }
    sums[chunk.group] = _mm512_reduce_add_ps(sum) * share;
  });
}

// -- right: weights ---------------------------------------------------------------------------------------------------

struct alignas(64) RightTiles {
  std::byte tile[kStrips][kChunkTiles][kTileBytes];
};

// Tile number `tile` of each strip of a chunk.
template <int kBits>
FOLOVLLM_INLINE void look_up(const Panel& panel, const Chunk& chunk, std::int64_t tile, RightTiles& right) {
  constexpr std::int64_t kAhead = kChunkWords * kPanelColumns;
  const __m512i low = _mm512_load_si512(kBits == 4 ? kInt4Bf16 : kInt8LowBf16);
  const __m512i high = kBits == 4 ? low : _mm512_load_si512(kInt8HighBf16);
  for (std::int64_t i = 0; i < kWordsPerTile; ++i) {
    const std::int64_t word = chunk.begin + tile * kWordsPerTile + i;
    const std::uint32_t* const words = panel.weights + word * kPanelColumns;
    for (int strip = 0; strip < kStrips; ++strip) {
      std::byte* const line = right.tile[strip][tile] + i * 4 * 64;
      if (word >= chunk.end) {
        for (int j = 0; j < 4; ++j) _mm512_store_si512(line + j * 64, _mm512_setzero_si512());
        continue;
      }
      const __m512i packed = _mm512_loadu_si512(words + strip * 16);
      // Into the second level: misses of the first are few at a time, and these would take them all.
      _mm_prefetch(words + kAhead + strip * 16, _MM_HINT_T1);
      _mm512_store_si512(line, _mm512_permutexvar_epi16(packed, low));
      _mm512_store_si512(line + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), high));
      _mm512_store_si512(line + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), low));
      _mm512_store_si512(line + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), high));
    }
  }
}

// -- sums -------------------------------------------------------------------------------------------------------------

// Sums of a row tile over a chunk. They are scaled and added while the next ones are computed: right after the tiles
// were stored, loads would wait for them.
class DelayedSums {
 public:
  DelayedSums(const Shape& shape, const Panel& panel, const Rows& rows, float* out)
      : shape_(shape), panel_(panel), rows_(rows), out_(out) {}

  float* next() { return sums_[next_]; }

  void put(const Chunk& chunk, std::int64_t row, std::int64_t num_rows) {
    at_ = sums_[next_];
    next_ ^= 1;
    chunk_ = chunk;
    row_ = row;
    num_rows_ = num_rows;
  }

  FOLOVLLM_INLINE void flush() {
    if (num_rows_ == 0) return;
    const std::int64_t index = chunk_.group * kPanelColumns;
    __m512 scale[kStrips];
    __m512 zero[kStrips];
    for (int strip = 0; strip < kStrips; ++strip) {
      const std::int64_t at = index + strip * 16;
      scale[strip] = Vector::scales(panel_.scales + at * scale_bytes(shape_.scale_type), shape_.scale_type);
      zero[strip] = panel_.zeros != nullptr ? Vector::zeros(panel_.zeros + at) : _mm512_setzero_ps();
    }
    for (std::int64_t r = 0; r < num_rows_; ++r) {
      float* const out = out_ + (row_ + r) * kPanelColumns;
      const float of_x = chunk_.begins_group ? rows_.sums[(row_ + r) * shape_.num_groups + chunk_.group] : 0.0F;
      for (int strip = 0; strip < kStrips; ++strip) {
        __m512 sum = _mm512_load_ps(at_ + r * kPanelColumns + strip * 16);
        sum = _mm512_fnmadd_ps(zero[strip], _mm512_set1_ps(of_x), sum);
        _mm512_storeu_ps(out + strip * 16, _mm512_fmadd_ps(sum, scale[strip], _mm512_loadu_ps(out + strip * 16)));
      }
    }
    num_rows_ = 0;
  }

 private:
  const Shape& shape_;
  const Panel& panel_;
  const Rows& rows_;
  float* const out_;
  Chunk chunk_{};
  std::int64_t row_ = 0;
  std::int64_t num_rows_ = 0;
  const float* at_ = nullptr;
  int next_ = 0;
  alignas(64) float sums_[2][kTileRows * kPanelColumns];
};

FOLOVLLM_INLINE void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}

FOLOVLLM_INLINE void multiply(const std::byte* left, const RightTiles& right, std::int64_t tile) {
  load_tile<4>(left, 64);
  load_tile<5>(right.tile[0][tile], 64);
  multiply_tiles<0, 4, 5>();
  load_tile<6>(right.tile[1][tile], 64);
  multiply_tiles<1, 4, 6>();
  load_tile<5>(right.tile[2][tile], 64);
  multiply_tiles<2, 4, 5>();
  load_tile<6>(right.tile[3][tile], 64);
  multiply_tiles<3, 4, 6>();
}

FOLOVLLM_INLINE void store_sums(float* sums) {
  constexpr std::int64_t kStride = kPanelColumns * 4;
  store_tile<0>(sums, kStride);
  store_tile<1>(sums + 16, kStride);
  store_tile<2>(sums + 32, kStride);
  store_tile<3>(sums + 48, kStride);
}

template <int kBits>
void run_panel(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  const auto* const prepared = static_cast<const std::byte*>(rows.x);
  const std::int64_t row_tile_bytes = num_tiles(shape) * kTileBytes;
  // Rows that do not exist are whatever the memory holds: they reach no other row, and nobody reads them.
  const TileConfig config(rows.num_rows < kTileRows ? rows.num_rows : kTileRows, 0b0001'1111);
  for (std::int64_t i = 0; i < rows.num_rows * kPanelColumns; ++i) out[i] = 0;
  DelayedSums sums(shape, panel, rows, out);
  const auto add = [&](const Chunk& chunk, std::int64_t row) {
    sums.flush();
    store_sums(sums.next());
    sums.put(chunk, row, rows.num_rows - row < kTileRows ? rows.num_rows - row : kTileRows);
  };
  RightTiles right;
  for_chunks(shape, [&](const Chunk& chunk) {
    const std::byte* left = prepared + chunk.first_tile * kTileBytes;
    const std::int64_t tiles = chunk.num_tiles();
    zero_sums();
    // A tile is multiplied while the next one is looked up.
    look_up<kBits>(panel, chunk, 0, right);
    for (std::int64_t tile = 1; tile < tiles; ++tile) {
      look_up<kBits>(panel, chunk, tile, right);
      multiply(left + (tile - 1) * kTileBytes, right, tile - 1);
    }
    multiply(left + (tiles - 1) * kTileBytes, right, tiles - 1);
    add(chunk, 0);
    for (std::int64_t row = kTileRows; row < rows.num_rows; row += kTileRows) {
      left += row_tile_bytes;
      zero_sums();
      for (std::int64_t tile = 0; tile < tiles; ++tile) multiply(left + tile * kTileBytes, right, tile);
      add(chunk, row);
    }
  });
  sums.flush();
}

}  // namespace

std::int64_t amx_prepared_bytes(const Shape& shape, std::int64_t num_rows) {
  return (num_rows + kTileRows - 1) / kTileRows * num_tiles(shape) * kTileBytes;
}

void amx_prepare(const Shape& shape, const std::uint16_t* x, std::int64_t x_stride, std::int64_t begin, std::int64_t end,
                 std::byte* prepared, float* sums) {
  const std::int64_t row_tile_bytes = num_tiles(shape) * kTileBytes;
  for (std::int64_t row = begin; row < end; ++row) {
    prepare_row(shape, x + row * x_stride, prepared + row / kTileRows * row_tile_bytes + row % kTileRows * 64,
                sums + row * shape.num_groups);
  }
}

void run_panel_amx(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  if (shape.bits == 4) {
    run_panel<4>(shape, panel, rows, out);
  } else {
    run_panel<8>(shape, panel, rows, out);
  }
}

}  // namespace folovllm::quantized

#else

namespace folovllm::quantized {
std::int64_t amx_prepared_bytes(const Shape&, std::int64_t) { __builtin_unreachable(); }
void amx_prepare(const Shape&, const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, std::byte*, float*) {
  __builtin_unreachable();
}
void run_panel_amx(const Shape&, const Panel&, const Rows&, float*) { __builtin_unreachable(); }
}  // namespace folovllm::quantized

#endif
