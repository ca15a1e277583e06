// AVX-512 in fp32, for quantized_kernel_fp32_inl.h and quantized_dequantize_inl.h. The includer defines FOLOVLLM_ISA and
// FOLOVLLM_INLINE and stands in an unnamed namespace of folovllm::quantized.

struct Vector {
  using Value = __m512;
  static constexpr int kWidth = 16;
  using RowCounts = KernelsByRows<1, 2, 3, 4, 6, 8, 12>;  // 24 sums, an input, weights and the table
  static constexpr int kFewRows = 6;

  FOLOVLLM_INLINE static Value zero() { return _mm512_setzero_ps(); }
  FOLOVLLM_INLINE static Value load(const float* address) { return _mm512_loadu_ps(address); }
  FOLOVLLM_INLINE static void store(float* address, Value value) { _mm512_storeu_ps(address, value); }
  FOLOVLLM_INLINE static Value broadcast(float value) { return _mm512_set1_ps(value); }
  FOLOVLLM_INLINE static Value multiply_add(Value a, Value b, Value c) { return _mm512_fmadd_ps(a, b, c); }

  FOLOVLLM_INLINE static Value scales(const std::byte* address, DType type) {
    if (type == DType::kFloat32) return _mm512_loadu_ps(address);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
    if (type == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  FOLOVLLM_INLINE static Value zeros(const std::int8_t* address) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(address))));
  }

  template <int BITS, int K>
  FOLOVLLM_INLINE static Value weights(const std::uint32_t* words) {
    constexpr unsigned kPlace = place_in_word(BITS, K);
    const __m512i shifted = _mm512_srli_epi32(_mm512_loadu_si512(words), kPlace);
    if constexpr (BITS == 4) {
      const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      return _mm512_permutexvar_ps(shifted, table);
    } else {
      const __m512i values = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(values, _mm512_set1_epi32(128)));
    }
  }

  // Neighbouring k's of 16 columns as pairs of bf16.
  FOLOVLLM_INLINE static void store_pairs(std::uint16_t* address, Value even, Value odd) {
    const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    _mm512_storeu_si512(address, _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
  }

 private:
  // Adds what makes the upper half of a float the nearest bf16, ties to even.
  FOLOVLLM_INLINE static __m512i rounded(Value value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  }
};
