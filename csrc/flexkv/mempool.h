// Which blocks of one tier are free.
//
//   summary_   | 1 0 1 ...                bit w: word w of free_ has a set bit
//   free_      | word 0 | word 1 | ...    bit b of word w: block 64 w + b is free
//
// Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flexkv {

class Mempool {
 public:
  // All blocks [0, num_blocks) are free.
  explicit Mempool(std::size_t num_blocks);

  // Fills `out` with free blocks, ascending runs where it can, and marks them used.
  // Throws StateError, changing nothing, when fewer than out.size() blocks are free.
  void allocate(std::span<std::int64_t> out);

  // Marks used blocks free again.
  // Throws StateError, changing nothing, when one is out of range, free already, or named twice.
  void recycle(std::span<const std::int64_t> block_ids);

  bool is_free(std::int64_t block_id) const;
  std::size_t num_free() const { return num_free_; }
  std::size_t num_blocks() const { return num_blocks_; }
  std::size_t memory_bytes() const { return (free_.capacity() + summary_.capacity()) * sizeof(std::uint64_t); }

 private:
  void set_free(std::int64_t block_id);
  void set_used(std::int64_t block_id);
  // First word at or after `word`, wrapping round, that has a free block. REQUIRES: num_free_ > 0.
  std::size_t next_word_with_free(std::size_t word) const;

  std::size_t num_blocks_;
  std::size_t num_free_;
  std::size_t cursor_ = 0;  // word where the last allocation ended: the next one tends to be adjacent
  std::vector<std::uint64_t> free_;
  std::vector<std::uint64_t> summary_;
};

}  // namespace flexkv
