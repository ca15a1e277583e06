// The read path of BlockIndex: one walk over a prompt's keys, under the shared lock.
#include <algorithm>
#include <shared_mutex>

#include "kvrouter/block_index.h"

namespace kvrouter {
namespace {

constexpr std::size_t kPrefetchDistance = 16;

// Per-pod scratch of one thread; stamps make clearing it free.
struct Scratch {
  std::vector<double> best;            // by pod: weight of its best tier in the current set
  std::vector<std::uint64_t> stamp;    // by pod: `best` is of the set with this stamp
  std::vector<std::uint64_t> allowed;  // by pod: asked about, if equal to the call's stamp
  std::uint64_t last_stamp = 0;

  void resize(std::size_t num_pods) {
    if (best.size() >= num_pods) return;
    best.resize(num_pods);
    stamp.resize(num_pods, 0);
    allowed.resize(num_pods, 0);
  }
};

thread_local Scratch scratch;

}  // namespace

// Splits a prompt's keys into runs with one set of owners each. REQUIRES: the table stays locked while it lives.
class BlockIndex::Walk {
 public:
  Walk(const BlockTable& table, std::span<const std::uint64_t> keys) : table_(table), keys_(keys) {}

  // Finds the next run; its set may equal the previous one's. False at the first key that nobody holds, and at the end.
  bool next() {
    position_ += length_;
    length_ = 0;
    if (position_ == keys_.size()) return false;
    const SlotId guess = slot_ + 1;
    slot_ = table_.find_next(keys_[position_], slot_);
    if (slot_ == kNoSlot) return false;
    if (slot_ != guess) prefetch();
    table_.touch(slot_);
    const std::size_t more = table_.run_length(slot_, keys_.subspan(position_ + 1));
    slot_ += static_cast<SlotId>(more);
    length_ = more + 1;
    return true;
  }

  std::size_t length() const { return length_; }
  SetId set() const { return table_.set_of(slot_); }

 private:
  // The chain left its neighbourhood: the keys to come are probably scattered too.
  void prefetch() {
    const std::size_t limit = std::min(position_ + 1 + kPrefetchDistance, keys_.size());
    for (prefetched_ = std::max(prefetched_, position_ + 1); prefetched_ < limit; ++prefetched_) {
      table_.prefetch(keys_[prefetched_]);
    }
  }

  const BlockTable& table_;
  std::span<const std::uint64_t> keys_;
  std::size_t position_ = 0;
  std::size_t length_ = 0;
  std::size_t prefetched_ = 0;
  SlotId slot_ = kNoSlot;
};

std::vector<BlockIndex::Run> BlockIndex::lookup(std::span<const std::uint64_t> keys, const PodFilter& pods) const {
  std::vector<Run> runs;
  const std::shared_lock lock(table_mutex_);
  std::vector<bool> allowed(pod_names_.size(), !pods);
  for (const std::string& name : pods.value_or(std::vector<std::string>{})) {
    const auto pod = pods_.find(name);
    if (pod != pods_.end()) allowed[pod->second] = true;
  }
  SetId previous = kEmptySet;
  for (Walk walk(table_, keys); walk.next(); previous = walk.set()) {
    if (walk.set() == previous) {
      runs.back().num_keys += walk.length();
      continue;
    }
    Run run{walk.length(), {}};
    for (const OwnerId owner : table_.sets().owners(walk.set())) {
      if (allowed[owners_[owner].pod]) run.owners.push_back(owner);
    }
    if (run.owners.empty()) break;
    runs.push_back(std::move(run));
  }
  return runs;
}

std::vector<std::pair<std::string_view, double>> BlockIndex::score(std::span<const std::uint64_t> keys,
                                                                   const PodFilter& pods, const TierWeights& weights,
                                                                   double default_weight) const {
  struct Candidate {
    PodId pod;
    double weight;
    double total;
  };
  std::vector<Candidate> candidates;  // the first num_alive of them still hold every key so far
  std::size_t num_alive = 0;

  const std::shared_lock lock(table_mutex_);
  std::vector<double> tier_weights(tier_names_.size(), default_weight);
  for (const auto& [tier, weight] : weights) {
    const auto known = tiers_.find(tier);
    if (known != tiers_.end()) tier_weights[known->second] = weight;
  }
  Scratch& pod_state = scratch;
  pod_state.resize(pod_names_.size());
  const std::uint64_t call = ++pod_state.last_stamp;
  if (pods) {
    for (const std::string& name : *pods) {
      const auto pod = pods_.find(name);
      if (pod != pods_.end()) pod_state.allowed[pod->second] = call;
    }
  }

  SetId previous = kEmptySet;
  for (Walk walk(table_, keys); walk.next(); previous = walk.set()) {
    if (walk.set() != previous) {
      const std::uint64_t stamp = ++pod_state.last_stamp;
      for (const OwnerId id : table_.sets().owners(walk.set())) {
        const Owner& owner = owners_[id];
        const double weight = tier_weights[owner.tier];
        if (pod_state.stamp[owner.pod] == stamp) {
          pod_state.best[owner.pod] = std::max(pod_state.best[owner.pod], weight);
          continue;
        }
        pod_state.stamp[owner.pod] = stamp;
        pod_state.best[owner.pod] = weight;
        if (previous == kEmptySet && (!pods || pod_state.allowed[owner.pod] == call)) {
          candidates.push_back({owner.pod, weight, 0.0});
        }
      }
      if (previous == kEmptySet) num_alive = candidates.size();
      for (std::size_t i = 0; i < num_alive;) {
        if (pod_state.stamp[candidates[i].pod] == stamp) {
          candidates[i].weight = pod_state.best[candidates[i].pod];
          ++i;
        } else {
          std::swap(candidates[i], candidates[--num_alive]);
        }
      }
      if (num_alive == 0) break;
    }
    for (std::size_t i = 0; i < num_alive; ++i) {
      candidates[i].total += candidates[i].weight * static_cast<double>(walk.length());
    }
  }

  std::vector<std::pair<std::string_view, double>> scores;
  scores.reserve(candidates.size());
  for (const Candidate& candidate : candidates) scores.emplace_back(*pod_names_[candidate.pod], candidate.total);
  return scores;
}

}  // namespace kvrouter
