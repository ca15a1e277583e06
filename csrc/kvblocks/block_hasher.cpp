#include "kvblocks/block_hasher.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kvblocks {
namespace {

constexpr std::size_t kSha256LengthBytes = 8;

// Pads the message of `size` bytes at `data` (a one bit, zeros, its length in bits) and returns its number of blocks.
// REQUIRES: 2 * kSha256BlockBytes bytes are writable behind the message.
std::size_t sha256_pad(std::uint8_t* data, std::size_t size) {
  const std::size_t num_blocks = (size + 1 + kSha256LengthBytes + kSha256BlockBytes - 1) / kSha256BlockBytes;
  std::memset(data + size, 0, kSha256BlockBytes + kSha256LengthBytes);  // of fixed size, so without a call
  data[size] = 0x80;
  std::uint8_t* end = data + num_blocks * kSha256BlockBytes;
  for (std::uint64_t bits = std::uint64_t{size} * 8; bits != 0; bits >>= 8) *--end = static_cast<std::uint8_t>(bits);
  return num_blocks;
}

void sha256_digest(Sha256Compress compress, std::uint8_t* data, std::size_t size, std::uint8_t* digest) {
  Sha256State state = kSha256InitialState;
  compress(state, data, sha256_pad(data, size));
  sha256_store_digest(state, digest);
}

void xxhash_digest(const std::uint8_t* data, std::size_t size, std::uint8_t* digest) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, size));
  std::memcpy(digest, canonical.digest, sizeof canonical.digest);
}

// Returns the size of the longest extra keys of any block.
std::size_t check_extra_keys(const ExtraKeys& extra, std::size_t num_blocks) {
  if (extra.offsets.empty()) return 0;
  if (extra.offsets.size() != num_blocks + 1 || extra.offsets.back() > extra.bytes.size()) {
    throw std::invalid_argument("extra key offsets are not one more than the blocks, or exceed the bytes");
  }
  std::uint64_t longest = 0;
  for (std::size_t i = 0; i < num_blocks; ++i) {
    if (extra.offsets[i] > extra.offsets[i + 1]) throw std::invalid_argument("extra key offsets descend");
    longest = std::max(longest, extra.offsets[i + 1] - extra.offsets[i]);
  }
  return longest;
}

}  // namespace

std::uint64_t external_hash(std::span<const std::uint8_t> digest) {
  std::uint64_t value = 0;
  for (const std::uint8_t byte : digest.last(8)) value = value << 8 | byte;
  return value;
}

BlockHasher::BlockHasher(Algorithm algorithm, std::span<const std::uint8_t> none_hash, std::size_t block_size, Isa isa)
    : algorithm_(algorithm),
      none_hash_(none_hash.begin(), none_hash.end()),
      block_size_(block_size),
      compress_(isa == Isa::kBest && sha256_ni_supported() ? sha256_compress_ni : sha256_compress_portable),
      write_tokens_(isa == Isa::kBest ? best_token_writer() : write_tokens_portable) {
  if (none_hash.size() != digest_size_of(algorithm)) throw std::invalid_argument("none_hash has the wrong size");
  if (block_size == 0) throw std::invalid_argument("block_size is 0");
}

void BlockHasher::hash_chain(std::span<const std::uint32_t> tokens, std::span<const std::uint8_t> parent,
                             const ExtraKeys& extra, std::span<std::uint8_t> out) const {
  const std::size_t count = num_blocks(tokens.size());
  const std::size_t digest_size = none_hash_.size();
  if (parent.empty()) parent = none_hash_;
  if (parent.size() != digest_size) throw std::invalid_argument("parent has the wrong size");
  if (out.size() != count * digest_size) throw std::invalid_argument("out has the wrong size");
  BlockEncoder encoder(write_tokens_, digest_size, block_size_, check_extra_keys(extra, count), 2 * kSha256BlockBytes);

  // Blocks wait for one another, so the latency of a block is all that counts: of 16 tokens, 104 ns, of which the
  // rounds of its two SHA-256 blocks are 74 (SHA extensions). Slower when measured: shifting the parent's digest into
  // place in registers instead of through memory, alone and together with encoding one block ahead.
  const std::uint8_t* previous = parent.data();
  std::uint8_t* digest = out.data();
  for (std::size_t i = 0; i < count; ++i, digest += digest_size) {
    std::span<const std::uint8_t> keys;
    if (!extra.offsets.empty()) {
      keys = extra.bytes.subspan(extra.offsets[i], extra.offsets[i + 1] - extra.offsets[i]);
    }
    const std::size_t size = encoder.encode(tokens.subspan(i * block_size_, block_size_), keys);
    std::memcpy(encoder.parent(), previous, digest_size);
    if (algorithm_ == Algorithm::kSha256Cbor) {
      sha256_digest(compress_, encoder.data(), size, digest);
    } else {
      xxhash_digest(encoder.data(), size, digest);
    }
    previous = digest;
  }
}

}  // namespace kvblocks
