// One row of sampling.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "sampling_kernels.h"
#include "thread_pool.h"

namespace folovllm {

// A row's logits and options.
struct Row {
  const float* logits;
  std::int64_t size;
  float temperature;
  std::int64_t top_k;  // 0: all
  float top_p;
  float min_p;
  double uniform;
};

// Where a token stands: falling logit, then rising id. Sorts as a number. -0 is 0; not for NaN.
//
//   63        32 31         0
//   | ~ordered  |    id     |
using RankKey = std::uint64_t;

constexpr std::uint32_t kSign = 0x80000000U;

inline std::uint32_t falling_bits(float logit) {
  const auto bits = std::bit_cast<std::uint32_t>(logit + 0.0F);
  return (bits & kSign) != 0 ? bits : ~(bits | kSign);
}

inline float logit_of_bits(std::uint32_t falling) {
  return std::bit_cast<float>((falling & kSign) != 0 ? falling : ~falling & ~kSign);
}

inline RankKey rank_key(float logit, std::int64_t id) {
  return RankKey{falling_bits(logit)} << 32 | static_cast<std::uint32_t>(id);
}

inline std::int64_t token_of(RankKey key) { return static_cast<std::int64_t>(key & 0xffffffffU); }

inline float logit_of(RankKey key) { return logit_of_bits(static_cast<std::uint32_t>(key >> 32)); }

struct Bucket {
  std::int64_t count;
  double mass;
};

struct RankedToken {
  RankKey key;
  float weight;
};

// Memory of one thread, kept from row to row.
struct Scratch {
  std::vector<float> maxima;  // of block_maxima
  std::vector<float> coarse;
  std::vector<float> masses;  // of segment_masses
  std::vector<RankKey> keys;
  std::vector<float> values;
  std::vector<float> weights;
  std::vector<Bucket> buckets;
  std::vector<RankedToken> bucket;
};

// The token of a row. With `in_pieces` its vocabulary is shared among the threads, which does not change the result.
std::int64_t sample_row(const Row& row, bool in_pieces, Scratch& scratch);

// Up to k tokens of at least `cut`, by rank: into scratch.keys. Needs scratch.maxima. REQUIRES: can_find_top(size, k).
void find_top(const Row& row, std::int64_t k, float cut, Scratch& scratch);

// Whether k is so small against the vocabulary (or the vocabulary so small) that find_top is cheap.
bool can_find_top(std::int64_t size, std::int64_t k);

// Draws under any top_k and top_p (1 and above: none) from tokens of any number.
std::int64_t draw_ranked(const Row& row, const Softmax& softmax, Scratch& scratch);

}  // namespace folovllm
