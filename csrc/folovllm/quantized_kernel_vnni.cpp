// One row of a quantised layer in integers (AVX512-VNNI). Its bf16 inputs become 16-bit integers, one scale per group, in
// two signed bytes each, so that four products are one instruction and weights need no look-up:
//
//   x[k] = scale * (256 * high[k] + low[k])          within 2^-16 of the group's largest: far below bf16's own rounding
//
//   word of a column   | k7 k5 | k3 k1 | k6 k4 | k2 k0 |      bytes of two nibbles (quantized_layout.h)
//   x & 0x0f0f0f0f     |  k5   |  k1   |  k4   |  k0   |  x  (x[0], x[4], x[1], x[5])
//   x >> 4, the same   |  k7   |  k3   |  k6   |  k2   |  x  (x[2], x[6], x[3], x[7])
//
// Within a group nothing is rounded. 8-bit weights are (k0, k2, k1, k3) as they stand.
#include "quantized_layout.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "quantized_tables.h"

#define FOLOVLLM_ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")))
#define FOLOVLLM_INLINE FOLOVLLM_ISA __attribute__((always_inline)) inline

namespace folovllm::quantized {
namespace {

#include "quantized_vector_avx512_inl.h"

constexpr int kVectorColumns = 16;
constexpr int kVectors = kPanelColumns / kVectorColumns;
constexpr float kLargest = 127 * 256 + 127;

FOLOVLLM_INLINE __m512 wide(const std::uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

FOLOVLLM_INLINE __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

template <int BITS>
FOLOVLLM_ISA void run_row(const Shape& shape, const Panel& panel, const SplitRow& row, float* out) {
  constexpr int kParts = BITS == 4 ? 2 : 1;  // of a word
  constexpr std::int64_t kAhead = 16 * kPanelColumns;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = _mm512_setzero_ps();
  const std::uint32_t* words = panel.weights;
  const std::int32_t* high = row.high;
  const std::int32_t* low = row.low;
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    const std::int64_t begin = group * shape.group_words;
    const std::int64_t end = begin + shape.group_words < shape.num_words ? begin + shape.group_words : shape.num_words;
    __m512i high_sums[kVectors];
    __m512i low_sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) high_sums[v] = low_sums[v] = _mm512_setzero_si512();
    for (std::int64_t word = begin; word < end; ++word, words += kPanelColumns, high += kParts, low += kParts) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        _mm_prefetch(words + kAhead + v * kVectorColumns, _MM_HINT_T0);
        const __m512i packed = _mm512_loadu_si512(words + v * kVectorColumns);
        const __m512i first = BITS == 4 ? _mm512_and_si512(packed, nibble) : packed;
        high_sums[v] = _mm512_dpbusd_epi32(high_sums[v], first, _mm512_set1_epi32(high[0]));
        low_sums[v] = _mm512_dpbusd_epi32(low_sums[v], first, _mm512_set1_epi32(low[0]));
        if constexpr (BITS == 4) {
          const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
          high_sums[v] = _mm512_dpbusd_epi32(high_sums[v], second, _mm512_set1_epi32(high[1]));
          low_sums[v] = _mm512_dpbusd_epi32(low_sums[v], second, _mm512_set1_epi32(low[1]));
        }
      }
    }
    const __m512i sum = _mm512_set1_epi32(row.sums[group]);
    const __m512 row_scale = _mm512_set1_ps(row.scales[group]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t index = group * kPanelColumns + v * kVectorColumns;
      const __m512 scale = Vector::scales(panel.scales + index * scale_bytes(shape.scale_type), shape.scale_type);
      __m512i zero = _mm512_set1_epi32(1 << (BITS - 1));
      if (panel.zeros != nullptr) {
        const auto* const zeros = reinterpret_cast<const __m128i*>(panel.zeros + index);
        zero = _mm512_add_epi32(zero, _mm512_cvtepi8_epi32(_mm_loadu_si128(zeros)));
      }
      const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high_sums[v], 8), low_sums[v]);
      const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_mullo_epi32(zero, sum)));
      total[v] = _mm512_fmadd_ps(value, _mm512_mul_ps(scale, row_scale), total[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + v * kVectorColumns, total[v]);
}

// Bytes of 16 k's as words take them.
template <int BITS>
FOLOVLLM_INLINE __m128i in_word_order(__m128i bytes) {
  const __m128i order = BITS == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                  : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  return _mm_shuffle_epi8(bytes, order);
}

template <int BITS>
FOLOVLLM_ISA bool split(const Shape& shape, const std::uint16_t* x, std::int64_t depth, const SplitRow& row) {
  const std::int64_t group_depth = shape.group_words * (32 / BITS);
  auto* high = reinterpret_cast<std::int8_t*>(row.high);
  auto* low = reinterpret_cast<std::int8_t*>(row.low);
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    const std::int64_t begin = group * group_depth;
    const std::int64_t count = depth - begin < group_depth ? depth - begin : group_depth;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 is_odd = 0;  // infinite, or not a number
    for (std::int64_t k = 0; k < count; k += 16) {
      const __m512 values = wide(x + begin + k, first_lanes(count - k));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
      is_odd |= _mm512_fpclass_ps_mask(values, 0x99);
    }
    if (is_odd != 0) return false;
    const float most = _mm512_reduce_max_ps(largest);
    // So small that the inverse would not be finite: as good as zero beside anything else.
    const float inverse = most > 1e-30F ? kLargest / most : 0.0F;
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t k = 0; k < count; k += 16) {
      const __m512 values = wide(x + begin + k, first_lanes(count - k));
      const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(inverse)));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
      const __m512i lower = _mm512_sub_epi32(integers, _mm512_slli_epi32(upper, 8));
      sum = _mm512_add_epi32(sum, integers);
      const __m128i high_bytes = in_word_order<BITS>(_mm512_cvtepi32_epi8(upper));
      const __m128i low_bytes = in_word_order<BITS>(_mm512_cvtepi32_epi8(lower));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + begin + k), high_bytes);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + begin + k), low_bytes);
    }
    row.scales[group] = most > 1e-30F ? most / kLargest : 0.0F;
    row.sums[group] = _mm512_reduce_add_epi32(sum);
  }
  return true;
}

}  // namespace

bool can_split_row(const Shape& shape) {
  const std::int64_t group_depth = shape.group_words * (32 / shape.bits);
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  // Writes are of 16 k's.
  return __builtin_cpu_supports("avx512vnni") != 0 && group_depth % 16 == 0 &&
         group_depth * ((1 << shape.bits) - 1) * (1 << 15) < kMost;
}

bool split_row(const Shape& shape, const std::uint16_t* x, std::int64_t depth, const SplitRow& row) {
  return shape.bits == 4 ? split<4>(shape, x, depth, row) : split<8>(shape, x, depth, row);
}

void run_split_row(const Shape& shape, const Panel& panel, const SplitRow& row, float* out) {
  shape.bits == 4 ? run_row<4>(shape, panel, row, out) : run_row<8>(shape, panel, row, out);
}

}  // namespace folovllm::quantized

#else

namespace folovllm::quantized {
bool can_split_row(const Shape&) { return false; }
bool split_row(const Shape&, const std::uint16_t*, std::int64_t, const SplitRow&) { __builtin_unreachable(); }
void run_split_row(const Shape&, const Panel&, const SplitRow&, float*) { __builtin_unreachable(); }
}  // namespace folovllm::quantized

#endif
