// What one pod holds: engine key -> request keys, with the holder's identity and a reference count per record.
//
//   record, 20 bytes    engine key u64 | request key u64 | owner:12 part:6 references:14
//
// An engine block that covers several request keys has one record for each, `part` 0, 1, ...; a block held in several
// tiers has one per tier. All records of an engine key are found on one probe sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "kvrouter/hash_slots.h"

namespace kvrouter {

inline constexpr std::uint32_t kMaxLocalOwners = 1u << 12;
inline constexpr std::uint32_t kMaxParts = 1u << 6;
inline constexpr std::uint32_t kMaxReferences = (1u << 14) - 1;  // counting stops there

#pragma pack(push, 4)
struct Record {
  std::uint64_t engine_key;
  std::uint64_t request_key;
  std::uint32_t owner : 12;  // index into the pod's own list of owners
  std::uint32_t part : 6;
  std::uint32_t references : 14;  // 0: the slot is empty
};
#pragma pack(pop)
static_assert(sizeof(Record) == 20);

// Not thread-safe.
class RecordMap {
 public:
  // Calls visit(const Record&) for every record of `engine_key`.
  template <typename Visit>
  void for_each(std::uint64_t engine_key, Visit&& visit) const {
    if (records_.empty()) return;
    for (std::size_t i = home(engine_key); records_[i].references != 0; i = next(i)) {
      if (records_[i].engine_key == engine_key) visit(records_[i]);
    }
  }

  // Calls visit(const Record&) for every record.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (const Record& record : records_) {
      if (record.references != 0) visit(record);
    }
  }

  // Adds a reference. Returns true if the record is new.
  // An existing record of the same engine key, owner and part that names another request key is replaced by the new
  // one; `replaced` then receives the old request key and `was_replaced` is set.
  struct Added {
    bool is_new;
    bool was_replaced;
    std::uint64_t replaced;
  };
  Added add(std::uint64_t engine_key, std::uint64_t request_key, std::uint32_t owner, std::uint32_t part);

  // Takes one reference from every record of (engine_key, owner). Calls gone(request_key) for those that lost their
  // last. Returns how many records there were.
  template <typename Gone>
  std::size_t release(std::uint64_t engine_key, std::uint32_t owner, Gone&& gone) {
    if (records_.empty()) return 0;
    std::size_t num_found = 0;
    std::size_t i = home(engine_key);
    while (records_[i].references != 0) {
      Record& record = records_[i];
      if (record.engine_key != engine_key || record.owner != owner) {
        i = next(i);
        continue;
      }
      ++num_found;
      if (record.references == kMaxReferences || --record.references != 0) {
        i = next(i);
        continue;
      }
      const std::uint64_t request_key = record.request_key;
      erase(i);  // another record may have moved here
      gone(request_key);
    }
    return num_found;
  }

  void clear() { records_ = {}, size_ = 0; }
  std::size_t size() const { return size_; }
  std::size_t memory_bytes() const { return records_.capacity() * sizeof(Record); }

 private:
  std::size_t home(std::uint64_t engine_key) const { return home_slot(mix(engine_key), records_.size()); }
  std::size_t next(std::size_t i) const { return i + 1 == records_.size() ? 0 : i + 1; }
  void erase(std::size_t hole);
  void grow();

  std::vector<Record> records_;
  std::size_t size_ = 0;
};

}  // namespace kvrouter
