#include "checksum.h"

#include <doctest/doctest.h>

#include <cstring>
#include <string_view>
#include <vector>

namespace {

using flexkv::ChecksumIsa;

constexpr ChecksumIsa kAll[] = {ChecksumIsa::kPortable, ChecksumIsa::kAvx2, ChecksumIsa::kAvx512};

std::vector<std::byte> bytes(std::size_t size) {
  std::vector<std::byte> data(size);
  for (std::size_t i = 0; i < size; ++i) data[i] = static_cast<std::byte>(i * 131 + (i >> 8) * 17);
  return data;
}

}  // namespace

TEST_CASE("the checksum is XXH3-64") {
  const std::string_view text = "kvstrata";
  CHECK(flexkv::checksum({}) == 0x2d06800538d394c2);
  CHECK(flexkv::checksum(std::as_bytes(std::span(text))) == 0x26f20fd203a19f4b);
  CHECK(flexkv::checksum(bytes(65536)) == 0xe84be5e1e6ba6253);
  CHECK(flexkv::checksum(bytes(1835009)) == 0x96bb3c52597606b2);
}

TEST_CASE("every instruction set gives the same value, at any length and alignment") {
  const std::vector<std::byte> data = bytes(300000);
  for (const std::size_t size : {0, 1, 3, 8, 16, 17, 128, 129, 240, 241, 1023, 1024, 1025, 4096, 65536, 299990}) {
    for (const std::size_t start : {0, 1, 7}) {
      const std::span<const std::byte> part = std::span(data).subspan(start, size);
      for (const ChecksumIsa isa : kAll) {
        if (flexkv::is_supported(isa)) {
          CHECK(flexkv::checksum_with(isa, part) == flexkv::checksum_with(ChecksumIsa::kPortable, part));
        }
      }
    }
  }
}

TEST_CASE("one flipped bit anywhere changes it") {
  std::vector<std::byte> data = bytes(8192);
  const std::uint64_t whole = flexkv::checksum(data);
  for (std::size_t bit = 0; bit < data.size() * 8; bit += 97) {
    data[bit / 8] ^= std::byte{1} << (bit % 8);
    CHECK(flexkv::checksum(data) != whole);
    data[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}
