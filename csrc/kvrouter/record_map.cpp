#include "kvrouter/record_map.h"

#include <algorithm>

namespace kvrouter {

RecordMap::Added RecordMap::add(std::uint64_t engine_key, std::uint64_t request_key, std::uint32_t owner,
                                std::uint32_t part) {
  if ((size_ + 1) * 8 > records_.size() * 7) grow();
  std::size_t i = home(engine_key);
  for (; records_[i].references != 0; i = next(i)) {
    Record& record = records_[i];
    if (record.engine_key != engine_key || record.owner != owner || record.part != part) continue;
    if (record.request_key != request_key) {
      const std::uint64_t replaced = record.request_key;
      record.request_key = request_key;
      record.references = 1;
      return {true, true, replaced};
    }
    if (record.references < kMaxReferences) ++record.references;
    return {false, false, 0};
  }
  records_[i] = {engine_key, request_key, owner, part, 1};
  ++size_;
  return {true, false, 0};
}

// Closes the gap by moving later records of the probe sequence back, so that no tombstones are needed.
void RecordMap::erase(std::size_t hole) {
  const std::size_t size = records_.size();
  for (std::size_t i = next(hole); records_[i].references != 0; i = next(i)) {
    const std::size_t start = home(records_[i].engine_key);
    const std::size_t distance = i >= start ? i - start : i + size - start;
    const std::size_t gap = i >= hole ? i - hole : i + size - hole;
    if (distance < gap) continue;
    records_[hole] = records_[i];
    hole = i;
  }
  records_[hole].references = 0;
  --size_;
}

// Small steps cost little: records lie in the order of their hashes, before and after, so both tables are walked once.
void RecordMap::grow() {
  std::vector<Record> old(std::max<std::size_t>(16, records_.size() + records_.size() / 6), Record{});
  old.swap(records_);
  for (const Record& record : old) {
    if (record.references == 0) continue;
    std::size_t i = home(record.engine_key);
    while (records_[i].references != 0) i = next(i);
    records_[i] = record;
  }
}

}  // namespace kvrouter
