// What the open-addressing tables here share: where a key's search starts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvrouter {

// Spreads a key over 64 bits; block keys are hashes already, but callers may use small numbers.
constexpr std::uint64_t mix(std::uint64_t key) {
  key ^= key >> 32;
  key *= 0x9e3779b97f4a7c15u;
  key ^= key >> 29;
  key *= 0xd6e8feb86659fd93u;
  return key ^ (key >> 32);
}

// First slot for `mixed` among `num_slots`, which need not be a power of two. REQUIRES: num_slots < 2**32.
// Source: Lemire, "A fast alternative to the modulo reduction".
inline std::size_t home_slot(std::uint64_t mixed, std::size_t num_slots) {
  return static_cast<std::size_t>((mixed >> 32) * num_slots >> 32);
}

}  // namespace kvrouter
