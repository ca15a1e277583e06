// Draws by rank among any number of tokens, by a histogram of their logits' upper bits: how many tokens lie in each
// bucket, and their mass. A border (the k-th token, the end of the nucleus, the drawn token) is looked for bucket by
// bucket, and then inside one bucket only.
#include <array>

#include "sampling_row.h"

namespace folovllm {
namespace {

// Sign, exponent and three bits of the significand.
constexpr int kBucketShift = 20;
constexpr std::size_t kNumBuckets = 1U << (32 - kBucketShift);
// So many tokens are sorted; more are halved first.
constexpr std::int64_t kSorted = 64;

// A token by rank, with the number and mass of all down to it.
struct Place {
  RankKey key;
  std::int64_t count;
  double mass;
};

class Ranks {
 public:
  Ranks(const Row& row, const Softmax& softmax, Scratch& scratch)
      : row_(row), softmax_(softmax), scratch_(scratch), kernels_(sampling_kernels()) {
    fill_buckets();
  }

  double mass() const { return mass_; }

  // The first place where has_passed(count, mass) holds; the last one if it never does.
  template <typename F>
  Place find(F&& has_passed) {
    std::int64_t count = 0;
    double mass = 0.0;
    std::size_t bucket = 0;
    std::size_t last = 0;
    for (; bucket < kNumBuckets; ++bucket) {
      const Bucket& here = scratch_.buckets[bucket];
      if (here.count == 0) continue;
      last = bucket;
      if (has_passed(count + here.count, mass + here.mass)) break;
      count += here.count;
      mass += here.mass;
    }
    if (bucket == kNumBuckets) {
      count -= scratch_.buckets[last].count;
      mass -= scratch_.buckets[last].mass;
    }
    gather(last);
    return find_in_bucket(count, mass, has_passed);
  }

 private:
  void fill_buckets() {
    scratch_.buckets.assign(kNumBuckets, Bucket{0, 0.0});
    std::array<float, kSegment> weights;
    for (std::int64_t begin = 0; begin < row_.size; begin += kSegment) {
      const std::int64_t count = std::min(kSegment, row_.size - begin);
      kernels_.weights(softmax_, row_.logits + begin, count, weights.data());
      for (std::int64_t i = 0; i < count; ++i) {
        const float weight = weights[static_cast<std::size_t>(i)];
        if (weight == 0.0F) continue;
        Bucket& bucket = scratch_.buckets[falling_bits(row_.logits[begin + i]) >> kBucketShift];
        ++bucket.count;
        bucket.mass += weight;
      }
    }
    for (const Bucket& bucket : scratch_.buckets) mass_ += bucket.mass;
  }

  // The tokens of one bucket, by id, into scratch.bucket.
  void gather(std::size_t bucket) {
    const auto first = static_cast<std::uint32_t>(bucket << kBucketShift);
    const float low = logit_of_bits(first | ((1U << kBucketShift) - 1U));
    float high = logit_of_bits(first);
    if (!(high >= low)) high = low;  // the bucket of infinity begins among NaN
    std::vector<RankedToken>& tokens = scratch_.bucket;
    tokens.clear();
    std::array<std::int32_t, kSegment> found;
    std::array<float, kSegment> weights;
    for (std::int64_t begin = 0; begin < row_.size; begin += kSegment) {
      const float* const logits = row_.logits + begin;
      const std::int64_t count = std::min(kSegment, row_.size - begin);
      const std::int64_t num_found = kernels_.find_between(logits, count, low, high, found.data());
      if (num_found == 0) continue;
      kernels_.weights(softmax_, logits, count, weights.data());
      for (std::int64_t i = 0; i < num_found; ++i) {
        const std::int32_t at = found[static_cast<std::size_t>(i)];
        const float weight = weights[static_cast<std::size_t>(at)];
        // 0 is the border of two buckets with either sign.
        if (weight == 0.0F || falling_bits(logits[at]) >> kBucketShift != bucket) continue;
        tokens.push_back({rank_key(logits[at], begin + at), weight});
      }
    }
  }

  template <typename F>
  Place find_in_bucket(std::int64_t count, double mass, F&& has_passed) {
    const auto by_rank = [](const RankedToken& a, const RankedToken& b) { return a.key < b.key; };
    auto begin = scratch_.bucket.begin();
    auto end = scratch_.bucket.end();
    while (end - begin > kSorted) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, by_rank);
      double first_half = 0.0;
      for (auto token = begin; token != middle; ++token) first_half += token->weight;
      if (has_passed(count + (middle - begin), mass + first_half)) {
        end = middle;
      } else {
        count += middle - begin;
        mass += first_half;
        begin = middle;
      }
    }
    std::sort(begin, end, by_rank);
    Place place{0, count, mass};
    for (auto token = begin; token != end; ++token) {
      place = {token->key, place.count + 1, place.mass + token->weight};
      if (has_passed(place.count, place.mass)) break;
    }
    return place;
  }

  const Row& row_;
  const Softmax& softmax_;
  Scratch& scratch_;
  const SamplingKernels& kernels_;
  double mass_ = 0.0;
};

}  // namespace

std::int64_t draw_ranked(const Row& row, const Softmax& softmax, Scratch& scratch) {
  Ranks ranks(row, softmax, scratch);
  Place end{~RankKey{0}, row.size, ranks.mass()};
  if (row.top_k > 0) end = ranks.find([&](std::int64_t count, double) { return count >= row.top_k; });
  if (row.top_p < 1.0F) {
    const double wanted = static_cast<double>(row.top_p) * end.mass;
    const Place nucleus = ranks.find([&](std::int64_t, double mass) { return mass >= wanted; });
    if (nucleus.key < end.key) end = nucleus;
  }
  const double target = row.uniform * end.mass;
  const Place drawn = ranks.find([&](std::int64_t, double mass) { return mass > target; });
  return token_of(std::min(drawn.key, end.key));
}

}  // namespace folovllm
