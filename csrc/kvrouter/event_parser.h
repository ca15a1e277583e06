// KV events as msgpack -> plain values. Both layouts, mixed in one batch too:
//
//   map     {"type": "BlockStored", "block_hashes": [...], ...}                 vLLM now
//   array   ["BlockStored", block_hashes, parent_block_hash, token_ids, ...]    earlier vLLM, SGLang
//
// Unknown fields and missing tail fields are tolerated. A hash is an integer (a negative one stands for its two's
// complement) or bytes, of which the last eight count, big-endian.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvrouter/msgpack_reader.h"

namespace kvrouter {

enum class EventKind { kBlockStored, kBlockRemoved, kAllBlocksCleared };

// A parsed event; reused from event to event, so that its vectors keep their memory.
struct Event {
  EventKind kind;
  std::vector<std::uint64_t> block_hashes;
  std::optional<std::uint64_t> parent;
  std::vector<std::uint32_t> token_ids;
  std::uint32_t block_size;
  std::string tier;                         // `medium` in lower case; "gpu" when there is none
  std::vector<std::uint8_t> lora_name;      // CBOR text, empty when there is none
  std::vector<std::uint8_t> extra_bytes;    // extra keys, one CBOR array per block that has some, end to end
  std::vector<std::uint64_t> extra_offsets;  // block i: [offsets[i], offsets[i+1]) of extra_bytes; empty: none at all
  std::int32_t group;
};

enum class ParseResult { kOk, kMalformed, kUnknownType };

// Reads one event. Unless kOk, the reader's position and the event are unspecified.
ParseResult parse_event(MsgpackReader& reader, Event& event);

// The envelope of a batch: `[ts, [event, ...], data_parallel_rank]`, or a map with the same fields.
struct BatchHead {
  std::uint32_t num_events;
  const std::uint8_t* events;  // where the first event starts
  std::int32_t rank;
};

// Finds the parts of a batch. False if the payload is no batch, or is cut off.
bool parse_batch(const std::uint8_t* begin, const std::uint8_t* end, BatchHead& head);

}  // namespace kvrouter
