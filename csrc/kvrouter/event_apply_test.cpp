#include "kvrouter/event_apply.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <string_view>
#include <thread>

namespace kvrouter {
namespace {

// Writes msgpack, by hand.
class Writer {
 public:
  Writer& array(std::size_t size) { return head(0xdd, size); }
  Writer& map(std::size_t size) { return head(0xdf, size); }
  Writer& nil() { return byte(0xc0); }
  Writer& number(std::uint64_t value) {
    byte(0xcf);
    for (int i = 7; i >= 0; --i) byte(static_cast<std::uint8_t>(value >> (8 * i)));
    return *this;
  }
  Writer& text(std::string_view value) {
    head(0xdb, value.size());
    bytes_.insert(bytes_.end(), value.begin(), value.end());
    return *this;
  }
  Writer& real() {
    byte(0xcb);
    bytes_.insert(bytes_.end(), 8, 0);
    return *this;
  }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

 private:
  Writer& byte(std::uint8_t value) { return bytes_.push_back(value), *this; }
  Writer& head(std::uint8_t kind, std::size_t size) {
    byte(kind);
    for (int i = 3; i >= 0; --i) byte(static_cast<std::uint8_t>(size >> (8 * i)));
    return *this;
  }
  std::vector<std::uint8_t> bytes_;
};

void write_stored(Writer& out, const std::vector<std::uint64_t>& hashes, std::optional<std::uint64_t> parent,
                  std::size_t num_tokens, std::size_t block_size, std::uint64_t first_token) {
  out.map(7).text("type").text("BlockStored").text("block_hashes").array(hashes.size());
  for (const std::uint64_t hash : hashes) out.number(hash);
  out.text("parent_block_hash");
  parent ? out.number(*parent) : out.nil();
  out.text("token_ids").array(num_tokens);
  for (std::size_t i = 0; i < num_tokens; ++i) out.number(first_token + i);
  out.text("block_size").number(block_size).text("medium").text("GPU").text("future").map(1).text("x").nil();
}

struct Fixture {
  std::shared_ptr<BlockIndex> index = std::make_shared<BlockIndex>(100'000, 10);
  std::shared_ptr<PodSource> source = index->source("pod", "m");
  std::vector<std::uint8_t> root = std::vector<std::uint8_t>(32, 7);
  EventApplier applier{index, source, kvblocks::Algorithm::kSha256Cbor, root, 16};

  double prefix(std::size_t num_tokens) {
    std::vector<std::uint32_t> tokens(num_tokens);
    for (std::size_t i = 0; i < num_tokens; ++i) tokens[i] = static_cast<std::uint32_t>(i);
    std::vector<std::uint8_t> digests(num_tokens / 16 * 32);
    kvblocks::BlockHasher(kvblocks::Algorithm::kSha256Cbor, root, 16).hash_chain(tokens, {}, {}, digests);
    std::vector<std::uint64_t> keys;
    for (std::size_t i = 0; i < digests.size(); i += 32) keys.push_back(kvblocks::external_hash({&digests[i], 32}));
    const auto scores = index->score(keys, std::nullopt, {}, 1.0);
    return scores.empty() ? 0.0 : scores[0].second;
  }
};

}  // namespace

TEST_CASE("blocks of any engine block size land under the index's keys") {
  for (const std::size_t size : {4, 8, 16, 32, 64}) {
    CAPTURE(size);
    Fixture f;
    Writer out;
    out.array(3).real().array(2);
    std::vector<std::uint64_t> first, second;
    for (std::size_t i = 0; i < 64 / size; ++i) first.push_back(100 + i);
    for (std::size_t i = 0; i < 128 / size; ++i) second.push_back(200 + i);
    write_stored(out, first, std::nullopt, 64, size, 0);
    write_stored(out, second, first.back(), 128, size, 64);
    out.number(0);
    const BatchResult result = f.applier.apply(out.bytes());
    CHECK(result.num_events == 2);
    CHECK(result.num_stored == 12);
    CHECK(f.prefix(192) == 12.0);
  }
}

TEST_CASE("a chain may be continued inside an index block") {
  Fixture f;
  for (std::uint64_t i = 0; i < 8; ++i) {  // eight tokens at a time
    Writer out;
    out.array(2).real().array(1);
    write_stored(out, {100 + i}, i == 0 ? std::nullopt : std::optional(99 + i), 8, 8, 8 * i);
    const BatchResult result = f.applier.apply(out.bytes());
    CHECK(result.num_stored == i % 2);
  }
  CHECK(f.prefix(64) == 4.0);
}

TEST_CASE("a block size that does not fit is rejected") {
  Fixture f;
  Writer out;
  out.array(2).real().array(1);
  write_stored(out, {1}, std::nullopt, 24, 24, 0);
  CHECK(f.applier.apply(out.bytes()).num_rejected[static_cast<std::size_t>(Rejection::kBlockSize)] == 1);
}

TEST_CASE("mutated and cut batches are survived and leave the index consistent") {
  Writer out;
  out.array(3).real().array(2);
  write_stored(out, {1, 2}, std::nullopt, 32, 16, 0);
  out.array(4).text("BlockRemoved").array(1).number(1).text("GPU").nil();
  out.number(0);
  std::mt19937 random(11);
  Fixture f;
  for (int i = 0; i < 20'000; ++i) {
    std::vector<std::uint8_t> bytes = out.bytes();
    for (unsigned n = random() % 4; n > 0; --n) bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
    if (random() % 3 == 0) bytes.resize(random() % bytes.size());
    // An exact copy on the heap, so that the sanitizer sees a read past its end.
    const std::vector<std::uint8_t> exact(bytes);
    f.applier.apply(exact);
  }
  {
    const std::lock_guard lock(f.source->mutex);
    f.index->clear(*f.source, std::nullopt);
  }
  CHECK(f.index->stats().num_blocks == 0);
  CHECK(f.index->stats().num_records == 0);
  f.applier.apply(out.bytes());
  CHECK(f.index->stats().num_records == 1);
}

TEST_CASE("appliers of several pods run at once") {
  auto index = std::make_shared<BlockIndex>(10'000, 10);
  const std::vector<std::uint8_t> root(32, 7);
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      EventApplier applier(index, index->source("pod" + std::to_string(number), "m"),
                           kvblocks::Algorithm::kXxhashCbor, std::span(root).first(16), 16);
      for (int step = 0; step < 100; ++step) {
        Writer out;
        out.array(2).real().array(2);
        write_stored(out, {1, 2, 3, 4}, std::nullopt, 64, 16, 0);
        out.map(2).text("type").text("BlockRemoved").text("block_hashes").array(1).number(4);
        applier.apply(out.bytes());
        index->score(std::vector<std::uint64_t>{1, 2, 3}, std::nullopt, {}, 1.0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(index->stats().num_blocks == 3);
}

}  // namespace kvrouter
