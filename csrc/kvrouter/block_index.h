// The index of a fleet's KV blocks: which pods hold which keys, and how far each pod's cache covers a prompt.
//
//   write path   event or add -> PodSource (one per pod and model, own mutex)   engine key -> records
//                             -> BlockTable (one, reader-writer lock)           request key -> set of owners
//   read path    lookup, score -> BlockTable under the shared lock, nothing else
//
// Parsing and hashing of events run under the source's mutex only, so event workers of different pods run in parallel
// and hold the table just long enough to enter finished keys.
// Lock order: PodSource::mutex or sources_mutex_, never both, then table_mutex_.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvrouter/block_table.h"
#include "kvrouter/fair_shared_mutex.h"
#include "kvrouter/record_map.h"

namespace kvrouter {

using PodId = std::uint32_t;

// Where in a pod a block lies. `tier` is in lower case.
struct Place {
  std::string tier;
  std::int32_t group = 0;
  std::int32_t rank = 0;
};

// One (pod, place), for reading.
struct OwnerView {
  std::string_view pod;
  std::string_view tier;
  std::int32_t group;
  std::int32_t rank;
};

// A block that a pod stored: its keys and, in event order, its part of the engine block.
struct StoredBlock {
  std::uint64_t engine_key;
  std::uint64_t request_key;
  std::uint32_t part;
};

class BlockIndex;

// What one pod holds of one model. Made and owned by the index.
class PodSource {
 public:
  std::mutex mutex;  // guards everything below; taken by whoever calls the index with this source

 private:
  friend class BlockIndex;
  struct LocalOwner {
    OwnerId id;
    Place place;
  };
  PodId pod_ = 0;
  std::string pod_name_;
  std::vector<LocalOwner> owners_;
  RecordMap records_;
  std::uint64_t num_clears_ = 0;
};

// Thread-safe. Methods that take a PodSource REQUIRE that the caller holds its mutex.
class BlockIndex {
 public:
  // Throws std::invalid_argument unless 1 <= max_blocks <= kMaxBlocks and max_owners_per_block >= 1.
  BlockIndex(std::size_t max_blocks, std::size_t max_owners_per_block);
  ~BlockIndex();

  // The source of (pod, model), made at the first call.
  std::shared_ptr<PodSource> source(std::string_view pod, std::string_view model);

  // The sources that a pod has.
  std::vector<std::shared_ptr<PodSource>> sources_of(std::string_view pod) const;

  // Index of `place` among the source's owners; nothing once the source has kMaxLocalOwners of them.
  std::optional<std::uint32_t> local_owner(PodSource& source, const Place& place);

  // Adds one reference per block. `digests` holds the blocks' digests end to end, or is empty.
  // Returns the number of blocks. REQUIRES: block.part < kMaxParts.
  std::size_t store(PodSource& source, std::uint32_t owner, std::span<const StoredBlock> blocks,
                    std::span<const std::uint8_t> digests);

  // Takes one reference of each engine key back; unknown ones are ignored. Returns the number of records found.
  std::size_t remove(PodSource& source, std::uint32_t owner, std::span<const std::uint64_t> engine_keys);

  // Forgets what the source holds, or what it holds at `rank`. Returns the number of records.
  std::size_t clear(PodSource& source, std::optional<std::int32_t> rank);

  // Counts the calls of clear() on the source, so that whoever caches something derived from it knows.
  static std::uint64_t num_clears(const PodSource& source) { return source.num_clears_; }

  // The records' request keys of an engine key in order of `part`, empty if unknown.
  std::vector<std::uint64_t> request_keys(const PodSource& source, std::uint64_t engine_key) const;

  // Writes the digest of a block. False if it is not known. REQUIRES: digest.size() >= 8.
  bool read_digest(std::uint64_t request_key, std::span<std::uint8_t> digest) const;

  // The (last) request key that any pod recorded for an engine key.
  std::optional<std::uint64_t> find_request_key(std::uint64_t engine_key) const;

  // As many pods as names; unknown names are left out. No value stands for all pods.
  using PodFilter = std::optional<std::vector<std::string>>;

  // `num_keys` consecutive keys with the same holders, oldest first.
  struct Run {
    std::size_t num_keys;
    std::vector<OwnerId> owners;
  };

  // Holders of the keys, up to and without the first key that nobody (of `pods`) holds.
  std::vector<Run> lookup(std::span<const std::uint64_t> keys, const PodFilter& pods) const;

  // For each pod that holds key 0: the sum, over its longest run of keys from key 0 on, of the weight of the best tier
  // that holds the key. A tier that `weights` does not name weighs `default_weight`.
  using TierWeights = std::vector<std::pair<std::string, double>>;
  std::vector<std::pair<std::string_view, double>> score(std::span<const std::uint64_t> keys, const PodFilter& pods,
                                                         const TierWeights& weights, double default_weight) const;

  // Views of an owner's strings live as long as the index. REQUIRES: the id came from this index.
  OwnerView owner(OwnerId id) const;

  struct Stats {
    std::size_t num_blocks;
    std::size_t num_records;
    std::size_t memory_bytes;
    std::uint64_t num_evicted;
  };
  Stats stats() const;

 private:
  struct Owner {
    PodId pod;
    std::uint32_t tier;
    std::int32_t group;
    std::int32_t rank;
  };
  struct PodHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view name) const { return std::hash<std::string_view>{}(name); }
  };
  using Interned = std::unordered_map<std::string, std::uint32_t, PodHash, std::equal_to<>>;
  class Walk;

  static std::uint32_t intern(Interned& ids, std::vector<const std::string*>& names, std::string_view name);

  std::vector<std::shared_ptr<PodSource>> all_sources() const;
  std::size_t drop(std::span<const std::pair<std::uint64_t, OwnerId>> holds);

  mutable std::mutex sources_mutex_;
  std::map<std::string, std::map<std::string, std::shared_ptr<PodSource>, std::less<>>, std::less<>> sources_;

  mutable FairSharedMutex table_mutex_;  // guards everything below
  BlockTable table_;
  Interned pods_;
  std::vector<const std::string*> pod_names_;
  Interned tiers_;
  std::vector<const std::string*> tier_names_;
  std::vector<Owner> owners_;
  std::map<std::tuple<PodId, std::uint32_t, std::int32_t, std::int32_t>, OwnerId> owner_ids_;
};

}  // namespace kvrouter
