// Chunks in bfloat16: flash attention over blocks of keys, with everything transposed so that lanes are query rows and the
// softmax needs no operation across lanes. Rows go in pairs of strips, 2 x 16 lanes, keys in groups of 32:
//
//   scores[key][32 rows]    = K[key][d]   x  Q packed [d / 2][32 rows][2]        K as it lies in the cache
//   weights[key / 2][32][2] = exp2(scores - reference), bfloat16
//   acc[d][32 rows]        += V packed    x  weights                             once per block
//
// The reference of a row is a maximum of its scores so far. It is not raised for a little: blocks often bring a row a
// new maximum, and for each all that was summed would have to be scaled.
//
// `Engine` supplies the two products and the packing of V that suits them; see attention_avx512_bf16.cpp and
// attention_amx.cpp. Included after attention_decode_bf16.h.
#pragma once

#include "attention_decode_bf16.h"

namespace folovllm::attention {
namespace {

constexpr int kChunkRows = 512;  // so that packing V costs a tenth of using it
constexpr int kChunkKeys = 256;  // K, and V packed, of so many keys fit the second-level cache, their weights the first
constexpr int kGroup = 32;       // keys of a group; the scores of two fit the first-level cache
constexpr int kPair = 32;
static_assert(kPartition % kChunkKeys == 0 && kChunkKeys % kTile == 0 && kTile % kGroup == 0);

// K of kChunkKeys keys in groups of 16 at a stride, from the cache or a copy.
struct KeyGroups {
  const BFloat16* k[kChunkKeys / 16];
  std::int64_t stride;  // elements
};

struct ChunkScratch {
  static constexpr int kScores = kGroup * kPair;
  static constexpr int kWeights = kChunkKeys / 2 * kPair;

  float* scores;           // 2 x [kGroup][kPair]
  std::uint32_t* weights;  // [kChunkKeys / 2][kPair]: pairs of keys
  BFloat16* k;             // [kChunkKeys][padded_head]: where K cannot be read in the cache
  BFloat16* v;             // packed, kChunkKeys * padded_head
  float* pairs;
  int padded;

  ChunkScratch(std::byte* memory, int padded_head)
      : scores(reinterpret_cast<float*>(memory)),
        weights(reinterpret_cast<std::uint32_t*>(scores + 2 * kScores)),
        k(reinterpret_cast<BFloat16*>(weights + kWeights)),
        v(k + kChunkKeys * padded_head),
        pairs(reinterpret_cast<float*>(v + kChunkKeys * padded_head)),
        padded(padded_head) {}

  // Scores of the group that begins at a key of the block: those of two groups after each other are kept.
  float* score(int key) const { return scores + key / kGroup % 2 * kScores; }
  std::uint32_t* weight(int key) const { return weights + key / 2 * kPair; }

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
  const std::size_t tiles = (2 * ChunkScratch::kScores + ChunkScratch::kWeights) * 4 + 2 * sizeof(BFloat16) * kChunkKeys * padded;
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
// How far scores exceed a reference before it is raised: weights of up to 2^8 do no harm.
constexpr float kHeadroom = 8.0F;

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

// A block of keys and the rows that see some of it.
struct KeyBlock {
  const Shape& shape;
  const RowTile& tile;
  const ChunkScratch& scratch;
  KeyGroups groups;
  int begin;
  int num_keys;
  int num_rows;

  // How many of its keys the last row of a pair sees; up to 0: none. Grows from pair to pair.
  int seen_by(int pair) const {
    const int last_row = smaller((pair + 1) * kPair, num_rows) - 1;
    return smaller(num_keys, tile.first_visible + last_row / shape.group - begin);
  }
};

// Softmax of a pair over one block of keys, group by group.
class PairWeights {
 public:
  PairWeights(const KeyBlock& block, int pair)
      : scratch_(block.scratch),
        pair_(pair),
        begin_(block.begin),
        // Rows see more keys from lane to lane; all see those before the first one's end.
        seen_by_all_(smaller(block.seen_by(pair), static_cast<int>(scratch_.visible(pair)[0]) - block.begin)),
        scale_(_mm512_set1_ps(block.shape.scale_log2)) {
    for (int strip = 0; strip < 2; ++strip) {
      max_[strip] = _mm512_load_ps(scratch_.max(pair) + strip * 16);
      reference_[strip] = _mm512_max_ps(max_[strip], _mm512_set1_ps(kLowestReference));
      sum_[strip] = _mm512_load_ps(scratch_.sum(pair) + strip * 16);
    }
  }

