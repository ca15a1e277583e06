// Decodes in bfloat16 on AVX-512 with bf16 dot products: a few rows, limited by reading K and V.
//
//   score     lanes are d: products of pairs of d; 16 keys at a time are added up across lanes into one vector
//   values    lanes are d, even ones and odd ones apart, because a bfloat16 is the upper half of a float:
//             32 of a row of V = shift (even) and mask (odd) to 2 x 16 floats
//
// Included after attention_exact.h, whose softmax it shares.
#pragma once

#include "attention_exact.h"

namespace folovllm::attention {
namespace {

// kChunks x 32 elements of a head; 0 where the count is known at run time only.
template <int kChunks>
__m512 dot(const BFloat16* k, const __m512bh* q, int chunks) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < (kChunks > 0 ? kChunks : chunks); ++c) {
    sum = _mm512_dpbf16_ps(sum, q[c], reinterpret_cast<__m512bh>(_mm512_loadu_si512(k + 32 * c)));
  }
  return sum;
}

// Lane i of the result is the sum of the lanes of leaf(i).
template <typename Leaf>
__m512 sums_of_16(Leaf leaf) {
  const auto halves = [&](int i) {  // leaves i and i + 4
    const __m512 a = leaf(i);
    const __m512 b = leaf(i + 4);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto quarters = [&](int i) {  // and i + 8
    const __m512 a = halves(i);
    const __m512 b = halves(i + 8);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto pairs = [&](int i) {  // and i + 1
    const __m512d a = _mm512_castps_pd(quarters(i));
    const __m512d b = _mm512_castps_pd(quarters(i + 1));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const __m512 a = pairs(0);
  const __m512 b = pairs(2);
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

template <int kChunks, int R>
void score_decode(const Shape& shape, const KeyRows<BFloat16>& rows, const KeyRows<BFloat16>& next, int num_keys,
                  const __m512bh (*q)[16], FewRows<R>& few) {
  const int chunks = shape.padded_head / 32;
  const int row_bytes = shape.head_size * 2;
  alignas(64) float sums[R][16][16];  // of each key, not yet added up across lanes
  for (int first = 0; first < num_keys; first += 16) {
    for (int i = 0; i < 16; ++i) {
      prefetch_row(next.k[first + i], row_bytes);
      for (int r = 0; r < R; ++r) _mm512_store_ps(sums[r][i], dot<kChunks>(rows.k[first + i], q[r], chunks));
    }
    for (int r = 0; r < R; ++r) {
      const auto leaf = [&](int i) { return _mm512_load_ps(sums[r][i]); };
      _mm512_storeu_ps(&few.score[r][first], sums_of_16(leaf));
    }
  }
}

// N x 32 elements of V from d on, times the weights of R rows.
template <int R, int N>
void add_values_decode(const Shape& shape, const KeyRows<BFloat16>& rows, const KeyRows<BFloat16>& next, int num_keys,
                       int d, const FewRows<R>& few, const float* scale, float* acc) {
  const __m512i odd_mask = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  __m512 sum[R][2 * N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < 2 * N; ++n) {
      sum[r][n] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * shape.padded_head + d + n * 16), _mm512_set1_ps(scale[r]));
    }
  }
  for (int key = 0; key < num_keys; ++key) {
    const BFloat16* const v = rows.k[key] + shape.v_offset + d;
    prefetch_row(next.k[key] + shape.v_offset + d, N * 64);
    for (int n = 0; n < N; ++n) {
      const __m512i x = _mm512_loadu_si512(v + 32 * n);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(x, odd_mask));
      for (int r = 0; r < R; ++r) {
        const __m512 weight = _mm512_set1_ps(few.score[r][key]);
        sum[r][2 * n] = _mm512_fmadd_ps(weight, even, sum[r][2 * n]);
        sum[r][2 * n + 1] = _mm512_fmadd_ps(weight, odd, sum[r][2 * n + 1]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < 2 * N; ++n) _mm512_storeu_ps(acc + r * shape.padded_head + d + n * 16, sum[r][n]);
  }
}

template <int R, int N>
void add_all_values_decode(const Shape& shape, const KeyRows<BFloat16>& rows, const KeyRows<BFloat16>& next,
                           int num_keys, int d, const FewRows<R>& few, const float* scale, float* acc) {
  for (; d + N * 32 <= shape.padded_head; d += N * 32) {
    add_values_decode<R, N>(shape, rows, next, num_keys, d, few, scale, acc);
  }
  if constexpr (N > 1) add_all_values_decode<R, N / 2>(shape, rows, next, num_keys, d, few, scale, acc);
}

// From (even, odd) halves of every 32 elements to their order.
inline void interleave_row(const float* halves, int padded_head, float* row) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int d = 0; d < padded_head; d += 32) {
    const __m512 even = _mm512_loadu_ps(halves + d);
    const __m512 odd = _mm512_loadu_ps(halves + d + 16);
    _mm512_storeu_ps(row + d, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(row + d + 16, _mm512_permutex2var_ps(even, high, odd));
  }
}

// REQUIRES: head_size is a multiple of 32.
template <int kChunks, int R>
void attend_decode(const Shape& shape, const RowTile& tile, int num_rows, int key_begin, int key_end, State state,
                   std::byte* scratch) {
  const int padded = shape.padded_head;
  float* const acc = reinterpret_cast<float*>(scratch);
  __m512bh q[R][16];
  FewRows<R> few;
  for (int r = 0; r < R; ++r) {
    const int row = smaller(r, num_rows - 1);
    const BFloat16* const source = query_row<BFloat16>(shape, tile, row);
    for (int c = 0; c < padded / 32; ++c) {
      q[r][c] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(source + 32 * c));
    }
    for (int d = 0; d < padded; d += 16) _mm512_storeu_ps(acc + r * padded + d, _mm512_setzero_ps());
    few.max[r] = kMinusInfinity;
    few.sum[r] = 0.0F;
    few.visible[r] = tile.first_visible + row / shape.group;
  }
  KeyRows<BFloat16> rows;
  rows.fill(shape, tile, key_begin, key_end);
  KeyRows<BFloat16> next = rows;
  for (int begin = key_begin; begin < key_end; begin += kTile) {
    const int num_keys = smaller(kTile, key_end - begin);
    if (begin + kTile < key_end) next.fill(shape, tile, begin + kTile, key_end);
    score_decode<kChunks, R>(shape, rows, next, num_keys, q, few);
    float scale[R];
    for (int r = 0; r < R; ++r) scale[r] = weigh_few<R>(shape, few, r, begin);
    add_all_values_decode<R, larger(1, 8 / R)>(shape, rows, next, num_keys, 0, few, scale, acc);
    rows = next;
  }
  std::memcpy(state.max, few.max, sizeof(float) * static_cast<std::size_t>(num_rows));
  std::memcpy(state.sum, few.sum, sizeof(float) * static_cast<std::size_t>(num_rows));
  for (int row = 0; row < num_rows; ++row) interleave_row(acc + row * padded, padded, state.acc + row * padded);
}

template <int R>
void attend_decode_of_size(const Shape& shape, const RowTile& tile, int num_rows, int key_begin, int key_end,
                           State state, std::byte* scratch) {
  if (shape.head_size == 128) {
    attend_decode<4, R>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (shape.head_size == 64) {
    attend_decode<2, R>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else {
    attend_decode<0, R>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  }
}

// Up to kFewRows rows.
inline void attend_decode_bf16(const Shape& shape, const RowTile& tile, int key_begin, int key_end, State state,
                               std::byte* scratch) {
  const int num_rows = tile.num_tokens * shape.group;
  if (shape.head_size % 32 != 0) {
    attend_exactly<BFloat16>(shape, tile, key_begin, key_end, state, scratch);
  } else if (num_rows == 1) {
    attend_decode_of_size<1>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (num_rows == 2) {
    attend_decode_of_size<2>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (num_rows <= 4) {
    attend_decode_of_size<4>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else {
    attend_decode_of_size<kFewRows>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  }
}

}  // namespace
}  // namespace folovllm::attention
