#include "kvblocks/block_encoder.h"

#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

#if defined(__x86_64__)

// Lane by lane what write_token does, up to the stores.
__attribute__((target("sse4.1"))) std::uint8_t* write_tokens_sse(std::uint8_t* out,
                                                                 std::span<const std::uint32_t> tokens) {
  constexpr std::size_t kLanes = 4;
  const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  std::size_t i = 0;
  for (; i + kLanes <= tokens.size(); i += kLanes) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tokens.data() + i));
    // All ones where the token needs a head byte, two argument bytes, four argument bytes.
    const __m128i is_multi = _mm_cmpeq_epi32(_mm_max_epu32(t, _mm_set1_epi32(24)), t);
    const __m128i is_wide = _mm_cmpeq_epi32(_mm_max_epu32(t, _mm_set1_epi32(1 << 8)), t);
    const __m128i is_widest = _mm_cmpeq_epi32(_mm_max_epu32(t, _mm_set1_epi32(1 << 16)), t);
    const __m128i wide_or_more = _mm_add_epi32(is_wide, is_widest);  // minus the number of widenings
    const __m128i head = _mm_blendv_epi8(t, _mm_sub_epi32(_mm_set1_epi32(24), wide_or_more), is_multi);
    const __m128i swapped = _mm_shuffle_epi8(t, swap_bytes);
    const __m128i narrow = _mm_blendv_epi8(_mm_srli_epi32(swapped, 24), _mm_srli_epi32(swapped, 16), is_wide);
    const __m128i argument = _mm_blendv_epi8(narrow, swapped, is_widest);
    const __m128i size_minus_one = _mm_add_epi32(_mm_add_epi32(is_multi, wide_or_more), is_widest);
    const __m128i sizes = _mm_sub_epi32(_mm_set1_epi32(1), size_minus_one);
    const __m128i low = _mm_or_si128(_mm_slli_epi32(argument, 8), head);
    const __m128i high = _mm_srli_epi32(argument, 24);
    const __m128i first_two = _mm_unpacklo_epi32(low, high);
    const __m128i last_two = _mm_unpackhi_epi32(low, high);
    const auto sizes01 = static_cast<std::uint64_t>(_mm_cvtsi128_si64(sizes));
    const auto sizes23 = static_cast<std::uint64_t>(_mm_extract_epi64(sizes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), first_two);
    out += static_cast<std::uint32_t>(sizes01);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_srli_si128(first_two, 8));
    out += sizes01 >> 32;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), last_two);
    out += static_cast<std::uint32_t>(sizes23);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_srli_si128(last_two, 8));
    out += sizes23 >> 32;
  }
  return write_tokens_portable(out, tokens.subspan(i));
}

#endif

}  // namespace

std::uint8_t* write_tokens_portable(std::uint8_t* out, std::span<const std::uint32_t> tokens) {
  for (const std::uint32_t token : tokens) out = write_token(out, token);
  return out;
}

TokenWriter best_token_writer() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.1")) return write_tokens_sse;
#endif
  return write_tokens_portable;
}

BlockEncoder::BlockEncoder(TokenWriter write_tokens, std::size_t digest_size, std::size_t block_size,
                           std::size_t max_extra_bytes, std::size_t slack)
    : write_tokens_(write_tokens),
      buffer_(1 + kMaxHeadBytes + digest_size + kMaxHeadBytes + kMaxTokenBytes * block_size + kStoreBytes +
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
  std::uint8_t* out = write_tokens_(buffer_.data() + tokens_offset_, tokens);
  if (extra.empty()) {
    *out++ = kNull;
  } else {
    std::memcpy(out, extra.data(), extra.size());
    out += extra.size();
  }
  return static_cast<std::size_t>(out - buffer_.data());
}

}  // namespace kvblocks
