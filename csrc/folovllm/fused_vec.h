// Vectors of floats in the width of the file's compile options, and their loads and stores in each dtype.
//
// Only for files that are compiled once per level of instructions. Everything is in an anonymous namespace and nothing
// of the standard library is called: an inline function that two levels share would be kept once by the linker, perhaps
// in the version that an older machine cannot run.
#pragma once

#include <cstdint>

#include "number_formats.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace folovllm {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define FOLOVLLM_INLINE inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));

FOLOVLLM_INLINE Floats all(float value) { return Floats{} + value; }

// -- round to a dtype, staying in fp32 --------------------------------------------------------------------------------

// In the upper half of each lane; what is below it has no meaning. NaN stays NaN unless all its lower bits are set,
// which no arithmetic on bfloat16 gives.
FOLOVLLM_INLINE Bits bfloat16_upper(Floats x) {
  const Bits bits = (Bits)x;
  return bits + 0x7fffU + ((bits >> 16) & 1U);
}

// Any NaN stays NaN.
FOLOVLLM_INLINE Bits bfloat16_bits(Floats x) { return (x != x ? Bits{} + 0x7fc00000U : bfloat16_upper(x)) >> 16; }

#if !defined(__AVX2__)
FOLOVLLM_INLINE std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FOLOVLLM_INLINE float float_of(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

FOLOVLLM_INLINE float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t rest = half & 0x7fffU;
  if (rest >= 0x7c00U) return float_of(sign | 0x7f800000U | (rest & 0x3ffU) << 13 | (rest > 0x7c00U ? 0x400000U : 0U));
  if (rest >= 0x400U) return float_of(sign | ((rest << 13) + (112U << 23)));
  return float_of(sign | float_bits(static_cast<float>(rest) * 0x1p-24F));
}

FOLOVLLM_INLINE std::uint16_t float_to_half(float x) {
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  const std::uint32_t rest = bits & 0x7fffffffU;
  std::uint32_t half = 0;
  if (rest > 0x7f800000U) {
    half = 0x7e00U | (rest >> 13 & 0x3ffU);
  } else if (rest >= 0x477ff000U) {  // 65520 and above: infinity
    half = 0x7c00U;
  } else if (rest >= 0x38800000U) {  // 2^-14 and above: a normal number
    half = (rest + 0xfffU + (rest >> 13 & 1U) - 0x38000000U) >> 13;
  } else {  // the lowest bit of 0.5 is that of the subnormal numbers: let the addition round
    half = float_bits(float_of(rest) + 0.5F) - float_bits(0.5F);
  }
  return static_cast<std::uint16_t>(sign | half);
}
#endif

// -- loads and stores of kLanes elements -------------------------------------------------------------------------------

FOLOVLLM_INLINE Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

FOLOVLLM_INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof(x)); }

#if defined(__AVX512F__)

