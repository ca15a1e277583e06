// bfloat16 attention with the bf16 dot products of AVX-512.
#include "attention_vec_avx512.h"

#include "attention_chunk_bf16.h"

namespace folovllm::attention {
namespace {

// Eight keys (or elements d) x two strips of rows in registers; one operand is broadcast, two bfloat16 at a time.
struct DotEngine {
  static constexpr int kN = 8;

  static __m512bh broadcast(const void* pair) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, pair, sizeof(bits));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(bits)));
  }
  static __m512bh load(const std::uint32_t* pairs) { return reinterpret_cast<__m512bh>(_mm512_load_si512(pairs)); }

  // v[key / 2][padded_head] pairs of keys.
  void pack_v(const Shape& shape, const KeyRows<BFloat16>* rows, int num_keys, const ChunkScratch& scratch) const {
    for (int i = 0; i < round_up(num_keys, 32) / 2; ++i) {
      for (int d = 0; d < scratch.padded; d += 16) {
        _mm512_store_si512(scratch.v + (i * scratch.padded + d) * 2, load_key_pair(shape, rows, num_keys, i, d));
      }
    }
  }

  template <typename Between>
  void score(const KeyBlock& block, int pair, int first_key, Between&& between) const {
    const std::uint32_t* const q = block.scratch.q(pair);
    const std::int64_t stride = block.groups.stride;
    for (int key = first_key; key < first_key + kGroup; key += kN) {
      const BFloat16* const k = block.groups.k[key / 16] + key % 16 * stride;
      __m512 sum[kN][2] = {};
      for (int i = 0; i < block.scratch.padded / 2; ++i) {
        const __m512bh q0 = load(q + i * kPair);
        const __m512bh q1 = load(q + i * kPair + 16);
        for (int n = 0; n < kN; ++n) {
          const __m512bh x = broadcast(k + n * stride + 2 * i);
          sum[n][0] = _mm512_dpbf16_ps(sum[n][0], q0, x);
          sum[n][1] = _mm512_dpbf16_ps(sum[n][1], q1, x);
        }
      }
      float* const score = block.scratch.score(key) + key % kGroup * kPair;
      for (int n = 0; n < kN; ++n) {
        _mm512_store_ps(score + n * kPair, sum[n][0]);
        _mm512_store_ps(score + n * kPair + 16, sum[n][1]);
      }
    }
    between(0, 1);
  }

  void add_values(const ChunkScratch& scratch, int pair, int begin, int end) const {
    for (int d = 0; d < scratch.padded; d += kN) {
      float* const acc = scratch.acc(pair) + d * kPair;
      __m512 sum[kN][2];
      for (int n = 0; n < kN; ++n) {
        sum[n][0] = _mm512_load_ps(acc + n * kPair);
        sum[n][1] = _mm512_load_ps(acc + n * kPair + 16);
      }
      for (int i = begin / 2; i < end / 2; ++i) {
        const __m512bh w0 = load(scratch.weights + i * kPair);
        const __m512bh w1 = load(scratch.weights + i * kPair + 16);
        const BFloat16* const v = scratch.v + (i * scratch.padded + d) * 2;
        for (int n = 0; n < kN; ++n) {
          const __m512bh x = broadcast(v + 2 * n);
          sum[n][0] = _mm512_dpbf16_ps(sum[n][0], w0, x);
          sum[n][1] = _mm512_dpbf16_ps(sum[n][1], w1, x);
        }
      }
      for (int n = 0; n < kN; ++n) {
        _mm512_store_ps(acc + n * kPair, sum[n][0]);
        _mm512_store_ps(acc + n * kPair + 16, sum[n][1]);
      }
    }
  }
};

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static constexpr Kernels kKernels = bf16_kernels<DotEngine>();
  return kKernels;
}

}  // namespace folovllm::attention
