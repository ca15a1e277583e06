// Sixteen floats in AVX-512; see attention_vec_portable.h.
#pragma once

#include <immintrin.h>

#include "number_formats.h"

namespace folovllm::attention {
namespace {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kUnroll = 16;

  using F = __m512;

  static __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffffU : (1U << n) - 1U); }

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static F load_first(const BFloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static F load_first(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store_first(BFloat16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
  static void store_first(Float16* p, F x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F where_less(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
  static float sum(F x) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x), upper(x));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
  }
  static float largest(F x) {
    const __m256 s = _mm256_max_ps(_mm512_castps512_ps256(x), upper(x));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }
  static void transpose(F* x) {
    F a[16];
    F b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    // b[4 r + j] holds column j of each quarter for rows 4 r .. 4 r + 3; the quarters change places.
    for (int j = 0; j < 4; ++j) {
      const F low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
      const F low_odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
      const F high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
      const F high_odd = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
      x[j] = _mm512_shuffle_f32x4(low, high, 0x88);
      x[4 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
      x[8 + j] = _mm512_shuffle_f32x4(low, high, 0xdd);
      x[12 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
  }
  // Into the second level: all that memory has to give does not fit through the first one's few misses.
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

 private:
  static __m256 upper(F x) { return _mm512_extractf32x8_ps(x, 1); }
  static F widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
  // To the nearest, ties to even; a NaN stays one.
  static __m256i narrow(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

}  // namespace
}  // namespace folovllm::attention
