#include "kvrouter/block_index.h"

#include <algorithm>
#include <shared_mutex>
#include <stdexcept>

namespace kvrouter {
namespace {

// How many holds are dropped under one lock of the table, so that clearing a large pod does not stop lookups.
constexpr std::size_t kDropBatch = 1024;
constexpr std::size_t kPrefetchDistance = 16;

std::size_t checked_max_blocks(std::size_t max_blocks) {
  if (max_blocks < 1 || max_blocks > kMaxBlocks) {
    throw std::invalid_argument("size is in 1.." + std::to_string(kMaxBlocks) + " blocks, not " +
                                std::to_string(max_blocks));
  }
  return max_blocks;
}

std::size_t checked_max_owners(std::size_t max_owners) {
  if (max_owners < 1) throw std::invalid_argument("pod_cache_size is at least 1, not 0");
  return max_owners;
}

}  // namespace

BlockIndex::BlockIndex(std::size_t max_blocks, std::size_t max_owners_per_block)
    : table_(checked_max_blocks(max_blocks), checked_max_owners(max_owners_per_block)) {}

BlockIndex::~BlockIndex() = default;

std::uint32_t BlockIndex::intern(Interned& ids, std::vector<const std::string*>& names, std::string_view name) {
  const auto found = ids.find(name);
  if (found != ids.end()) return found->second;
  const auto added = ids.emplace(std::string(name), static_cast<std::uint32_t>(names.size())).first;
  names.push_back(&added->first);
  return added->second;
}

std::shared_ptr<PodSource> BlockIndex::source(std::string_view pod, std::string_view model) {
  const std::lock_guard lock(sources_mutex_);
  auto by_pod = sources_.find(pod);
  if (by_pod == sources_.end()) by_pod = sources_.try_emplace(std::string(pod)).first;
  auto by_model = by_pod->second.find(model);
  if (by_model != by_pod->second.end()) return by_model->second;
  auto made = std::make_shared<PodSource>();
  made->pod_name_ = pod;
  {
    const std::unique_lock table_lock(table_mutex_);
    made->pod_ = intern(pods_, pod_names_, pod);
  }
  by_pod->second.emplace(std::string(model), made);
  return made;
}

std::vector<std::shared_ptr<PodSource>> BlockIndex::sources_of(std::string_view pod) const {
  const std::lock_guard lock(sources_mutex_);
  std::vector<std::shared_ptr<PodSource>> found;
  const auto by_pod = sources_.find(pod);
  if (by_pod == sources_.end()) return found;
  for (const auto& [model, source] : by_pod->second) found.push_back(source);
  return found;
}

std::vector<std::shared_ptr<PodSource>> BlockIndex::all_sources() const {
  const std::lock_guard lock(sources_mutex_);
  std::vector<std::shared_ptr<PodSource>> all;
  for (const auto& [pod, by_model] : sources_) {
    for (const auto& [model, source] : by_model) all.push_back(source);
  }
  return all;
}

std::optional<std::uint32_t> BlockIndex::local_owner(PodSource& source, const Place& place) {
  for (std::uint32_t i = 0; i < source.owners_.size(); ++i) {
    const Place& known = source.owners_[i].place;
    if (known.group == place.group && known.rank == place.rank && known.tier == place.tier) return i;
  }
  if (source.owners_.size() >= kMaxLocalOwners) return std::nullopt;
  const std::unique_lock lock(table_mutex_);
  const std::uint32_t tier = intern(tiers_, tier_names_, place.tier);
  const auto [entry, is_new] = owner_ids_.try_emplace(std::tuple(source.pod_, tier, place.group, place.rank),
                                                      static_cast<OwnerId>(owners_.size()));
  if (is_new) owners_.push_back({source.pod_, tier, place.group, place.rank});
  source.owners_.push_back({entry->second, place});
  return static_cast<std::uint32_t>(source.owners_.size() - 1);
}

std::size_t BlockIndex::store(PodSource& source, std::uint32_t owner, std::span<const StoredBlock> blocks,
                              std::span<const std::uint8_t> digests) {
  const OwnerId owner_id = source.owners_[owner].id;
  const std::size_t digest_size = blocks.empty() ? 0 : digests.size() / blocks.size();
  std::vector<RecordMap::Added> added(blocks.size());
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    added[i] = source.records_.add(blocks[i].engine_key, blocks[i].request_key, owner, blocks[i].part);
  }
  const std::unique_lock lock(table_mutex_);
  for (const StoredBlock& block : blocks.first(std::min(kPrefetchDistance, blocks.size()))) {
    table_.prefetch(block.request_key);
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (i + kPrefetchDistance < blocks.size()) table_.prefetch(blocks[i + kPrefetchDistance].request_key);
    const std::span<const std::uint8_t> digest = digests.subspan(i * digest_size, digest_size);
    if (!added[i].is_new) {
      table_.renew(blocks[i].request_key, owner_id, digest);
      continue;
    }
    if (added[i].was_replaced) table_.release(added[i].replaced, owner_id);
    table_.hold(blocks[i].request_key, owner_id, digest);
  }
  return blocks.size();
}

