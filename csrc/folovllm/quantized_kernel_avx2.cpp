// Quantised panels with AVX2 in fp32.
#include "quantized_layout.h"
#include "quantized_tables.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLOVLLM_ISA __attribute__((target("avx2,f16c,fma")))
#define FOLOVLLM_INLINE FOLOVLLM_ISA __attribute__((always_inline)) inline

namespace folovllm::quantized {
namespace {

struct Vector {
  using Value = __m256;
  static constexpr int kWidth = 8;
  using RowCounts = KernelsByRows<1, 2, 3, 4, 6>;  // 12 sums of 16 registers
  static constexpr int kFewRows = 3;

  FOLOVLLM_INLINE static Value zero() { return _mm256_setzero_ps(); }
  FOLOVLLM_INLINE static Value load(const float* address) { return _mm256_loadu_ps(address); }
  FOLOVLLM_INLINE static void store(float* address, Value value) { _mm256_storeu_ps(address, value); }
  FOLOVLLM_INLINE static Value broadcast(float value) { return _mm256_set1_ps(value); }
  FOLOVLLM_INLINE static Value multiply_add(Value a, Value b, Value c) { return _mm256_fmadd_ps(a, b, c); }

  FOLOVLLM_INLINE static Value scales(const std::byte* address, DType type) {
    if (type == DType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(address));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address));
    if (type == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  FOLOVLLM_INLINE static Value zeros(const std::int8_t* address) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(address))));
  }

  template <int BITS, int K>
  FOLOVLLM_INLINE static Value weights(const std::uint32_t* words) {
    constexpr int kPlace = place_in_word(BITS, K);
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i values = _mm256_and_si256(_mm256_srli_epi32(packed, kPlace), _mm256_set1_epi32((1 << BITS) - 1));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(values, _mm256_set1_epi32(1 << (BITS - 1))));
  }

  // Neighbouring k's of 8 columns as pairs of bf16.
  FOLOVLLM_INLINE static void store_pairs(std::uint16_t* address, Value even, Value odd) {
    const __m256i pairs = _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), pairs);
  }

 private:
  // Adds what makes the upper half of a float the nearest bf16, ties to even.
  FOLOVLLM_INLINE static __m256i rounded(Value value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  }
};

#include "quantized_kernel_fp32_inl.h"

#include "quantized_dequantize_inl.h"

}  // namespace

void run_panel_avx2(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  run_panel(shape, panel, rows, out);
}

void dequantize_avx2(const Shape& shape, const Panel& panel, std::uint16_t* out) {
  dequantize_panel<Vector>(shape, panel, out);
}

}  // namespace folovllm::quantized

#else

namespace folovllm::quantized {
void run_panel_avx2(const Shape&, const Panel&, const Rows&, float*) { __builtin_unreachable(); }
void dequantize_avx2(const Shape&, const Panel&, std::uint16_t*) { __builtin_unreachable(); }
}  // namespace folovllm::quantized

#endif
