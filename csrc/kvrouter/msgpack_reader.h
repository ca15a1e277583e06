// Reads msgpack from bytes that may be anything: every method returns false, and leaves the position unspecified, when
// the bytes end early or say something else. Nothing is allocated for what the bytes merely promise.
// Source: the MessagePack specification.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace kvrouter {

class MsgpackReader {
 public:
  MsgpackReader(const std::uint8_t* begin, const std::uint8_t* end) : at_(begin), end_(end) {}

  const std::uint8_t* position() const { return at_; }
  bool at_end() const { return at_ == end_; }

  // The head byte of the next value. REQUIRES: !at_end().
  std::uint8_t peek() const { return *at_; }

  bool read_nil() { return at_ != end_ && *at_ == 0xc0 && (++at_, true); }

  // Any integer that fits; a negative one comes as its two's complement, with `negative` set.
  bool read_int(std::uint64_t& value, bool& negative) {
    std::uint8_t head = 0;
    if (!take(head)) return false;
    negative = false;
    if (head <= 0x7f) return value = head, true;
    switch (head) {
      case 0xcc: return big_endian(1, value);
      case 0xcd: return big_endian(2, value);
      case 0xce: return big_endian(4, value);
      case 0xcf: return big_endian(8, value);
      case 0xd0: return signed_int(1, value, negative);
      case 0xd1: return signed_int(2, value, negative);
      case 0xd2: return signed_int(4, value, negative);
      case 0xd3: return signed_int(8, value, negative);
      default: break;
    }
    if (head < 0xe0) return false;
    value = static_cast<std::uint64_t>(static_cast<std::int64_t>(static_cast<std::int8_t>(head)));
    return negative = true;
  }

  // An integer in 0..2**32-1.
  bool read_u32(std::uint32_t& value) {
    if (at_ != end_ && *at_ <= 0x7f) return value = *at_++, true;
    if (end_ - at_ >= 3 && *at_ == 0xcd) {  // most token ids
      value = static_cast<std::uint32_t>(at_[1] << 8 | at_[2]);
      at_ += 3;
      return true;
    }
    std::uint64_t wide = 0;
    bool negative = false;
    if (!read_int(wide, negative) || negative || wide > 0xffffffff) return false;
    value = static_cast<std::uint32_t>(wide);
    return true;
  }

  bool read_bool(bool& value) {
    std::uint8_t head = 0;
    if (!take(head) || (head != 0xc2 && head != 0xc3)) return false;
    value = head == 0xc3;
    return true;
  }

  bool read_array(std::uint32_t& size) { return container(0x90, 0xdc, size); }
  bool read_map(std::uint32_t& size) { return container(0x80, 0xde, size); }

  bool read_str(std::string_view& text) {
    std::uint8_t head = 0;
    std::uint64_t size = 0;
    if (!take(head)) return false;
    if ((head & 0xe0) == 0xa0) {
      size = head & 0x1f;
    } else if (head < 0xd9 || head > 0xdb || !big_endian(1u << (head - 0xd9), size)) {
      return false;
    }
    return bytes(size, text);
  }

  bool read_bin(std::string_view& data) {
    std::uint8_t head = 0;
    std::uint64_t size = 0;
    if (!take(head) || head < 0xc4 || head > 0xc6 || !big_endian(1u << (head - 0xc4), size)) return false;
    return bytes(size, data);
  }

  // Passes over one value of any kind, nested at most `max_depth` deep.
  bool skip(int max_depth = 32) {
    std::uint8_t head = 0;
    if (!take(head)) return false;
    std::uint64_t size = 0;
    if (head <= 0x7f || head >= 0xe0 || head == 0xc0 || head == 0xc2 || head == 0xc3) return true;
    if (head <= 0x8f) return skip_items(2u * (head & 0xf), max_depth);
    if (head <= 0x9f) return skip_items(head & 0xf, max_depth);
    if (head <= 0xbf) return advance(head & 0x1f);
    if (head == 0xc1) return false;
    if (head <= 0xc6) return big_endian(1u << (head - 0xc4), size) && advance(size);
    if (head <= 0xc9) return big_endian(1u << (head - 0xc7), size) && advance(size + 1);
    if (head <= 0xcb) return advance(head == 0xca ? 4 : 8);
    if (head <= 0xd3) return advance(1u << (head & 3));
    if (head <= 0xd8) return advance((1u << (head - 0xd4)) + 1);
    if (head <= 0xdb) return big_endian(1u << (head - 0xd9), size) && advance(size);
    if (head <= 0xdd) return big_endian(head == 0xdc ? 2 : 4, size) && skip_items(size, max_depth);
    return big_endian(head == 0xde ? 2 : 4, size) && skip_items(2 * size, max_depth);
  }

 private:
  bool take(std::uint8_t& byte) { return at_ != end_ && (byte = *at_++, true); }

  bool advance(std::uint64_t size) {
    if (size > static_cast<std::uint64_t>(end_ - at_)) return false;
    at_ += size;
    return true;
  }

  bool bytes(std::uint64_t size, std::string_view& out) {
    const char* start = reinterpret_cast<const char*>(at_);
    if (!advance(size)) return false;
    out = {start, static_cast<std::size_t>(size)};
    return true;
  }

  bool big_endian(unsigned size, std::uint64_t& value) {
    const std::uint8_t* from = at_;
    if (!advance(size)) return false;
    value = 0;
    for (unsigned i = 0; i < size; ++i) value = value << 8 | from[i];
    return true;
  }

  bool signed_int(unsigned size, std::uint64_t& value, bool& negative) {
    if (!big_endian(size, value)) return false;
    const unsigned unused = 64 - 8 * size;
    const std::int64_t extended = static_cast<std::int64_t>(value << unused) >> unused;
    value = static_cast<std::uint64_t>(extended);
    negative = extended < 0;
    return true;
  }

  bool container(std::uint8_t fix, std::uint8_t head16, std::uint32_t& size) {
    std::uint8_t head = 0;
    std::uint64_t wide = 0;
    if (!take(head)) return false;
    if ((head & 0xf0) == fix) return size = head & 0xf, true;
    if (head != head16 && head != head16 + 1) return false;
    if (!big_endian(head == head16 ? 2 : 4, wide)) return false;
    size = static_cast<std::uint32_t>(wide);
    return true;
  }

  bool skip_items(std::uint64_t num_items, int max_depth) {
    if (max_depth == 0) return false;
    for (; num_items != 0; --num_items) {
      if (!skip(max_depth - 1)) return false;
    }
    return true;
  }

  const std::uint8_t* at_;
  const std::uint8_t* end_;
};

}  // namespace kvrouter
