// AVX-512 without bf16 products: as gemm_avx2.cpp, twice as wide.
#if defined(__x86_64__)

#include <immintrin.h>

#include "gemm_vector_inl.h"

namespace folovllm {
namespace {

void store_floats(std::byte* out, DType dtype, __m512 values) {
  if (dtype == DType::kFloat32) {
    _mm512_storeu_ps(out, values);
  } else if (dtype == DType::kFloat16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
}

// What the three kinds of weights have in common.
struct Avx512Base {
  using X = float;
  using Acc = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 6;
  static constexpr int panels(int rows) { return rows > 0 ? 4 : 0; }  // 24 accumulators, 4 weights, 1 input

  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc add(Acc acc, const float* bias) { return _mm512_add_ps(acc, _mm512_loadu_ps(bias)); }
  static void store(std::byte* out, DType dtype, Acc acc) { store_floats(out, dtype, acc); }
};

struct Float32Ops : Avx512Base {
  using Weights = __m512;
  using Input = __m512;
  static constexpr int kDepth = 1;
  static constexpr std::int64_t kVectorBytes = 64;
  static constexpr bool kConverts = false;

  static Weights load(const std::byte* bytes) { return _mm512_load_ps(bytes); }
  static Input broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static Acc fma(Acc acc, Weights w, Input x) { return _mm512_fmadd_ps(w, x, acc); }
  static void convert(const std::byte*, std::int64_t, std::int64_t, float*) {}
};

struct Float16Ops : Float32Ops {
  static constexpr std::int64_t kVectorBytes = 32;
  static constexpr bool kConverts = true;

  static Weights load(const std::byte* bytes) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)));
  }
  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, float* to) {
    const auto* const from = reinterpret_cast<const std::uint16_t*>(x) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = _cvtsh_ss(from[i]);
  }
};

struct BFloat16Ops : Avx512Base {
  struct Weights {
    __m512 even;
    __m512 odd;
  };
  using Input = const float*;
  static constexpr int kDepth = 2;
  static constexpr std::int64_t kVectorBytes = 64;
  static constexpr bool kConverts = true;
  static constexpr int kMaxRows = 5;  // a vector of weights becomes two: 20 accumulators, 8 weights, 1 input

  static Weights load(const std::byte* bytes) {
    const __m512i pairs = _mm512_load_si512(bytes);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
  }
  static Input broadcast(const float* x) { return x; }
  static Acc fma(Acc acc, const Weights& w, Input x) {
    acc = _mm512_fmadd_ps(w.even, _mm512_set1_ps(x[0]), acc);
    return _mm512_fmadd_ps(w.odd, _mm512_set1_ps(x[1]), acc);
  }
  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, float* to) {
    const auto* const from = reinterpret_cast<const std::uint16_t*>(x) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = __builtin_bit_cast(float, std::uint32_t{from[i]} << 16);
  }
};

}  // namespace

const GemmKernel& gemm_avx512(DType dtype) {
  if (dtype == DType::kFloat32) return VectorGemm<Float32Ops>::kKernel;
  if (dtype == DType::kFloat16) return VectorGemm<Float16Ops>::kKernel;
  return VectorGemm<BFloat16Ops>::kKernel;
}

}  // namespace folovllm

#endif