std::size_t BlockIndex::remove(PodSource& source, std::uint32_t owner, std::span<const std::uint64_t> engine_keys) {
  const OwnerId owner_id = source.owners_[owner].id;
  std::vector<std::pair<std::uint64_t, OwnerId>> holds;
  std::size_t num_found = 0;
  for (const std::uint64_t engine_key : engine_keys) {
    num_found += source.records_.release(engine_key, owner,
                                         [&](std::uint64_t request_key) { holds.emplace_back(request_key, owner_id); });
  }
  drop(holds);
  return num_found;
}

std::size_t BlockIndex::drop(std::span<const std::pair<std::uint64_t, OwnerId>> holds) {
  std::size_t num_released = 0;
  for (std::size_t start = 0; start < holds.size(); start += kDropBatch) {
    const auto batch = holds.subspan(start, std::min(kDropBatch, holds.size() - start));
    const std::unique_lock lock(table_mutex_);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      if (i + kPrefetchDistance < batch.size()) table_.prefetch(batch[i + kPrefetchDistance].first);
      num_released += table_.release(batch[i].first, batch[i].second);
    }
  }
  return num_released;
}

std::size_t BlockIndex::clear(PodSource& source, std::optional<std::int32_t> rank) {
  std::vector<std::pair<std::uint64_t, OwnerId>> holds;
  std::vector<Record> kept;
  source.records_.for_each([&](const Record& record) {
    const PodSource::LocalOwner& owner = source.owners_[record.owner];
    if (!rank || owner.place.rank == *rank) {
      const std::uint64_t request_key = record.request_key;  // no reference into a packed record
      holds.emplace_back(request_key, owner.id);
    } else {
      kept.push_back(record);
    }
  });
  source.records_.clear();
  for (const Record& record : kept) {
    for (std::uint32_t i = 0; i < record.references; ++i) {
      source.records_.add(record.engine_key, record.request_key, record.owner, record.part);
    }
  }
  ++source.num_clears_;
  drop(holds);
  return holds.size();
}

std::vector<std::uint64_t> BlockIndex::request_keys(const PodSource& source, std::uint64_t engine_key) const {
  std::vector<std::uint64_t> keys;
  std::uint64_t parts_seen = 0;
  source.records_.for_each(engine_key, [&](const Record& record) {
    if (parts_seen >> record.part & 1) return;  // the same block in another tier
    parts_seen |= std::uint64_t{1} << record.part;
    if (keys.size() <= record.part) keys.resize(record.part + 1);
    keys[record.part] = record.request_key;
  });
  return keys;
}

bool BlockIndex::read_digest(std::uint64_t request_key, std::span<std::uint8_t> digest) const {
  const std::shared_lock lock(table_mutex_);
  return table_.read_digest(request_key, digest);
}

std::optional<std::uint64_t> BlockIndex::find_request_key(std::uint64_t engine_key) const {
  for (const auto& source : all_sources()) {
    const std::lock_guard lock(source->mutex);
    const std::vector<std::uint64_t> keys = request_keys(*source, engine_key);
    if (!keys.empty()) return keys.back();
  }
  return std::nullopt;
}

OwnerView BlockIndex::owner(OwnerId id) const {
  const std::shared_lock lock(table_mutex_);
  const Owner& owner = owners_[id];
  return {*pod_names_[owner.pod], *tier_names_[owner.tier], owner.group, owner.rank};
}

BlockIndex::Stats BlockIndex::stats() const {
  Stats stats{};
  for (const auto& source : all_sources()) {
    const std::lock_guard lock(source->mutex);
    stats.num_records += source->records_.size();
    stats.memory_bytes += source->records_.memory_bytes() + sizeof(PodSource);
  }
  const std::shared_lock lock(table_mutex_);
  stats.num_blocks = table_.num_blocks();
  stats.memory_bytes += table_.memory_bytes();
  stats.num_evicted = table_.num_evicted();
  return stats;
}

}  // namespace kvrouter
