#include "flexkv/mempool.h"

#include <bit>
#include <string>

#include "flexkv/errors.h"

namespace flexkv {

namespace {

constexpr std::size_t kWordBits = 64;

std::size_t words_for(std::size_t bits) { return (bits + kWordBits - 1) / kWordBits; }

// Sets bits [0, count).
void fill_bits(std::vector<std::uint64_t>& words, std::size_t count) {
  for (std::size_t w = 0; w < words.size(); ++w) {
    const std::size_t here = count - w * kWordBits;
    words[w] = here >= kWordBits ? ~std::uint64_t{0} : (std::uint64_t{1} << here) - 1;
  }
}

std::uint64_t bit_of(std::size_t index) { return std::uint64_t{1} << (index % kWordBits); }

}  // namespace

Mempool::Mempool(std::size_t num_blocks)
    : num_blocks_(num_blocks),
      num_free_(num_blocks),
      free_(words_for(num_blocks)),
      summary_(words_for(free_.size())) {
  fill_bits(free_, num_blocks);
  fill_bits(summary_, free_.size());
}

void Mempool::allocate(std::span<std::int64_t> out) {
  if (out.size() > num_free_) {
    throw StateError("cannot allocate " + std::to_string(out.size()) + " blocks: " + std::to_string(num_free_) +
                     " of " + std::to_string(num_blocks_) + " are free");
  }
  num_free_ -= out.size();
  std::size_t filled = 0;
  while (filled < out.size()) {
    cursor_ = next_word_with_free(cursor_);
    std::uint64_t& word = free_[cursor_];
    for (; word != 0 && filled < out.size(); word &= word - 1) {
      out[filled++] = static_cast<std::int64_t>(cursor_ * kWordBits + std::countr_zero(word));
    }
    if (word == 0) summary_[cursor_ / kWordBits] &= ~bit_of(cursor_);
  }
}

void Mempool::recycle(std::span<const std::int64_t> block_ids) {
  for (std::size_t i = 0; i < block_ids.size(); ++i) {
    const std::int64_t id = block_ids[i];
    const bool in_range = id >= 0 && static_cast<std::size_t>(id) < num_blocks_;
    if (in_range && !is_free(id)) {
      set_free(id);
      continue;
    }
    for (std::size_t done = 0; done < i; ++done) set_used(block_ids[done]);
    throw StateError("cannot free block " + std::to_string(id) + ": " +
                     (in_range ? "it is free already" : "the pool has blocks 0.." + std::to_string(num_blocks_ - 1)));
  }
  num_free_ += block_ids.size();
}

bool Mempool::is_free(std::int64_t block_id) const {
  const auto index = static_cast<std::size_t>(block_id);
  return index < num_blocks_ && (free_[index / kWordBits] & bit_of(index)) != 0;
}

void Mempool::set_free(std::int64_t block_id) {
  const auto index = static_cast<std::size_t>(block_id);
  free_[index / kWordBits] |= bit_of(index);
  summary_[index / kWordBits / kWordBits] |= bit_of(index / kWordBits);
}

void Mempool::set_used(std::int64_t block_id) {
  const auto index = static_cast<std::size_t>(block_id);
  std::uint64_t& word = free_[index / kWordBits];
  word &= ~bit_of(index);
  if (word == 0) summary_[index / kWordBits / kWordBits] &= ~bit_of(index / kWordBits);
}

std::size_t Mempool::next_word_with_free(std::size_t word) const {
  std::size_t group = word / kWordBits;
  std::uint64_t candidates = summary_[group] & (~std::uint64_t{0} << (word % kWordBits));
  while (candidates == 0) {
    group = group + 1 == summary_.size() ? 0 : group + 1;
    candidates = summary_[group];
  }
  return group * kWordBits + static_cast<std::size_t>(std::countr_zero(candidates));
}

}  // namespace flexkv
