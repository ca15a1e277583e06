// AVX512-BF16: two products of bfloat16 per lane and instruction, added to fp32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "gemm_vector_inl.h"

namespace folovllm {
namespace {

struct Bf16DotOps {
  using X = std::uint16_t;
  using Acc = __m512;
  using Weights = __m512i;
  using Input = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kDepth = 2;
  static constexpr std::int64_t kVectorBytes = 64;
  static constexpr bool kConverts = false;
  static constexpr int kMaxRows = 6;
  static constexpr int panels(int rows) { return rows > 0 ? 4 : 0; }  // 24 accumulators, 4 weights, 1 input

  static Acc zero() { return _mm512_setzero_ps(); }
  static Weights load(const std::byte* bytes) { return _mm512_load_si512(bytes); }
  static Input broadcast(const std::uint16_t* x) {
    std::int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Acc fma(Acc acc, Weights w, Input x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static Acc add(Acc acc, const float* bias) { return _mm512_add_ps(acc, _mm512_loadu_ps(bias)); }

  static void store(std::byte* out, DType dtype, Acc acc) {
    if (dtype == DType::kFloat32) {
      _mm512_storeu_ps(out, acc);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(acc)));
    }
  }

  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, std::uint16_t* to) {
    __builtin_memcpy(to, x + offset * 2, static_cast<std::size_t>(count) * 2);
  }
};

}  // namespace

const GemmKernel& gemm_avx512_bf16() { return VectorGemm<Bf16DotOps>::kKernel; }

}  // namespace folovllm

#endif