  // Marks what rows do not see in the scores of the group at `key`, and says whether a reference must be raised.
  bool look_at(int key) {
    float* const score = scratch_.score(key);
    if (key + kGroup > seen_by_all_) mask(score, key);
    const auto row = [&](int i, int strip) { return _mm512_load_ps(score + i * kPair + strip * 16); };
    __m512 even[2] = {row(0, 0), row(0, 1)};
    __m512 odd[2] = {row(1, 0), row(1, 1)};
    for (int i = 2; i < kGroup; i += 2) {
      for (int strip = 0; strip < 2; ++strip) {
        even[strip] = _mm512_max_ps(row(i, strip), even[strip]);
        odd[strip] = _mm512_max_ps(row(i + 1, strip), odd[strip]);
      }
    }
    for (int strip = 0; strip < 2; ++strip) {
      top_[strip] = _mm512_mul_ps(_mm512_max_ps(even[strip], odd[strip]), scale_);
      const __m512 limit = _mm512_add_ps(max_[strip], _mm512_set1_ps(kHeadroom));
      is_raised_[strip] = static_cast<__mmask16>(
          _mm512_cmp_ps_mask(top_[strip], limit, _CMP_NLE_UQ) &
          _mm512_cmp_ps_mask(top_[strip], _mm512_set1_ps(kLowestReference), _CMP_NLT_UQ));
    }
    return (is_raised_[0] | is_raised_[1]) != 0;
  }

  // Raises the references that `look_at` found too low, and scales what was summed. REQUIRES: the weights so far are in
  // acc.
  void raise() {
    for (int strip = 0; strip < 2; ++strip) {
      if (is_raised_[strip] == 0) continue;
      max_[strip] = _mm512_mask_blend_ps(is_raised_[strip], max_[strip], top_[strip]);
      const __m512 raised = _mm512_max_ps(max_[strip], _mm512_set1_ps(kLowestReference));
      const __m512 factor = exp2(_mm512_sub_ps(reference_[strip], raised));
      reference_[strip] = raised;
      sum_[strip] = _mm512_mul_ps(sum_[strip], factor);
      float* const acc = scratch_.acc(pair_) + strip * 16;
      for (int d = 0; d < scratch_.padded; ++d) {
        _mm512_store_ps(acc + d * kPair, _mm512_mul_ps(_mm512_load_ps(acc + d * kPair), factor));
      }
    }
  }

  // Makes weights of the scores of the keys [key, key + num_keys) of one group; both are even.
  void weigh(int key, int num_keys) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const float* score = scratch_.score(key) + key % kGroup * kPair;
    std::uint32_t* weight = scratch_.weight(key);
    for (int i = 0; i < num_keys; i += 2, score += 2 * kPair, weight += kPair) {
      for (int strip = 0; strip < 2; ++strip) {
        const auto power = [&](const float* at) {
          return coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(at + strip * 16), scale_, reference_[strip]));
        };
        const __m512 even = power(score);
        const __m512 odd = power(score + kPair);
        sum_[strip] = _mm512_add_ps(sum_[strip], _mm512_add_ps(even, odd));
        const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_store_si512(weight + strip * 16, _mm512_permutexvar_epi16(interleave, both));
      }
    }
  }

  void finish() const {
    for (int strip = 0; strip < 2; ++strip) {
      _mm512_store_ps(scratch_.max(pair_) + strip * 16, max_[strip]);
      _mm512_store_ps(scratch_.sum(pair_) + strip * 16, sum_[strip]);
    }
  }

 private:
  void mask(float* score, int key) const {
    for (int i = 0; i < kGroup; ++i) {
      const __m512 position = _mm512_set1_ps(static_cast<float>(begin_ + key + i));
      for (int strip = 0; strip < 2; ++strip) {
        const __m512 visible = _mm512_load_ps(scratch_.visible(pair_) + strip * 16);
        const __mmask16 sees = _mm512_cmp_ps_mask(position, visible, _CMP_LT_OQ);
        float* const at = score + i * kPair + strip * 16;
        _mm512_store_ps(at, _mm512_mask_load_ps(_mm512_set1_ps(kUnseen), sees, at));
      }
    }
  }