FOLOVLLM_INLINE Floats load(const BFloat16* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}
FOLOVLLM_INLINE void store(BFloat16* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(x)));
}
FOLOVLLM_INLINE Floats load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FOLOVLLM_INLINE void store(Float16* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

FOLOVLLM_INLINE Floats load(const BFloat16* from) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
}
FOLOVLLM_INLINE void store(BFloat16* to, Floats x) {
  const __m256i high = (__m256i)bfloat16_bits(x);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
FOLOVLLM_INLINE Floats load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOLOVLLM_INLINE void store(Float16* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

FOLOVLLM_INLINE Floats load(const BFloat16* from) {
  Bits bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = std::uint32_t{from[i].bits} << 16;
  return (Floats)bits;
}
FOLOVLLM_INLINE void store(BFloat16* to, Floats x) {
  const Bits bits = bfloat16_bits(x);
  for (int i = 0; i < kLanes; ++i) to[i].bits = static_cast<std::uint16_t>(bits[i]);
}
FOLOVLLM_INLINE Floats load(const Float16* from) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(from[i].bits);
  return x;
}
FOLOVLLM_INLINE void store(Float16* to, Floats x) {
  for (int i = 0; i < kLanes; ++i) to[i].bits = float_to_half(x[i]);
}

#endif

template <typename T>
FOLOVLLM_INLINE Floats rounded(Floats x);
template <>
FOLOVLLM_INLINE Floats rounded<float>(Floats x) {
  return x;
}
template <>
FOLOVLLM_INLINE Floats rounded<BFloat16>(Floats x) {
  return (Floats)(bfloat16_upper(x) & 0xffff0000U);
}
template <>
FOLOVLLM_INLINE Floats rounded<Float16>(Floats x) {
  Float16 halves[kLanes];
  store(halves, x);
  return load(halves);
}

// -- the last elements of a row ----------------------------------------------------------------------------------------

// Elements [0, count), then zeros; count is below kLanes.
template <typename T>
FOLOVLLM_INLINE Floats load_first(const T* from, std::int64_t count) {
  T padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <typename T>
FOLOVLLM_INLINE void store_first(T* to, Floats x, std::int64_t count) {
  T padded[kLanes];
  store(padded, x);
  for (std::int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// body(i, load, store) over [0, size): whole vectors, then what is left.
template <typename F>
FOLOVLLM_INLINE void for_vectors(std::int64_t size, F&& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    body(i, [](const auto* from) __attribute__((always_inline)) { return load(from); },
         [](auto* to, Floats x) __attribute__((always_inline)) { store(to, x); });
  }
  const std::int64_t count = size - i;
  if (count > 0) {
    body(i, [count](const auto* from) { return load_first(from, count); },
         [count](auto* to, Floats x) { store_first(to, x, count); });
  }
}

// -- sums --------------------------------------------------------------------------------------------------------------

FOLOVLLM_INLINE float sum_of_lanes(Floats x) {
#if defined(__AVX512F__)
  const __m256 eight = _mm512_castps512_ps256(x) + _mm512_extractf32x8_ps(x, 1);
#elif defined(__AVX2__)
  const __m256 eight = x;
#endif
#if defined(__AVX2__)
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
  const Floats four = x;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// A sum in the same order at every level: kSumLanes partial sums, then by halves.
constexpr int kSumLanes = 32;

struct Sum {
  Floats part[kSumLanes / kLanes] = {};

  // Sums term(i), a vector of the elements from i on, or term_first(i, count), which is zero from count on.
  template <typename Term, typename TermFirst>
  FOLOVLLM_INLINE void add(std::int64_t size, Term&& term, TermFirst&& term_first) {
    std::int64_t i = 0;
    for (; i + kSumLanes <= size; i += kSumLanes) {
      for (int p = 0; p < kSumLanes / kLanes; ++p) part[p] += term(i + p * kLanes);
    }
    for (int p = 0; i < size; ++p, i += kLanes) {
      part[p] += i + kLanes <= size ? term(i) : term_first(i, size - i);
    }
  }

  FOLOVLLM_INLINE float total() const {
    Floats sum[kSumLanes / kLanes];
    __builtin_memcpy(sum, part, sizeof(sum));
    for (int width = kSumLanes / kLanes / 2; width > 0; width /= 2) {
      for (int p = 0; p < width; ++p) sum[p] += sum[p + width];
    }
    return sum_of_lanes(sum[0]);
  }
};

// -- exp ---------------------------------------------------------------------------------------------------------------

// a * b + c, rounded once where the level has an instruction for it.
FOLOVLLM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x within 2 units in the last place; 0 below -87.3, infinity above 88.8, NaN for NaN.
// x = n ln 2 + r, then 2^n e^r with e^r by a polynomial (its coefficients: Cephes, expf).
FOLOVLLM_INLINE Floats exp(Floats x) {
  const Floats high = all(89.0F);
  const Floats y = x > high ? high : x;
  const Floats shift = all(12582912.0F);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = multiply_add(y, all(1.44269504F), shift);
  const Floats n = shifted - shift;
  const Floats r = multiply_add(n, all(2.12194440e-4F), multiply_add(n, all(-0.693359375F), y));
  Floats p = multiply_add(r, all(1.9875691500e-4F), all(1.3981999507e-3F));
  p = multiply_add(p, r, all(8.3334519073e-3F));
  p = multiply_add(p, r, all(4.1665795894e-2F));
  p = multiply_add(p, r, all(1.6666665459e-1F));
  p = multiply_add(p, r, all(5.0000001201e-1F));
  p = multiply_add(p, r * r, r + 1.0F);
  const Floats scale = (Floats)(((Ints)shifted - (Ints)shift + 127) << 23);  // 2^128 is infinity, as it should be
  return x < all(-87.3F) ? Floats{} : p * scale;
}

}  // namespace
}  // namespace folovllm
