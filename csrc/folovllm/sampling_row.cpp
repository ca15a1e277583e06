#include "sampling_row.h"

#include <array>
#include <cmath>
#include <limits>

namespace folovllm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
// Tokens of one piece of a row; a multiple of kBlock and kSegment.
constexpr std::int64_t kPiece = 16384;
// A nucleus is looked for among so many tokens first: with a trained model it is rarely larger.
constexpr std::int64_t kFirstNucleus = 256;

template <typename F>
void for_pieces(std::int64_t size, bool in_pieces, F&& body) {
  const std::int64_t num_pieces = (size + kPiece - 1) / kPiece;
  const auto run = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
      body(piece * kPiece, std::min(kPiece, size - piece * kPiece));
    }
  };
  if (in_pieces) return parallel_for(num_pieces, 1, run);
  run(0, num_pieces);
}

void find_maxima(const Row& row, bool in_pieces, Scratch& scratch) {
  scratch.maxima.resize(static_cast<std::size_t>((row.size + kBlock - 1) / kBlock * kGroups));
  const auto kernel = sampling_kernels().block_maxima;
  for_pieces(row.size, in_pieces, [&](std::int64_t begin, std::int64_t count) {
    kernel(row.logits + begin, count, scratch.maxima.data() + begin / kBlock * kGroups);
  });
}

double find_masses(const Row& row, const Softmax& softmax, bool in_pieces, Scratch& scratch) {
  scratch.masses.resize(static_cast<std::size_t>((row.size + kSegment - 1) / kSegment));
  const auto kernel = sampling_kernels().segment_masses;
  for_pieces(row.size, in_pieces, [&](std::int64_t begin, std::int64_t count) {
    kernel(softmax, row.logits + begin, count, scratch.masses.data() + begin / kSegment);
  });
  double total = 0.0;
  for (const float mass : scratch.masses) total += mass;
  return total;
}

Softmax softmax_of(const Row& row, float max) {
  Softmax softmax{std::min(max, kLargest), std::min(1.0F / row.temperature, kLargest), -kInfinity};
  if (max == kInfinity) {
    softmax.cut = kInfinity;  // only these are possible
  } else if (row.min_p > 0.0F) {
    const double cut = max + static_cast<double>(row.temperature) * std::log(static_cast<double>(row.min_p));
    softmax.cut = std::min(static_cast<float>(cut), max);
  }
  return softmax;
}

// The first index whose cumulative weight, from `before` on, exceeds `target`; else the last one with weight.
std::int64_t invert(const float* weights, std::int64_t size, double before, double target) {
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (weights[i] == 0.0F) continue;
    last = i;
    before += weights[i];
    if (before > target) break;
  }
  return last;
}

// Among all tokens, by id: the segment first.
std::int64_t draw_by_id(const Row& row, const Softmax& softmax, double total, Scratch& scratch) {
  const double target = row.uniform * total;
  double before = 0.0;
  double ahead = 0.0;  // of the segment chosen last
  std::size_t segment = 0;
  for (std::size_t i = 0; i < scratch.masses.size(); ++i) {
    if (scratch.masses[i] == 0.0F) continue;
    segment = i;
    ahead = before;
    before += scratch.masses[i];
    if (before > target) break;
  }
  const std::int64_t begin = static_cast<std::int64_t>(segment) * kSegment;
  const std::int64_t count = std::min(kSegment, row.size - begin);
  std::array<float, kSegment> weights;
  sampling_kernels().weights(softmax, row.logits + begin, count, weights.data());
  return begin + invert(weights.data(), count, ahead, target);
}

// The weights of scratch.keys; returns their sum.
double weigh_candidates(const Softmax& softmax, Scratch& scratch) {
  scratch.values.clear();
  for (const RankKey key : scratch.keys) scratch.values.push_back(logit_of(key));
  scratch.weights.resize(scratch.values.size());
  sampling_kernels().weights(softmax, scratch.values.data(), static_cast<std::int64_t>(scratch.values.size()),
                             scratch.weights.data());
  double total = 0.0;
  for (const float weight : scratch.weights) total += weight;
  return total;
}

// Among scratch.keys, down to where they reach `wanted`.
std::int64_t draw_candidate(double wanted, double uniform, const Scratch& scratch) {
  double mass = 0.0;
  std::size_t count = 0;
  while (count < scratch.weights.size() && (count == 0 || mass < wanted)) mass += scratch.weights[count++];
  const std::int64_t rank = invert(scratch.weights.data(), static_cast<std::int64_t>(count), 0.0, uniform * mass);
  return token_of(scratch.keys[static_cast<std::size_t>(rank)]);
}

std::int64_t draw_top_k(const Row& row, const Softmax& softmax, Scratch& scratch) {
  if (!can_find_top(row.size, row.top_k)) return draw_ranked(row, softmax, scratch);
  find_top(row, row.top_k, softmax.cut, scratch);
  const double total = weigh_candidates(softmax, scratch);
  return draw_candidate(row.top_p < 1.0F ? static_cast<double>(row.top_p) * total : kInfinity, row.uniform, scratch);
}

std::int64_t draw_top_p(const Row& row, const Softmax& softmax, double total, Scratch& scratch) {
  const std::int64_t k = std::min(kFirstNucleus, row.size);
  if (!can_find_top(row.size, k)) return draw_ranked(row, softmax, scratch);
  find_top(row, k, softmax.cut, scratch);
  const double wanted = static_cast<double>(row.top_p) * total;
  const bool are_all = static_cast<std::int64_t>(scratch.keys.size()) < k || k == row.size;
  if (weigh_candidates(softmax, scratch) < wanted && !are_all) return draw_ranked(row, softmax, scratch);
  return draw_candidate(wanted, row.uniform, scratch);
}

}  // namespace

std::int64_t sample_row(const Row& row, bool in_pieces, Scratch& scratch) {
  find_maxima(row, in_pieces, scratch);
  const float max = *std::max_element(scratch.maxima.begin(), scratch.maxima.end());
  if (max == -kInfinity) {
    const Best first = sampling_kernels().argmax[0](row.logits, row.size);
    return std::max<std::int64_t>(first.index, 0);
  }
  const Softmax softmax = softmax_of(row, max);
  if (row.top_k > 0) return draw_top_k(row, softmax, scratch);
  const double total = find_masses(row, softmax, in_pieces, scratch);
  if (row.top_p < 1.0F) return draw_top_p(row, softmax, total, scratch);
  return draw_by_id(row, softmax, total, scratch);
}

}  // namespace folovllm
