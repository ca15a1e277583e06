// SHA-256 over whole messages that the caller has already padded (FIPS 180-4), by the SHA extensions of x86 where the
// CPU has them and in portable C++ elsewhere.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvblocks {

inline constexpr std::size_t kSha256BlockBytes = 64;
inline constexpr std::size_t kSha256DigestBytes = 32;

// The eight working words a..h between two message blocks.
using Sha256State = std::array<std::uint32_t, 8>;

inline constexpr Sha256State kSha256InitialState = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// The 64 round constants.
extern const std::array<std::uint32_t, 64> kSha256RoundConstants;

// Folds `num_blocks` message blocks of 64 bytes at `message` into `state`.
// REQUIRES: num_blocks >= 1 for the result to differ from the argument; no alignment.
using Sha256Compress = void (*)(Sha256State& state, const std::uint8_t* message, std::size_t num_blocks);

void sha256_compress_portable(Sha256State& state, const std::uint8_t* message, std::size_t num_blocks);

// REQUIRES: sha256_ni_supported().
void sha256_compress_ni(Sha256State& state, const std::uint8_t* message, std::size_t num_blocks);

// Whether this CPU has the SHA extensions (and the SSSE3 and SSE4.1 that go with them). Always false off x86.
bool sha256_ni_supported();

// Writes the state as a digest: 32 bytes, each word big-endian.
void sha256_store_digest(const Sha256State& state, std::uint8_t* digest);

}  // namespace kvblocks
