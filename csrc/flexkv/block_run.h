// The blocks of one tree node, in one allocation: digests packed so that a run is compared by one memcmp.
//
//   | digest 0 | digest 1 | ... | digest capacity-1 | id 0 | id 1 | ... | id capacity-1 |
//     digest_size bytes each                          uint32 each
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexkv {

class BlockRun {
 public:
  BlockRun() = default;
  // Room for `capacity` blocks, contents undefined.
  BlockRun(std::size_t capacity, std::size_t digest_size);
  BlockRun(BlockRun&& other) noexcept;
  BlockRun& operator=(BlockRun&& other) noexcept;
  ~BlockRun();

  const std::uint8_t* digests() const { return data_; }
  std::uint8_t* digests() { return data_; }
  const std::uint32_t* block_ids(std::size_t digest_size) const;
  std::uint32_t* block_ids(std::size_t digest_size);
  std::size_t memory_bytes() const;

 private:
  std::uint8_t* data_ = nullptr;
  std::uint32_t capacity_ = 0;
};

}  // namespace flexkv
