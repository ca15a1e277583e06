// Chunks in bfloat16: flash attention over tiles, with everything transposed so that lanes are query rows and the
// softmax needs no operation across lanes. Rows go in pairs of strips, 2 x 16 lanes:
//
//   scores[key][32 rows]    = K[key][d]   x  Q packed [d / 2][32 rows][2]        K as it lies in the cache
//   weights[key / 2][32][2] = exp2(scores - max), bfloat16
//   acc[d][32 rows]        += V packed    x  weights
//
// `Engine` supplies the two products and the packing of V that suits them; see attention_avx512_bf16.cpp and
// attention_amx.cpp. Included after attention_decode_bf16.h.
#pragma once

#include "attention_decode_bf16.h"

namespace folovllm::attention {
namespace {

constexpr int kChunkRows = 512;  // so that packing V costs a tenth of using it
constexpr int kChunkKeys = 128;  // K and V packed of so many keys, and the scores of a pair, fit the second-level cache
constexpr int kPair = 32;
static_assert(kPartition % kChunkKeys == 0 && kChunkKeys % kTile == 0);

// K of kChunkKeys keys in groups of 16 at a stride, from the cache or a copy.
struct KeyGroups {
  const BFloat16* k[kChunkKeys / 16];
  std::int64_t stride;  // elements
};

struct ChunkScratch {
  static constexpr int kFloats = kChunkKeys * kPair;

  float* score;           // [kChunkKeys][kPair]
  std::uint32_t* weight;  // [kChunkKeys / 2][kPair]: pairs of keys
  BFloat16* k;            // [kChunkKeys][padded_head]: where K cannot be read in the cache
  BFloat16* v;            // packed, kChunkKeys * padded_head
  float* pairs;
  int padded;

  ChunkScratch(std::byte* memory, int padded_head)
      : score(reinterpret_cast<float*>(memory)),
        weight(reinterpret_cast<std::uint32_t*>(score + kFloats)),
        k(reinterpret_cast<BFloat16*>(weight + kFloats / 2)),
        v(k + kChunkKeys * padded_head),
        pairs(reinterpret_cast<float*>(v + kChunkKeys * padded_head)),
        padded(padded_head) {}

