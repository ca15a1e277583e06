#include "kvrouter/event_apply.h"

#include <mutex>

namespace kvrouter {

EventApplier::EventApplier(std::shared_ptr<BlockIndex> index, std::shared_ptr<PodSource> source,
                           kvblocks::Algorithm algorithm, std::span<const std::uint8_t> root, std::size_t block_size)
    : index_(std::move(index)), source_(std::move(source)), hasher_(algorithm, root, block_size) {}

BatchResult EventApplier::apply(std::span<const std::uint8_t> payload) {
  BatchResult result;
  BatchHead head{};
  const std::uint8_t* const end = payload.data() + payload.size();
  if (!parse_batch(payload.data(), end, head)) {
    result.num_rejected[static_cast<std::size_t>(Rejection::kMalformedBatch)] = 1;
    return result;
  }
  result.num_events = head.num_events;
  result.rank = head.rank;
  const std::lock_guard lock(source_->mutex);
  if (num_clears_seen_ != BlockIndex::num_clears(*source_)) unfinished_.clear();
  MsgpackReader reader(head.events, end);
  for (std::uint32_t i = 0; i < head.num_events; ++i) {
    MsgpackReader whole = reader;
    const ParseResult parsed = parse_event(reader, event_);
    if (parsed == ParseResult::kOk) {
      apply_event(event_, result);
      continue;
    }
    const bool unknown = parsed == ParseResult::kUnknownType;
    ++result.num_rejected[static_cast<std::size_t>(unknown ? Rejection::kUnknownType : Rejection::kMalformedEvent)];
    whole.skip();  // parse_batch has passed over it already
    reader = whole;
  }
  num_clears_seen_ = BlockIndex::num_clears(*source_);
  return result;
}

void EventApplier::apply_event(const Event& event, BatchResult& result) {
  if (event.kind == EventKind::kAllBlocksCleared) {
    index_->clear(*source_, result.rank);
    unfinished_.clear();
    ++result.num_cleared;
    return;
  }
  const std::optional<std::uint32_t> owner = index_->local_owner(*source_, {event.tier, event.group, result.rank});
  std::optional<Rejection> rejection;
  if (!owner) {
    rejection = Rejection::kMalformedEvent;
  } else if (event.kind == EventKind::kBlockRemoved) {
    remove(event, *owner, result);
  } else {
    rejection = event.token_ids.empty() ? store_known(event, *owner, result) : store(event, *owner, result);
  }
  if (rejection) ++result.num_rejected[static_cast<std::size_t>(*rejection)];
}

void EventApplier::remove(const Event& event, std::uint32_t owner, BatchResult& result) {
  result.num_removed += index_->remove(*source_, owner, event.block_hashes);
  if (unfinished_.empty()) return;
  for (const std::uint64_t hash : event.block_hashes) unfinished_.erase(hash);
}

// Known blocks appear in another tier: the event carries no tokens.
std::optional<Rejection> EventApplier::store_known(const Event& event, std::uint32_t owner, BatchResult& result) {
  std::optional<Rejection> rejection;
  blocks_.clear();
  for (const std::uint64_t hash : event.block_hashes) {
    const std::vector<std::uint64_t> keys = index_->request_keys(*source_, hash);
    if (keys.empty() && !unfinished_.contains(hash)) rejection = Rejection::kUnknownBlock;
    for (std::uint32_t part = 0; part < keys.size(); ++part) blocks_.push_back({hash, keys[part], part});
  }
  result.num_stored += index_->store(*source_, owner, blocks_, {});
  return rejection;
}

std::optional<Rejection> EventApplier::store(const Event& event, std::uint32_t owner, BatchResult& result) {
  const std::size_t engine_size = event.block_size;
  const std::size_t index_size = hasher_.block_size();
  const std::size_t num_engine_blocks = engine_size == 0 ? 0 : event.token_ids.size() / engine_size;
  if (num_engine_blocks < event.block_hashes.size() || num_engine_blocks * engine_size != event.token_ids.size()) {
    return Rejection::kMalformedEvent;
  }
  const bool divides = engine_size % index_size == 0 || index_size % engine_size == 0;
  if (!divides || engine_size / index_size > kMaxParts) return Rejection::kBlockSize;
  Unfinished start;
  if (!find_parent(event, start)) return Rejection::kUnknownParent;

  std::span<const std::uint32_t> tokens = event.token_ids;
  if (!start.tokens.empty()) {
    tokens_ = start.tokens;
    tokens_.insert(tokens_.end(), event.token_ids.begin(), event.token_ids.end());
    tokens = tokens_;
  }
  collect_extra_keys(event, num_engine_blocks, start);
  digests_.resize(hasher_.num_blocks(tokens.size()) * hasher_.digest_size());
  hasher_.hash_chain(tokens, start.parent, {extra_bytes_, extra_offsets_}, digests_);
  name_blocks(event, num_engine_blocks, start);
  result.num_stored += index_->store(*source_, owner, blocks_, block_digests_);
  return std::nullopt;
}

// Where the event's chain continues. False if its parent is not known.
bool EventApplier::find_parent(const Event& event, Unfinished& start) {
  if (!event.parent) return true;
  const auto unfinished = unfinished_.find(*event.parent);
  if (unfinished != unfinished_.end()) {
    start = unfinished->second;
    return true;
  }
  const std::vector<std::uint64_t> keys = index_->request_keys(*source_, *event.parent);
  if (keys.empty()) return false;
  start.parent.resize(hasher_.digest_size());
  return index_->read_digest(keys.back(), start.parent);
}

// Extra keys of one index block: the engine block's own for its first part, the LoRA name alone for the others.
std::span<const std::uint8_t> EventApplier::extra_of(const Event& event, std::size_t engine_block,
                                                     std::size_t num_engine_blocks, bool is_first_part) {
  if (!is_first_part || event.extra_offsets.empty()) return lora_extra_;
  // One entry per block of the span or, where the span is longer than the hashes, per hash, that is for its last blocks.
  const std::size_t num_entries = event.extra_offsets.size() - 1;
  const std::size_t missing = num_engine_blocks > num_entries ? num_engine_blocks - num_entries : 0;
  if (engine_block < missing) return lora_extra_;
  const std::size_t first = event.extra_offsets[engine_block - missing];
  return std::span(event.extra_bytes).subspan(first, event.extra_offsets[engine_block - missing + 1] - first);
}

void EventApplier::collect_extra_keys(const Event& event, std::size_t num_engine_blocks, const Unfinished& start) {
  extra_bytes_.clear();
  extra_offsets_.clear();
  lora_extra_.clear();
  if (!event.lora_name.empty()) {
    lora_extra_.push_back(0x81);  // array of one
    lora_extra_.insert(lora_extra_.end(), event.lora_name.begin(), event.lora_name.end());
  }
  if (event.extra_bytes.empty() && lora_extra_.empty() && start.extra.empty()) return;
  const std::size_t index_size = hasher_.block_size();
  const std::size_t num_blocks = (start.tokens.size() + event.token_ids.size()) / index_size;
  extra_offsets_.push_back(0);
  for (std::size_t block = 0; block < num_blocks; ++block) {
    std::span<const std::uint8_t> extra = start.extra;
    if (block != 0 || start.tokens.empty()) {
      const std::size_t token = block * index_size - start.tokens.size();
      const bool is_first_part = token % event.block_size == 0;
      extra = extra_of(event, token / event.block_size, num_engine_blocks, is_first_part);
    }
    extra_bytes_.insert(extra_bytes_.end(), extra.begin(), extra.end());
    extra_offsets_.push_back(extra_bytes_.size());
  }
}

// Gives the event's engine blocks their request keys and digests, or notes them as unfinished. Where the span is longer
// than the hashes, these name its last blocks.
void EventApplier::name_blocks(const Event& event, std::size_t num_engine_blocks, const Unfinished& start) {
  const std::size_t index_size = hasher_.block_size();
  const std::size_t digest_size = hasher_.digest_size();
  const std::size_t num_parts = std::max<std::size_t>(1, event.block_size / index_size);
  const std::size_t num_unnamed = num_engine_blocks - event.block_hashes.size();
  blocks_.clear();
  block_digests_.clear();
  for (std::size_t i = num_unnamed; i < num_engine_blocks; ++i) {
    const std::uint64_t engine_key = event.block_hashes[i - num_unnamed];
    const std::size_t end_token = start.tokens.size() + (i + 1) * event.block_size;
    if (end_token % index_size != 0) {
      unfinished_[engine_key] = unfinished_at(end_token, start);
      const std::size_t first_token = end_token / index_size * index_size;
      if (first_token >= start.tokens.size()) {
        const std::size_t first_engine_block = (first_token - start.tokens.size()) / event.block_size;
        const std::span<const std::uint8_t> extra = extra_of(event, first_engine_block, num_engine_blocks, true);
        unfinished_[engine_key].extra.assign(extra.begin(), extra.end());
      }
      continue;
    }
    for (std::size_t part = 0; part < num_parts; ++part) {
      const std::size_t block = end_token / index_size - num_parts + part;
      const std::span<const std::uint8_t> digest = std::span(digests_).subspan(block * digest_size, digest_size);
      blocks_.push_back({engine_key, kvblocks::external_hash(digest), static_cast<std::uint32_t>(part)});
      block_digests_.insert(block_digests_.end(), digest.begin(), digest.end());
    }
  }
}

// The state of the chain after `end_token` tokens, which is inside an index block.
EventApplier::Unfinished EventApplier::unfinished_at(std::size_t end_token, const Unfinished& start) const {
  const std::size_t index_size = hasher_.block_size();
  const std::size_t digest_size = hasher_.digest_size();
  const std::size_t num_full = end_token / index_size;
  const std::span<const std::uint32_t> tokens = start.tokens.empty() ? event_.token_ids : tokens_;
  Unfinished unfinished;
  unfinished.parent = start.parent;
  if (num_full != 0) {
    const auto last = digests_.begin() + static_cast<std::ptrdiff_t>((num_full - 1) * digest_size);
    unfinished.parent.assign(last, last + static_cast<std::ptrdiff_t>(digest_size));
  }
  const std::span<const std::uint32_t> rest = tokens.subspan(num_full * index_size, end_token - num_full * index_size);
  unfinished.tokens.assign(rest.begin(), rest.end());
  unfinished.extra = start.extra;
  return unfinished;
}

}  // namespace kvrouter
