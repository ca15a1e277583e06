// Which evictable leaf goes first. A policy is one function from what a node remembers to a priority: the evictable
// leaf of lowest priority is evicted first. It is asked when a node becomes evictable; a node is never used while
// evictable (using it locks it), so its priority cannot change then.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace flexkv {

// What a node remembers of its use. Times are ticks of the tree's clock.
struct NodeUse {
  std::uint64_t last_access = 0;
  std::uint32_t num_hits = 0;
};

using PriorityFunction = std::uint64_t (*)(const NodeUse&);

struct EvictionPolicy {
  std::string_view name;
  PriorityFunction priority;
};

inline constexpr std::array kEvictionPolicies = {
    EvictionPolicy{"lru", [](const NodeUse& use) { return use.last_access; }},
};

// The policy of that name, or nullptr.
inline const EvictionPolicy* find_eviction_policy(std::string_view name) {
  for (const EvictionPolicy& policy : kEvictionPolicies) {
    if (policy.name == name) return &policy;
  }
  return nullptr;
}

}  // namespace flexkv
