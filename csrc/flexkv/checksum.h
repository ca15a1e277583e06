// The checksum of a stored block: XXH3-64 with seed 0, the same value on every processor.
//
// Chosen over CRC32C: 64 bits, and as fast as memory can be read. It tells damage, not malice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace flexkv {

// Which instructions compute it; the value does not depend on them.
enum class ChecksumIsa { kPortable, kAvx2, kAvx512 };

bool is_supported(ChecksumIsa isa);

// The fastest of those this processor has.
ChecksumIsa best_checksum_isa();

std::uint64_t checksum(std::span<const std::byte> data);

// REQUIRES: is_supported(isa).
std::uint64_t checksum_with(ChecksumIsa isa, std::span<const std::byte> data);

namespace detail {
std::uint64_t checksum_avx2(const void* data, std::size_t size);
std::uint64_t checksum_avx512(const void* data, std::size_t size);
}  // namespace detail

}  // namespace flexkv