  const ChunkScratch& scratch_;
  const int pair_;
  const int begin_;
  const int seen_by_all_;
  const __m512 scale_;
  __m512 max_[2];        // -inf where a row has seen nothing
  __m512 reference_[2];  // the same, but finite
  __m512 sum_[2];
  __m512 top_[2];
  __mmask16 is_raised_[2];
};

// Fetches the blocks of the cache that hold the next keys, a few lines at a step.
class ReadAhead {
 public:
  // Keys [begin, end), over so many steps.
  ReadAhead(const Shape& shape, const RowTile& tile, int begin, int end, int num_steps)
      : shape_(shape),
        tile_(tile),
        run_lines_(static_cast<int>(shape.block_size * shape.head_size * std::int64_t{sizeof(BFloat16)} / kLine)),
        run_(begin / shape.block_size * 2),
        runs_end_(end > begin ? (end + shape.block_size - 1) / shape.block_size * 2 : run_) {
    lines_per_step_ = ((runs_end_ - run_) * run_lines_ + num_steps - 1) / num_steps;
    seek();
  }

  void step() {
    for (int i = 0; i < lines_per_step_ && run_ < runs_end_; ++i) {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += kLine;
      if (++line_ < run_lines_) continue;
      line_ = 0;
      ++run_;
      seek();
    }
  }

 private:
  static constexpr int kLine = 64;

  // A block has two runs of lines, K and V.
  void seek() {
    if (run_ >= runs_end_) return;
    const auto* const block =
        static_cast<const BFloat16*>(tile_.kv_head) + tile_.block_table[run_ / 2] * shape_.block_stride;
    at_ = reinterpret_cast<const char*>(block + run_ % 2 * shape_.v_offset);
  }

  const Shape& shape_;
  const RowTile& tile_;
  const int run_lines_;
  int lines_per_step_;
  int run_;
  const int runs_end_;
  int line_ = 0;
  const char* at_ = nullptr;
};

// Adds a block of keys to a pair. The scores of the next group are computed between the weights of this one, for
// processors that do both at the same time.
template <typename Engine>
void attend_pair(const Engine& engine, const KeyBlock& block, int pair, ReadAhead& ahead) {
  const int end = round_up(block.seen_by(pair), kGroup);
  PairWeights weights(block, pair);
  int added = 0;
  engine.score(block, pair, 0, [](int, int) {});
  for (int key = 0; key < end; key += kGroup) {
    if (weights.look_at(key)) {
      engine.add_values(block.scratch, pair, added, key);
      added = key;
      weights.raise();
    }
    const auto weigh = [&](int step, int num_steps) {
      ahead.step();
      const int from = kGroup / 2 * step / num_steps * 2;
      weights.weigh(key + from, kGroup / 2 * (step + 1) / num_steps * 2 - from);
    };
    if (key + kGroup < end) {
      engine.score(block, pair, key + kGroup, weigh);
    } else {
      weigh(0, 1);
    }
  }
  engine.add_values(block.scratch, pair, added, end);
  weights.finish();
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
    KeyBlock block{shape, tile, scratch, {}, begin, smaller(kChunkKeys, key_end - begin), num_rows};
    KeyRows<BFloat16> rows[kChunkKeys / kTile];
    for (int i = 0; i * kTile < block.num_keys; ++i) rows[i].fill(shape, tile, begin + i * kTile, key_end);
    take_keys(shape, rows, block.num_keys, scratch, block.groups);
    engine.pack_v(shape, rows, block.num_keys, scratch);
    const int next = begin + block.num_keys;
    ReadAhead ahead(shape, tile, next, smaller(next + kChunkKeys, key_end), num_pairs * (kChunkKeys / kGroup));
    for (int pair = 0; pair < num_pairs; ++pair) {
      if (block.seen_by(pair) > 0) attend_pair(engine, block, pair, ahead);
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
