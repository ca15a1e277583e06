// Which evictable leaf goes first. A policy is one function from what a node remembers to a priority: the evictable
// leaf of lowest priority is evicted first. It is asked when a node becomes evictable; a node is never used while
// evictable (using it locks it), so its priority cannot change then.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace flexkv {

// What a node remembers of its use. Times are ticks of the tree's clock, of which 2^48 are enough for years.
struct NodeUse {
  static constexpr std::uint64_t kMostUses = (1U << 16) - 1;

  std::uint64_t last_access : 48 = 0;
  std::uint64_t num_uses : 16 = 0;  // its insertion is one; no more are counted than kMostUses
  std::uint64_t inserted : 48 = 0;

  void touch(std::uint64_t now) {
    last_access = now;
    if (num_uses < kMostUses) ++num_uses;
  }
};

using PriorityFunction = std::uint64_t (*)(const NodeUse&);

struct EvictionPolicy {
  std::string_view name;
  PriorityFunction priority;
};

inline constexpr std::array kEvictionPolicies = {
    // Least recently used.
    EvictionPolicy{"lru", [](const NodeUse& use) { return std::uint64_t{use.last_access}; }},
    // Least frequently used; of these the least recently used.
    EvictionPolicy{"lfu", [](const NodeUse& use) { return std::uint64_t{use.num_uses} << 48 | use.last_access; }},
    // First in, first out.
    EvictionPolicy{"fifo", [](const NodeUse& use) { return std::uint64_t{use.inserted}; }},
    // Most recently used: for scans that come round again and are longer than the tier.
    EvictionPolicy{"mru", [](const NodeUse& use) { return ~std::uint64_t{use.last_access}; }},
    // Segmented: what was never used again goes before what was, in each segment the least recently used first, so that
    // prompts that come once do not drive out conversations.
    EvictionPolicy{"slru", [](const NodeUse& use) { return std::uint64_t{use.num_uses > 1} << 48 | use.last_access; }},
};

// The policy of that name, or nullptr.
inline const EvictionPolicy* find_eviction_policy(std::string_view name) {
  for (const EvictionPolicy& policy : kEvictionPolicies) {
    if (policy.name == name) return &policy;
  }
  return nullptr;
}

}  // namespace flexkv