  static std::size_t pair_floats(int padded) { return static_cast<std::size_t>(padded * 3 / 2 + 3) * kPair; }
  float* acc(int pair) const { return pairs + static_cast<std::size_t>(pair) * pair_floats(padded); }
  std::uint32_t* q(int pair) const { return reinterpret_cast<std::uint32_t*>(acc(pair) + padded * kPair); }
  float* max(int pair) const { return acc(pair) + padded * 3 / 2 * kPair; }
  float* sum(int pair) const { return max(pair) + kPair; }
  float* visible(int pair) const { return sum(pair) + kPair; }
};

inline std::size_t chunk_scratch_bytes(const Shape& shape) {
  const auto pairs = static_cast<std::size_t>((larger(kChunkRows, shape.group) + kPair - 1) / kPair);
  const auto padded = static_cast<std::size_t>(shape.padded_head);
  const std::size_t tiles = ChunkScratch::kFloats * 6 + 2 * sizeof(BFloat16) * kChunkKeys * padded;
  const std::size_t bytes = tiles + sizeof(float) * pairs * ChunkScratch::pair_floats(shape.padded_head);
  const std::size_t exact = exact_scratch_bytes(shape);
  return bytes > exact ? bytes : exact;
}

inline __m512i load_pairs(const BFloat16* row, int d, int head_size) {
  const int count = smaller(larger(head_size - d, 0), 32);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(count == 32 ? ~0U : (1U << count) - 1U), row + d);
}

inline void start_pair(const Shape& shape, const RowTile& tile, int num_rows, int pair, const ChunkScratch& scratch) {
  for (int lane = 0; lane < kPair; ++lane) {
    // Lanes behind the last row are copies of it.
    const int row = smaller(pair * kPair + lane, num_rows - 1);
    scratch.max(pair)[lane] = kMinusInfinity;
    scratch.sum(pair)[lane] = 0.0F;
    scratch.visible(pair)[lane] = static_cast<float>(tile.first_visible + row / shape.group);
  }
  for (int d = 0; d < scratch.padded; d += 32) {
    for (int strip = 0; strip < 2; ++strip) {
      __m512 q[16];
      for (int lane = 0; lane < 16; ++lane) {
        const int row = smaller(pair * kPair + strip * 16 + lane, num_rows - 1);
        q[lane] = _mm512_castsi512_ps(load_pairs(query_row<BFloat16>(shape, tile, row), d, shape.head_size));
      }
      Vec::transpose(q);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(scratch.q(pair) + (d / 2 + i) * kPair + strip * 16, q[i]);
    }
  }
  for (int i = 0; i < scratch.padded * kPair; i += 16) _mm512_store_ps(scratch.acc(pair) + i, _mm512_setzero_ps());
}

// Groups behind the last key repeat it.
inline void take_keys(const Shape& shape, const KeyRows<BFloat16>* rows, int num_keys, const ChunkScratch& scratch,
                      KeyGroups& groups) {
  const int num_groups = (num_keys + 15) / 16;
  const auto row = [&](int key) { return rows[key / kTile].k[key % kTile]; };
  const bool in_place = shape.block_size % 16 == 0 && shape.head_size % 32 == 0;
  groups.stride = in_place ? shape.head_size : scratch.padded;
  for (int group = 0; group < num_groups; ++group) {
    if (in_place) {
      // What lies behind the last key in its block gives scores that are masked.
      groups.k[group] = row(group * 16);
      continue;
    }
    groups.k[group] = scratch.k + group * 16 * scratch.padded;
    for (int i = group * 16; i < group * 16 + 16; ++i) {
      for (int d = 0; d < scratch.padded; d += 32) {
        _mm512_storeu_si512(scratch.k + i * scratch.padded + d,
                            load_pairs(row(smaller(i, num_keys - 1)), d, shape.head_size));
      }
    }
  }
  for (int group = num_groups; group < kChunkKeys / 16; ++group) groups.k[group] = groups.k[num_groups - 1];
}

// What a row does not see: finite, so that differences are no NaN, and far below any score.
constexpr float kUnseen = -1e30F;
constexpr float kLowestReference = -1e20F;

// 2^x within 1e-4, a fortieth of the rounding to bfloat16 that follows; 0 far below.
inline __m512 coarse_exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 q = _mm512_set1_ps(0.05500892922282219F);
  q = _mm512_fmadd_ps(q, f, _mm512_set1_ps(0.24221095442771912F));
  q = _mm512_fmadd_ps(q, f, _mm512_set1_ps(0.6932829022407532F));
  q = _mm512_fmadd_ps(q, f, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(q, whole);
}

// Masks the scores of one strip and returns by what its earlier sums are multiplied; weights of keys from `seen` to
// `end`, a multiple of 32, are 0.
inline __m512 weigh_strip_of_pair(const Shape& shape, const ChunkScratch& scratch, int pair, int strip, int begin,
                                  int seen, int end) {
  float* const score = scratch.score + strip * 16;
  const __m512 old_max = _mm512_load_ps(scratch.max(pair) + strip * 16);
  const __m512 visible = _mm512_load_ps(scratch.visible(pair) + strip * 16);
  const __m512 unseen = _mm512_set1_ps(kUnseen);
  // Rows see more keys from lane to lane; all see those before this one.
  const int seen_by_all = static_cast<int>(scratch.visible(pair)[strip * 16]) - begin;
  __m512 max = unseen;
  int key = 0;
  for (; key < smaller(seen, seen_by_all); ++key) max = _mm512_max_ps(_mm512_load_ps(score + key * kPair), max);
  for (; key < end; ++key) {
    const __mmask16 sees = _mm512_cmp_ps_mask(_mm512_set1_ps(static_cast<float>(begin + key)), visible, _CMP_LT_OQ);
    const __m512 x = _mm512_mask_load_ps(unseen, sees, score + key * kPair);
    _mm512_store_ps(score + key * kPair, x);
    max = _mm512_max_ps(x, max);
  }
  const __m512 scale = _mm512_set1_ps(shape.scale_log2);
  max = _mm512_max_ps(_mm512_mul_ps(max, scale), old_max);
  const __m512 reference = _mm512_max_ps(max, _mm512_set1_ps(kLowestReference));
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512 sum_even = _mm512_setzero_ps();
  __m512 sum_odd = _mm512_setzero_ps();
  for (key = 0; key < end; key += 2) {
    const __m512 even = coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(score + key * kPair), scale, reference));
    const __m512 odd = coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(score + (key + 1) * kPair), scale, reference));
    sum_even = _mm512_add_ps(sum_even, even);
    sum_odd = _mm512_add_ps(sum_odd, odd);
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_store_si512(scratch.weight + key / 2 * kPair + strip * 16, _mm512_permutexvar_epi16(interleave, both));
  }
  const __m512 old_scale = exp2(_mm512_sub_ps(old_max, reference));
  float* const sum = scratch.sum(pair) + strip * 16;
  _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), old_scale, _mm512_add_ps(sum_even, sum_odd)));
  const __mmask16 has_seen = _mm512_cmp_ps_mask(max, _mm512_set1_ps(kLowestReference), _CMP_NLT_UQ);
  _mm512_store_ps(scratch.max(pair) + strip * 16, _mm512_mask_blend_ps(has_seen, old_max, max));
  return old_scale;
}

