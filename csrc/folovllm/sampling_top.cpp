// The k most likely tokens, from the maxima of groups of tokens.
//
// The k-th largest maximum is a threshold: at least k tokens reach it, one in each of k groups, and fewer than k groups
// hold one above it. So what is above it is few, and is found by looking into few blocks.
#include "sampling_row.h"

#include <functional>
#include <limits>

namespace folovllm {
namespace {

// Groups per wanted token: with so many, about one in sixteen candidates is one too many.
constexpr std::int64_t kGroupsPerToken = 8;
// All tokens of a vocabulary of this size may be candidates.
constexpr std::int64_t kSmallVocabulary = 8192;

// Fewer maxima, each over several blocks: enough for k, and quicker to select from.
void coarsen(const std::vector<float>& maxima, std::int64_t k, std::vector<float>& coarse) {
  const auto num_maxima = static_cast<std::int64_t>(maxima.size());
  const std::int64_t num_blocks = std::max<std::int64_t>(1, num_maxima / (kGroupsPerToken * k));
  coarse.clear();
  for (std::int64_t begin = 0; begin < num_maxima; begin += num_blocks * kGroups) {
    const std::int64_t end = std::min(begin + num_blocks * kGroups, num_maxima);
    float best[kGroups];
    std::copy_n(maxima.begin() + begin, kGroups, best);
    for (std::int64_t i = begin + kGroups; i < end; i += kGroups) {
      for (std::int64_t group = 0; group < kGroups; ++group) {
        best[group] = std::max(best[group], maxima[static_cast<std::size_t>(i + group)]);
      }
    }
    coarse.insert(coarse.end(), best, best + kGroups);
  }
}

float threshold(std::int64_t k, Scratch& scratch) {
  if (static_cast<std::int64_t>(scratch.maxima.size()) < k) return -std::numeric_limits<float>::infinity();
  std::vector<float>& coarse = scratch.coarse;
  coarsen(scratch.maxima, k, coarse);
  if (static_cast<std::int64_t>(coarse.size()) < k) coarse = scratch.maxima;
  std::nth_element(coarse.begin(), coarse.begin() + (k - 1), coarse.end(), std::greater<>());
  return coarse[static_cast<std::size_t>(k - 1)];
}

bool any_reaches(const float* maxima, float low) {
  bool any = false;
  for (std::int64_t group = 0; group < kGroups; ++group) any |= maxima[group] >= low;
  return any;
}

}  // namespace

bool can_find_top(std::int64_t size, std::int64_t k) {
  return size <= kSmallVocabulary || 2 * k <= size / kBlock * kGroups;
}

void find_top(const Row& row, std::int64_t k, float cut, Scratch& scratch) {
  const SamplingKernels& kernels = sampling_kernels();
  const float low = std::max(threshold(k, scratch), cut);
  std::vector<RankKey>& keys = scratch.keys;
  keys.clear();
  std::int64_t num_equal = 0;
  for (std::int64_t begin = 0; begin < row.size; begin += kBlock) {
    if (!any_reaches(scratch.maxima.data() + begin / kBlock * kGroups, low)) continue;
    std::int32_t found[kBlock];
    const std::int64_t num_found =
        kernels.find_between(row.logits + begin, std::min(kBlock, row.size - begin), low,
                             std::numeric_limits<float>::infinity(), found);
    for (std::int64_t i = 0; i < num_found; ++i) {
      const std::int64_t id = begin + found[i];
      // Of equals at the border the first k are more than enough.
      if (row.logits[id] == low && ++num_equal > k) continue;
      keys.push_back(rank_key(row.logits[id], id));
    }
  }
  if (static_cast<std::int64_t>(keys.size()) > k) {
    std::nth_element(keys.begin(), keys.begin() + k, keys.end());
    keys.resize(static_cast<std::size_t>(k));
  }
  std::sort(keys.begin(), keys.end());
}

}  // namespace folovllm
