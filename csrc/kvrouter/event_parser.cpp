#include "kvrouter/event_parser.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>

namespace kvrouter {
namespace {

constexpr std::size_t kMaxTierLength = 64;
constexpr int kMaxExtraDepth = 8;

enum class Field { kHashes, kParent, kTokens, kBlockSize, kMedium, kLoraName, kExtraKeys, kGroup, kIgnored };

struct NamedField {
  std::string_view name;
  Field field;
};

// In the order of the array layout.
constexpr std::array<NamedField, 9> kStoredFields = {{{"block_hashes", Field::kHashes},
                                                      {"parent_block_hash", Field::kParent},
                                                      {"token_ids", Field::kTokens},
                                                      {"block_size", Field::kBlockSize},
                                                      {"lora_id", Field::kIgnored},
                                                      {"medium", Field::kMedium},
                                                      {"lora_name", Field::kLoraName},
                                                      {"extra_keys", Field::kExtraKeys},
                                                      {"group_idx", Field::kGroup}}};
constexpr std::array<NamedField, 3> kRemovedFields = {
    {{"block_hashes", Field::kHashes}, {"medium", Field::kMedium}, {"group_idx", Field::kGroup}}};

std::span<const NamedField> fields_of(EventKind kind) {
  switch (kind) {
    case EventKind::kBlockStored: return kStoredFields;
    case EventKind::kBlockRemoved: return kRemovedFields;
    case EventKind::kAllBlocksCleared: break;
  }
  return {};
}

// Canonical CBOR, as the chained hash takes it. Source: RFC 8949, section 4.2.1.
void append_cbor_head(std::vector<std::uint8_t>& out, std::uint8_t major, std::uint64_t argument) {
  const unsigned size = argument < 24 ? 0 : argument >> 8 == 0 ? 1 : argument >> 16 == 0 ? 2 : argument >> 32 == 0 ? 4 : 8;
  const std::uint8_t info = size == 0 ? static_cast<std::uint8_t>(argument)
                                      : static_cast<std::uint8_t>(24 + std::countr_zero(size));
  out.push_back(major | info);
  for (unsigned i = size; i-- > 0;) out.push_back(static_cast<std::uint8_t>(argument >> (8 * i)));
}

void append_cbor_bytes(std::vector<std::uint8_t>& out, std::uint8_t major, std::string_view bytes) {
  append_cbor_head(out, major, bytes.size());
  out.insert(out.end(), bytes.begin(), bytes.end());
}

// Rewrites one msgpack value as CBOR. Floats, maps and extensions cannot enter a block hash.
bool transcode(MsgpackReader& reader, std::vector<std::uint8_t>& out, int max_depth) {
  if (reader.at_end() || max_depth == 0) return false;
  const std::uint8_t head = reader.peek();
  if (head == 0xc0) return out.push_back(0xf6), reader.read_nil();
  if (head == 0xc2 || head == 0xc3) {
    bool value = false;
    if (!reader.read_bool(value)) return false;
    out.push_back(value ? 0xf5 : 0xf4);
    return true;
  }
  std::string_view bytes;
  if ((head & 0xe0) == 0xa0 || (head >= 0xd9 && head <= 0xdb)) {
    return reader.read_str(bytes) && (append_cbor_bytes(out, 0x60, bytes), true);
  }
  if (head >= 0xc4 && head <= 0xc6) return reader.read_bin(bytes) && (append_cbor_bytes(out, 0x40, bytes), true);
  if ((head & 0xf0) == 0x90 || head == 0xdc || head == 0xdd) {
    std::uint32_t size = 0;
    if (!reader.read_array(size)) return false;
    append_cbor_head(out, 0x80, size);
    for (; size != 0; --size) {
      if (!transcode(reader, out, max_depth - 1)) return false;
    }
    return true;
  }
  std::uint64_t value = 0;
  bool negative = false;
  if (!reader.read_int(value, negative)) return false;
  append_cbor_head(out, negative ? 0x20 : 0x00, negative ? ~value : value);
  return true;
}

bool read_hash(MsgpackReader& reader, std::uint64_t& hash) {
  if (reader.at_end()) return false;
  bool negative = false;
  if (reader.peek() < 0xc4 || reader.peek() > 0xc6) return reader.read_int(hash, negative);
  std::string_view bytes;
  if (!reader.read_bin(bytes) || bytes.empty()) return false;
  hash = 0;
  for (const char byte : bytes.substr(bytes.size() - std::min<std::size_t>(bytes.size(), 8))) {
    hash = hash << 8 | static_cast<std::uint8_t>(byte);
  }
  return true;
}

bool read_hashes(MsgpackReader& reader, Event& event) {
  std::uint32_t size = 0;
  if (!reader.read_array(size)) return false;
  for (; size != 0; --size) {
    std::uint64_t hash = 0;
    if (!read_hash(reader, hash)) return false;
    event.block_hashes.push_back(hash);
  }
  return true;
}

bool read_tokens(MsgpackReader& reader, Event& event) {
  std::uint32_t size = 0;
  if (reader.read_nil()) return true;
  if (!reader.read_array(size)) return false;
  for (; size != 0; --size) {
    std::uint32_t token = 0;
    if (!reader.read_u32(token)) return false;
    event.token_ids.push_back(token);
  }
  return true;
}

bool read_tier(MsgpackReader& reader, Event& event) {
  std::string_view medium;
  if (reader.read_nil()) return true;
  if (!reader.read_str(medium) || medium.empty() || medium.size() > kMaxTierLength) return false;
  event.tier.clear();
  for (const char c : medium) event.tier.push_back(c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c);
  return true;
}

bool read_lora_name(MsgpackReader& reader, Event& event) {
  std::string_view name;
  if (reader.read_nil()) return true;
  if (!reader.read_str(name)) return false;
  if (!name.empty()) append_cbor_bytes(event.lora_name, 0x60, name);
  return true;
}

bool read_extra_keys(MsgpackReader& reader, Event& event) {
  std::uint32_t num_blocks = 0;
  if (reader.read_nil()) return true;
  if (!reader.read_array(num_blocks)) return false;
  event.extra_offsets.push_back(0);
  for (; num_blocks != 0; --num_blocks) {
    if (reader.at_end()) return false;
    if (reader.peek() == 0x90) {  // no keys: as null
      std::uint32_t none = 0;
      reader.read_array(none);
    } else if (!reader.read_nil()) {
      const std::uint8_t head = reader.peek();
      const bool is_array = (head & 0xf0) == 0x90 || head == 0xdc || head == 0xdd;
      if (!is_array || !transcode(reader, event.extra_bytes, kMaxExtraDepth)) return false;
    }
    event.extra_offsets.push_back(event.extra_bytes.size());
  }
  return true;
}

bool read_group(MsgpackReader& reader, Event& event) {
  std::uint32_t group = 0;
  if (reader.read_nil()) return true;
  if (!reader.read_u32(group) || group > std::numeric_limits<std::int32_t>::max()) return false;
  event.group = static_cast<std::int32_t>(group);
  return true;
}

bool read_field(MsgpackReader& reader, Field field, Event& event) {
  switch (field) {
    case Field::kHashes: return read_hashes(reader, event);
    case Field::kParent: {
      if (reader.read_nil()) return true;
      std::uint64_t hash = 0;
      if (!read_hash(reader, hash)) return false;
      event.parent = hash;
      return true;
    }
    case Field::kTokens: return read_tokens(reader, event);
    case Field::kBlockSize: return reader.read_nil() || reader.read_u32(event.block_size);
    case Field::kMedium: return read_tier(reader, event);
    case Field::kLoraName: return read_lora_name(reader, event);
    case Field::kExtraKeys: return read_extra_keys(reader, event);
    case Field::kGroup: return read_group(reader, event);
    case Field::kIgnored: break;
  }
  return reader.skip();
}

void reset(Event& event, EventKind kind) {
  event.kind = kind;
  event.block_hashes.clear();
  event.parent.reset();
  event.token_ids.clear();
  event.block_size = 0;
  event.tier = "gpu";
  event.lora_name.clear();
  event.extra_bytes.clear();
  event.extra_offsets.clear();
  event.group = 0;
}

std::optional<EventKind> kind_of(std::string_view tag) {
  if (tag == "BlockStored") return EventKind::kBlockStored;
  if (tag == "BlockRemoved") return EventKind::kBlockRemoved;
  if (tag == "AllBlocksCleared") return EventKind::kAllBlocksCleared;
  return std::nullopt;
}

ParseResult parse_array_event(MsgpackReader& reader, Event& event) {
  std::uint32_t size = 0;
  std::string_view tag;
  if (!reader.read_array(size) || size == 0 || !reader.read_str(tag)) return ParseResult::kMalformed;
  const std::optional<EventKind> kind = kind_of(tag);
  if (!kind) return ParseResult::kUnknownType;
  reset(event, *kind);
  const std::span<const NamedField> fields = fields_of(*kind);
  for (std::uint32_t i = 0; i + 1 < size; ++i) {
    const Field field = i < fields.size() ? fields[i].field : Field::kIgnored;
    if (!read_field(reader, field, event)) return ParseResult::kMalformed;
  }
  const bool complete = *kind == EventKind::kAllBlocksCleared || size > 1;
  return complete ? ParseResult::kOk : ParseResult::kMalformed;
}

// The tag usually comes first, but a map has no order: without it, look for it and start again.
bool find_tag(MsgpackReader reader, std::uint32_t num_pairs, std::string_view& tag) {
  for (; num_pairs != 0; --num_pairs) {
    std::string_view name;
    if (!reader.read_str(name)) return false;
    if (name == "type") return reader.read_str(tag);
    if (!reader.skip()) return false;
  }
  return false;
}

ParseResult parse_map_event(MsgpackReader& reader, Event& event) {
  std::uint32_t num_pairs = 0;
  std::string_view tag;
  if (!reader.read_map(num_pairs) || !find_tag(reader, num_pairs, tag)) return ParseResult::kMalformed;
  const std::optional<EventKind> kind = kind_of(tag);
  if (!kind) return ParseResult::kUnknownType;
  reset(event, *kind);
  const std::span<const NamedField> fields = fields_of(*kind);
  bool has_hashes = *kind == EventKind::kAllBlocksCleared;
  std::uint32_t seen = 0;  // a field given twice would append to itself
  for (; num_pairs != 0; --num_pairs) {
    std::string_view name;
    if (!reader.read_str(name)) return ParseResult::kMalformed;
    Field field = Field::kIgnored;
    for (const NamedField& known : fields) {
      if (known.name == name) field = known.field;
    }
    if (field != Field::kIgnored && (seen >> static_cast<unsigned>(field) & 1)) return ParseResult::kMalformed;
    seen |= 1u << static_cast<unsigned>(field);
    has_hashes = has_hashes || field == Field::kHashes;
    if (!read_field(reader, field, event)) return ParseResult::kMalformed;
  }
  return has_hashes ? ParseResult::kOk : ParseResult::kMalformed;
}

bool is_map(std::uint8_t head) { return (head & 0xf0) == 0x80 || head == 0xde || head == 0xdf; }

bool read_rank(MsgpackReader& reader, BatchHead& head) {
  std::uint32_t rank = 0;
  if (reader.read_nil()) return true;
  if (!reader.read_u32(rank) || rank > std::numeric_limits<std::int32_t>::max()) return false;
  head.rank = static_cast<std::int32_t>(rank);
  return true;
}

// Notes where the events start; passes over them.
bool read_events(MsgpackReader& reader, BatchHead& head) {
  MsgpackReader whole = reader;
  if (!reader.read_array(head.num_events)) return false;
  head.events = reader.position();
  if (!whole.skip()) return false;
  reader = whole;
  return true;
}

}  // namespace

ParseResult parse_event(MsgpackReader& reader, Event& event) {
  if (reader.at_end()) return ParseResult::kMalformed;
  return is_map(reader.peek()) ? parse_map_event(reader, event) : parse_array_event(reader, event);
}

bool parse_batch(const std::uint8_t* begin, const std::uint8_t* end, BatchHead& head) {
  MsgpackReader reader(begin, end);
  head = {0, nullptr, 0};
  if (reader.at_end()) return false;
  std::uint32_t size = 0;
  if (!is_map(reader.peek())) {
    if (!reader.read_array(size) || size < 2 || !reader.skip() || !read_events(reader, head)) return false;
    return size < 3 || read_rank(reader, head);
  }
  if (!reader.read_map(size)) return false;
  for (; size != 0; --size) {
    std::string_view name;
    if (!reader.read_str(name)) return false;
    const bool good = name == "events"               ? read_events(reader, head)
                      : name == "data_parallel_rank" ? read_rank(reader, head)
                                                     : reader.skip();
    if (!good) return false;
  }
  return head.events != nullptr;
}

}  // namespace kvrouter
