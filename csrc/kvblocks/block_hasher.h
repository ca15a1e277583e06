// Chained hashes of KV blocks, bit for bit vLLM's for the algorithms over canonical CBOR.
//
//   h[0] = H(CBOR([none_hash, tokens of block 0, extra keys of block 0 or null]))
//   h[i] = H(CBOR([h[i-1],    tokens of block i, extra keys of block i or null]))
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvblocks/block_encoder.h"
#include "kvblocks/sha256.h"

namespace kvblocks {

enum class Algorithm {
  kSha256Cbor,  // SHA-256, 32-byte digests
  kXxhashCbor,  // XXH3-128 in canonical (big-endian) form, 16-byte digests
};

// Which instructions may be used; the results are equal.
enum class Isa { kBest, kPortable };

constexpr std::size_t digest_size_of(Algorithm algorithm) {
  return algorithm == Algorithm::kSha256Cbor ? kSha256DigestBytes : 16;
}

// The form of a digest that KV events carry: its last 8 bytes, read big-endian.
// REQUIRES: digest.size() >= 8.
std::uint64_t external_hash(std::span<const std::uint8_t> digest);

// The extra keys of the blocks of a chain, CBOR-encoded by the caller and laid end to end: those of block i are
// bytes[offsets[i] .. offsets[i+1]), none if that range is empty. No offsets at all: no block has any.
struct ExtraKeys {
  std::span<const std::uint8_t> bytes;
  std::span<const std::uint64_t> offsets;
};

// Immutable, so any number of threads may use one.
class BlockHasher {
 public:
  // `none_hash` is the digest standing for the parent of a sequence's first block.
  // Throws std::invalid_argument if it is not digest_size_of(algorithm) bytes long, or if block_size is 0.
  BlockHasher(Algorithm algorithm, std::span<const std::uint8_t> none_hash, std::size_t block_size,
              Isa isa = Isa::kBest);

  std::size_t block_size() const { return block_size_; }
  std::size_t digest_size() const { return none_hash_.size(); }
  std::size_t num_blocks(std::size_t num_tokens) const { return num_tokens / block_size_; }

  // Writes the digests of the full blocks of `tokens`, end to end, into `out`; a tail shorter than a block is ignored.
  // `parent` is the digest of the block before the first of these; empty at the start of a sequence.
  // Throws std::invalid_argument if `out` is not num_blocks * digest_size long, `parent` neither empty nor digest_size,
  // or `extra.offsets` neither empty nor num_blocks + 1 ascending offsets into `extra.bytes`.
  void hash_chain(std::span<const std::uint32_t> tokens, std::span<const std::uint8_t> parent, const ExtraKeys& extra,
                  std::span<std::uint8_t> out) const;

 private:
  Algorithm algorithm_;
  std::vector<std::uint8_t> none_hash_;
  std::size_t block_size_;
  Sha256Compress compress_;
  TokenWriter write_tokens_;
};

}  // namespace kvblocks