inline void scale_acc(const ChunkScratch& scratch, int pair, const __m512* scale) {
  const __m512 one = _mm512_set1_ps(1.0F);
  for (int strip = 0; strip < 2; ++strip) {
    // Most tiles bring no new maximum.
    if (_mm512_cmp_ps_mask(scale[strip], one, _CMP_NEQ_UQ) == 0) continue;
    float* const acc = scratch.acc(pair) + strip * 16;
    for (int d = 0; d < scratch.padded; ++d) {
      _mm512_store_ps(acc + d * kPair, _mm512_mul_ps(_mm512_load_ps(acc + d * kPair), scale[strip]));
    }
  }
}

inline void end_pair(const ChunkScratch& scratch, int num_rows, int pair, State state) {
  const int count = smaller(kPair, num_rows - pair * kPair);
  std::memcpy(state.max + pair * kPair, scratch.max(pair), sizeof(float) * static_cast<std::size_t>(count));
  std::memcpy(state.sum + pair * kPair, scratch.sum(pair), sizeof(float) * static_cast<std::size_t>(count));
  for (int d = 0; d < scratch.padded; d += 16) {
    for (int strip = 0; strip < 2; ++strip) {
      __m512 x[16];
      for (int i = 0; i < 16; ++i) x[i] = _mm512_load_ps(scratch.acc(pair) + (d + i) * kPair + strip * 16);
      Vec::transpose(x);
      for (int i = 0; i < smaller(16, count - strip * 16); ++i) {
        _mm512_storeu_ps(state.acc + (pair * kPair + strip * 16 + i) * scratch.padded + d, x[i]);
      }
    }
  }
}

template <typename Engine>
void attend_chunk(const Shape& shape, const RowTile& tile, int key_begin, int key_end, State state, std::byte* memory) {
  const int num_rows = tile.num_tokens * shape.group;
  const ChunkScratch scratch(memory, shape.padded_head);
  const int num_pairs = (num_rows + kPair - 1) / kPair;
  for (int pair = 0; pair < num_pairs; ++pair) start_pair(shape, tile, num_rows, pair, scratch);
  const Engine engine;
  for (int begin = key_begin; begin < key_end; begin += kChunkKeys) {
    const int num_keys = smaller(kChunkKeys, key_end - begin);
    KeyRows<BFloat16> rows[kChunkKeys / kTile];
    for (int i = 0; i * kTile < num_keys; ++i) rows[i].fill(shape, tile, begin + i * kTile, key_end);
    KeyGroups groups;
    take_keys(shape, rows, num_keys, scratch, groups);
    engine.pack_v(shape, rows, num_keys, scratch);
    for (int pair = 0; pair < num_pairs; ++pair) {
      const int last_row = smaller((pair + 1) * kPair, num_rows) - 1;
      const int seen = smaller(num_keys, tile.first_visible + last_row / shape.group - begin);
      if (seen <= 0) continue;
      const int end = round_up(seen, 32);
      engine.score(groups, end, scratch, pair);
      const __m512 scale[2] = {weigh_strip_of_pair(shape, scratch, pair, 0, begin, seen, end),
                               weigh_strip_of_pair(shape, scratch, pair, 1, begin, seen, end)};
      scale_acc(scratch, pair, scale);
      engine.add_values(end, scratch, pair);
    }
  }
  for (int pair = 0; pair < num_pairs; ++pair) end_pair(scratch, num_rows, pair, state);
}

template <typename Engine>
void attend_bf16(const Shape& shape, const RowTile& tile, int key_begin, int key_end, State state, std::byte* scratch) {
  if (tile.num_tokens * shape.group <= kFewRows) {
    attend_decode_bf16(shape, tile, key_begin, key_end, state, scratch);
  } else {
    attend_chunk<Engine>(shape, tile, key_begin, key_end, state, scratch);
  }
}

// V of the keys 2 i and 2 i + 1 side by side, from d on: 16 elements of each; zeros behind the last key.
inline __m512i load_key_pair(const Shape& shape, const KeyRows<BFloat16>* rows, int num_keys, int i, int d) {
  const auto half = [&](int key) {
    if (key >= num_keys || d >= shape.head_size) return _mm256_setzero_si256();
    const BFloat16* const v = rows[key / kTile].k[key % kTile] + shape.v_offset + d;
    if (d + 16 <= shape.head_size) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
    return _mm256_maskz_loadu_epi16(Vec::first(shape.head_size - d), v);
  };
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half(2 * i)), half(2 * i + 1), 1);
  return _mm512_permutexvar_epi16(interleave, both);
}

template <typename Engine>
constexpr Kernels bf16_kernels() {
  return {kChunkRows, false, &chunk_scratch_bytes, &attend_bf16<Engine>, &merge_states, &finish_rows<BFloat16>};
}

}  // namespace
}  // namespace folovllm::attention
