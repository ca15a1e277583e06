#include "flexkv/block_run.h"

#include <malloc.h>

#include <cstdlib>
#include <new>
#include <utility>

namespace flexkv {

BlockRun::BlockRun(std::size_t capacity, std::size_t digest_size)
    : data_(static_cast<std::uint8_t*>(std::malloc(capacity * (digest_size + sizeof(std::uint32_t))))),
      capacity_(static_cast<std::uint32_t>(capacity)) {
  if (data_ == nullptr) throw std::bad_alloc();
}

BlockRun::BlockRun(BlockRun&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}

BlockRun& BlockRun::operator=(BlockRun&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

BlockRun::~BlockRun() { std::free(data_); }

const std::uint32_t* BlockRun::block_ids(std::size_t digest_size) const {
  return reinterpret_cast<const std::uint32_t*>(data_ + capacity_ * digest_size);
}

std::uint32_t* BlockRun::block_ids(std::size_t digest_size) {
  return reinterpret_cast<std::uint32_t*>(data_ + capacity_ * digest_size);
}

std::size_t BlockRun::memory_bytes() const {
  constexpr std::size_t kChunkHeader = sizeof(std::size_t);  // of the allocator
  return data_ == nullptr ? 0 : malloc_usable_size(data_) + kChunkHeader;
}

}  // namespace flexkv
