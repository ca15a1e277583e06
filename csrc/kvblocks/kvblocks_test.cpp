#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvblocks/block_encoder.h"
#include "kvblocks/block_hasher.h"
#include "kvblocks/sha256.h"

namespace {

using namespace kvblocks;
using Bytes = std::vector<std::uint8_t>;

std::string hex(std::span<const std::uint8_t> bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Bytes hash_all(const BlockHasher& hasher, std::span<const std::uint32_t> tokens, std::span<const std::uint8_t> parent,
               const ExtraKeys& extra = {}) {
  Bytes out(hasher.num_blocks(tokens.size()) * hasher.digest_size());
  hasher.hash_chain(tokens, parent, extra, out);
  return out;
}

// Ids of all four encoded sizes, borders included.
std::vector<std::uint32_t> mixed_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  const std::vector<std::uint32_t> borders = {0, 23, 24, 255, 256, 65535, 65536, 0xFFFFFFFF};
  std::vector<std::uint32_t> tokens(count);
  for (auto& token : tokens) {
    token = random() % 2 ? borders[random() % borders.size()] : static_cast<std::uint32_t>(random()) >> (random() % 32);
  }
  return tokens;
}

TEST_CASE("SHA-256 of the standard's two-block message") {
  // FIPS 180-4 example: 56 letters, so the length goes into a second block.
  const std::string text = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  Bytes message(text.begin(), text.end());
  message.resize(128);
  message[56] = 0x80;
  message[126] = 0x01;
  message[127] = 0xC0;
  for (const Sha256Compress compress : {sha256_compress_portable, sha256_compress_ni}) {
    if (compress == sha256_compress_ni && !sha256_ni_supported()) continue;
    Sha256State state = kSha256InitialState;
    compress(state, message.data(), 2);
    Bytes digest(kSha256DigestBytes);
    sha256_store_digest(state, digest.data());
    CHECK(hex(digest) == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  }
}

TEST_CASE("the encoding of a block is canonical CBOR") {
  const std::vector<std::uint32_t> tokens = {0, 23, 24, 255, 256, 65535, 65536, 0xFFFFFFFF, 0x80000000};
  const std::string parent = "8350abababababababababababababababab";
  const std::string body = "890017181818ff19010019ffff1a000100001affffffff1a80000000";
  const Bytes extra = {0x81, 0x61, 0x78};
  for (const TokenWriter writer : {write_tokens_portable, best_token_writer()}) {
    BlockEncoder encoder(writer, 16, tokens.size(), extra.size(), 0);
    std::fill_n(encoder.parent(), 16, std::uint8_t{0xAB});
    CHECK(hex({encoder.data(), encoder.encode(tokens, {})}) == parent + body + "f6");
    CHECK(hex({encoder.data(), encoder.encode(tokens, extra)}) == parent + body + "816178");
  }
}

TEST_CASE("every token writer writes the same bytes") {
  for (std::size_t count = 0; count < 40; ++count) {
    const auto tokens = mixed_tokens(count, static_cast<unsigned>(count) + 100);
    Bytes best(5 * count + 8), portable(5 * count + 8);
    best.resize(static_cast<std::size_t>(best_token_writer()(best.data(), tokens) - best.data()));
    portable.resize(static_cast<std::size_t>(write_tokens_portable(portable.data(), tokens) - portable.data()));
    CHECK(best == portable);
  }
}

TEST_CASE("a chain equals vLLM's") {
  // tests/vectors/block_hashes.json: sha256_cbor, seed "0", tokens 0..63.
  const Bytes none_hash = {0x4e, 0x11, 0x95, 0xdf, 0x02, 0x0d, 0xe5, 0x9e, 0x0d, 0x65, 0xa3, 0x3a, 0x42, 0x79, 0xf1, 0x18,
                           0x3e, 0x7a, 0xe4, 0xe5, 0xd9, 0x80, 0xe3, 0x09, 0xf8, 0xb5, 0x5a, 0xdf, 0xf2, 0xe6, 0x1c, 0x3e};
  std::vector<std::uint32_t> tokens(64);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i);
  for (const Isa isa : {Isa::kBest, Isa::kPortable}) {
    const BlockHasher hasher(Algorithm::kSha256Cbor, none_hash, 16, isa);
    const Bytes digests = hash_all(hasher, tokens, {});
    CHECK(hex(std::span(digests).last(32)) == "b1f3544e8610283e85cddbae23bfcad68fa546e89c0fd85aed820e94dca2d75f");
    CHECK(external_hash(std::span(digests).first(32)) == 12687895063098490012u);
  }
}

TEST_CASE("every instruction set gives the same digests, whatever the block size and extra keys") {
  const Bytes none_hash(32, 7);
  for (std::size_t block_size : {1, 2, 3, 7, 8, 16, 17, 32, 64, 128, 300}) {
    const auto tokens = mixed_tokens(block_size * 9 + block_size / 2, static_cast<unsigned>(block_size));
    Bytes extra_bytes(1000, 0x5A);
    const std::vector<std::uint64_t> offsets = {0, 0, 1, 60, 60, 124, 300, 300, 300, 1000};
    const ExtraKeys extra{extra_bytes, offsets};
    const BlockHasher best(Algorithm::kSha256Cbor, none_hash, block_size);
    const BlockHasher portable(Algorithm::kSha256Cbor, none_hash, block_size, Isa::kPortable);
    CHECK(hash_all(best, tokens, {}) == hash_all(portable, tokens, {}));
    CHECK(hash_all(best, tokens, {}, extra) == hash_all(portable, tokens, {}, extra));
  }
}

TEST_CASE("a chain hashed in two parts equals the whole") {
  for (const Algorithm algorithm : {Algorithm::kSha256Cbor, Algorithm::kXxhashCbor}) {
    const BlockHasher hasher(algorithm, Bytes(digest_size_of(algorithm), 1), 16);
    const auto tokens = mixed_tokens(16 * 20, 3);
    const Bytes whole = hash_all(hasher, tokens, {});
    const std::size_t size = hasher.digest_size();
    for (std::size_t cut = 1; cut < 20; ++cut) {
      const std::span<const std::uint8_t> parent = std::span(whole).subspan((cut - 1) * size, size);
      const Bytes tail = hash_all(hasher, std::span(tokens).subspan(16 * cut), parent);
      CHECK(std::equal(tail.begin(), tail.end(), whole.begin() + static_cast<std::ptrdiff_t>(cut * size)));
    }
  }
}

TEST_CASE("wrong sizes are refused") {
  const Bytes none_hash(32, 0);
  const std::vector<std::uint32_t> tokens(32);
  Bytes out(64);
  CHECK_THROWS_AS(BlockHasher(Algorithm::kXxhashCbor, none_hash, 16), std::invalid_argument);
  CHECK_THROWS_AS(BlockHasher(Algorithm::kSha256Cbor, none_hash, 0), std::invalid_argument);
  const BlockHasher hasher(Algorithm::kSha256Cbor, none_hash, 16);
  CHECK_THROWS_AS(hasher.hash_chain(tokens, Bytes(31), {}, out), std::invalid_argument);
  CHECK_THROWS_AS(hasher.hash_chain(tokens, {}, {}, std::span(out).first(32)), std::invalid_argument);
  const Bytes bytes(10);
  for (const std::vector<std::uint64_t>& offsets : {std::vector<std::uint64_t>{0, 1}, {0, 5, 11}, {0, 6, 5}}) {
    CHECK_THROWS_AS(hasher.hash_chain(tokens, {}, {bytes, offsets}, out), std::invalid_argument);
  }
}

TEST_CASE("no full block, no digest") {
  const BlockHasher hasher(Algorithm::kSha256Cbor, Bytes(32, 0), 16);
  CHECK(hash_all(hasher, std::vector<std::uint32_t>(15), {}).empty());
  CHECK(hash_all(hasher, {}, {}).empty());
}

}  // namespace
