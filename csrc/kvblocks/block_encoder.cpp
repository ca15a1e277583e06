#include "kvblocks/block_encoder.h"

#include <bit>
#include <cstring>

namespace kvblocks {
namespace {

constexpr std::uint8_t kArrayOfThree = 0x83;
constexpr std::uint8_t kByteString = 0x40;
constexpr std::uint8_t kArray = 0x80;
constexpr std::uint8_t kNull = 0xF6;
constexpr std::size_t kMaxHeadBytes = 9;
constexpr std::size_t kMaxTokenBytes = 5;
// A token is written by one 8-byte store, of which the next token overwrites what it did not need.
constexpr std::size_t kStoreBytes = 8;

std::size_t write_head(std::uint8_t* out, std::uint8_t major, std::uint64_t argument) {
  if (argument < 24) {
    *out = static_cast<std::uint8_t>(major | argument);
    return 1;
  }
  const int log_bytes = argument < 1u << 8 ? 0 : argument < 1u << 16 ? 1 : argument >> 32 == 0 ? 2 : 3;
  const int num_bytes = 1 << log_bytes;
  *out++ = static_cast<std::uint8_t>(major | (24 + log_bytes));
  for (int i = num_bytes - 1; i >= 0; --i) *out++ = static_cast<std::uint8_t>(argument >> (8 * i));
  return 1 + static_cast<std::size_t>(num_bytes);
}

// Without branches: the sizes of real token ids are unpredictable, and a misprediction would stall the hash, which is
// the only thing that has to be waited for.
inline std::uint8_t* write_token(std::uint8_t* out, std::uint32_t token) {
  static constexpr std::uint8_t kArgumentShift[4] = {24, 24, 16, 0};  // moves the argument to the top of 32 bits
  static constexpr std::uint8_t kEncodedBytes[4] = {1, 2, 3, 5};
  const unsigned size_class = unsigned{token >= 24} + unsigned{token >= 1u << 8} + unsigned{token >= 1u << 16};
  const std::uint32_t argument = token << kArgumentShift[size_class];
  const std::uint64_t head = size_class == 0 ? token : 23 + size_class;
  if constexpr (std::endian::native == std::endian::little) {
    const std::uint64_t bytes = head | std::uint64_t{__builtin_bswap32(argument)} << 8;
    std::memcpy(out, &bytes, sizeof bytes);
  } else {
    const std::uint64_t bytes = head << 56 | std::uint64_t{argument} << 24;
    std::memcpy(out, &bytes, sizeof bytes);
  }
  return out + kEncodedBytes[size_class];
}

}  // namespace

BlockEncoder::BlockEncoder(std::size_t digest_size, std::size_t block_size, std::size_t max_extra_bytes,
                           std::size_t slack)
    : buffer_(1 + kMaxHeadBytes + digest_size + kMaxHeadBytes + kMaxTokenBytes * block_size + kStoreBytes +
              max_extra_bytes + slack) {
  std::uint8_t* out = buffer_.data();
  *out++ = kArrayOfThree;
  out += write_head(out, kByteString, digest_size);
  parent_offset_ = static_cast<std::size_t>(out - buffer_.data());
  out += digest_size;
  out += write_head(out, kArray, block_size);
  tokens_offset_ = static_cast<std::size_t>(out - buffer_.data());
}

std::size_t BlockEncoder::encode(std::span<const std::uint32_t> tokens, std::span<const std::uint8_t> extra) {
  std::uint8_t* out = buffer_.data() + tokens_offset_;
  for (const std::uint32_t token : tokens) out = write_token(out, token);
  if (extra.empty()) {
    *out++ = kNull;
  } else {
    std::memcpy(out, extra.data(), extra.size());
    out += extra.size();
  }
  return static_cast<std::size_t>(out - buffer_.data());
}

}  // namespace kvblocks
