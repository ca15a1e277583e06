// AVX2, FMA and F16C: bfloat16 and float16 weights are widened to fp32 as they are read.
#if defined(__x86_64__)

#include <immintrin.h>

#include "gemm_vector_inl.h"

namespace folovllm {
namespace {

void store_floats(std::byte* out, DType dtype, __m256 values) {
  if (dtype == DType::kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out), values);
  } else if (dtype == DType::kFloat16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
}

// What the three kinds of weights have in common.
struct Avx2Base {
  using X = float;
  using Acc = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6;
  static constexpr int panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }  // two accumulators each, of 16

  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc add(Acc acc, const float* bias) { return _mm256_add_ps(acc, _mm256_loadu_ps(bias)); }
  static void store(std::byte* out, DType dtype, Acc acc) { store_floats(out, dtype, acc); }
};

struct Float32Ops : Avx2Base {
  using Weights = __m256;
  using Input = __m256;
  static constexpr int kDepth = 1;
  static constexpr std::int64_t kVectorBytes = 32;
  static constexpr bool kConverts = false;

  static Weights load(const std::byte* bytes) { return _mm256_load_ps(reinterpret_cast<const float*>(bytes)); }
  static Input broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  static Acc fma(Acc acc, Weights w, Input x) { return _mm256_fmadd_ps(w, x, acc); }
  static void convert(const std::byte*, std::int64_t, std::int64_t, float*) {}
};

struct Float16Ops : Float32Ops {
  static constexpr std::int64_t kVectorBytes = 16;
  static constexpr bool kConverts = true;

  static Weights load(const std::byte* bytes) {
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, float* to) {
    const auto* const from = reinterpret_cast<const std::uint16_t*>(x) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = _cvtsh_ss(from[i]);
  }
};

struct BFloat16Ops : Avx2Base {
  struct Weights {
    __m256 even;
    __m256 odd;
  };
  using Input = const float*;
  static constexpr int kDepth = 2;
  static constexpr std::int64_t kVectorBytes = 32;
  static constexpr bool kConverts = true;

  static Weights load(const std::byte* bytes) {
    const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000U))))};
  }
  static Input broadcast(const float* x) { return x; }
  static Acc fma(Acc acc, const Weights& w, Input x) {
    acc = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(x), acc);
    return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(x + 1), acc);
  }
  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, float* to) {
    const auto* const from = reinterpret_cast<const std::uint16_t*>(x) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = __builtin_bit_cast(float, std::uint32_t{from[i]} << 16);
  }
};

}  // namespace

const GemmKernel& gemm_avx2(DType dtype) {
  if (dtype == DType::kFloat32) return VectorGemm<Float32Ops>::kKernel;
  if (dtype == DType::kFloat16) return VectorGemm<Float16Ops>::kKernel;
  return VectorGemm<BFloat16Ops>::kKernel;
}

}  // namespace folovllm

#endif
