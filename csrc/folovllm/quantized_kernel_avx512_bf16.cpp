// Quantised panels with AVX512-BF16: nibbles become bf16 by one table look-up (vpermw), and pairs of them go into dot
// products that accumulate in fp32. A look-up's index is the low 5 bits of a half word, so a table of 16 values stands
// there twice and the nibble above need not be masked off. 8-bit weights are two nibbles with a table each.
#include "quantized_layout.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "quantized_tables.h"

#define FOLOVLLM_ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,fma")))
#define FOLOVLLM_INLINE FOLOVLLM_ISA __attribute__((always_inline)) inline

namespace folovllm::quantized {
namespace {

#include "quantized_vector_avx512_inl.h"

// With conversions to bf16 of its own.
struct Bf16Vector : Vector {
  FOLOVLLM_INLINE static void store_pairs(std::uint16_t* address, Value even, Value odd) {
    alignas(64) static constexpr std::uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                                  21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even ones below
    _mm512_storeu_si512(address, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
  }
};

#include "quantized_dequantize_inl.h"

constexpr int kVectorColumns = 16;

struct Tables {
  __m512i low;
  __m512i high;
};

// One group of ROWS rows by VECTORS x 16 columns from column `first` on, added to `out`.
template <int BITS, int ROWS, int VECTORS>
FOLOVLLM_ISA void run_group(
    const Shape& shape, const Panel& panel, const Rows& rows, const Tables& tables, std::int64_t group, int first,
    float* out) {
  constexpr int kWordPairs = BITS == 4 ? 4 : 2;  // pairs of K in a word
  const std::int64_t begin = group * shape.group_words;
  const std::int64_t end = begin + shape.group_words < shape.num_words ? begin + shape.group_words : shape.num_words;
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  // A pair of bf16 inputs is one 32-bit element.
  const auto* x = static_cast<const std::byte*>(rows.x) + begin * kWordPairs * 4;
  const std::int64_t stride = rows.x_stride * 2;
  const std::uint32_t* words = panel.weights + begin * kPanelColumns + first;
  const __m512i low = tables.low;
  const __m512i high = BITS == 4 ? low : tables.high;
  for (std::int64_t word = begin; word < end; ++word, words += kPanelColumns, x += kWordPairs * 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int pair = BITS == 4 ? j : j / 2;
      __m512bh weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        // A load one byte further on is a shift by 8, of which the load ports have more to give.
        const auto* const bytes = reinterpret_cast<const std::byte*>(words + v * kVectorColumns) + j / 2;
        const __m512i packed = _mm512_loadu_si512(bytes);
        const __m512i index = j % 2 == 0 ? packed : _mm512_srli_epi16(packed, 4);
        weights[v] = (__m512bh)_mm512_permutexvar_epi16(index, BITS == 8 && j % 2 == 1 ? high : low);
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        std::int32_t input;
        __builtin_memcpy(&input, x + r * stride + pair * 4, sizeof(input));
        const auto inputs = (__m512bh)_mm512_set1_epi32(input);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], weights[v], inputs);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const std::int64_t index = group * kPanelColumns + first + v * kVectorColumns;
    const __m512 scale = Vector::scales(panel.scales + index * scale_bytes(shape.scale_type), shape.scale_type);
    const __m512 zero = panel.zeros != nullptr ? Vector::zeros(panel.zeros + index) : _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      float* target = out + r * kPanelColumns + first + v * kVectorColumns;
      __m512 sum = sums[r][v];
      if (panel.zeros != nullptr) {
        sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(rows.sums[r * shape.num_groups + group]), sum);
      }
      _mm512_storeu_ps(target, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(target)));
    }
  }
}

template <int BITS, int ROWS>
FOLOVLLM_ISA void run_rows(
    const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  constexpr int kVectors = ROWS <= 6 ? 4 : 2;  // at most 24 sums leave room for the tables and some weights
  const Tables tables{_mm512_load_si512(BITS == 4 ? kInt4Bf16 : kInt8LowBf16), _mm512_load_si512(kInt8HighBf16)};
  for (std::int64_t i = 0; i < ROWS * kPanelColumns; ++i) out[i] = 0;
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    for (int first = 0; first < kPanelColumns; first += kVectors * kVectorColumns) {
      run_group<BITS, ROWS, kVectors>(shape, panel, rows, tables, group, first, out);
    }
  }
}

}  // namespace

void run_panel_avx512_bf16(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  static constexpr KernelsByRows<1, 2, 3, 4, 6, 8, 12> kInt4([]<int ROWS> { return &run_rows<4, ROWS>; });
  static constexpr KernelsByRows<1, 2, 3, 4, 6, 8, 12> kInt8([]<int ROWS> { return &run_rows<8, ROWS>; });
  run_by_rows(shape.bits == 4 ? kInt4 : kInt8, 2, shape, panel, rows, out);
}

void dequantize_avx512_bf16(const Shape& shape, const Panel& panel, std::uint16_t* out) {
  dequantize_panel<Bf16Vector>(shape, panel, out);
}

}  // namespace folovllm::quantized

#else

namespace folovllm::quantized {
void run_panel_avx512_bf16(const Shape&, const Panel&, const Rows&, float*) { __builtin_unreachable(); }
void dequantize_avx512_bf16(const Shape&, const Panel&, std::uint16_t*) { __builtin_unreachable(); }
}  // namespace folovllm::quantized

#endif
