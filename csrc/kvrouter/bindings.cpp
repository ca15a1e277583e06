// The extension module kvrouter._native: converts values and releases the GIL, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>

#include "kvrouter/block_index.h"
#include "kvrouter/event_apply.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvrouter {
namespace {

using KeyArray = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::uint64_t> as_span(const KeyArray& keys) { return {keys.data(), keys.shape(0)}; }

std::span<const std::uint8_t> as_span(const nb::bytes& bytes) {
  return {reinterpret_cast<const std::uint8_t*>(bytes.c_str()), bytes.size()};
}

void add(BlockIndex& index, const std::string& pod, const Place& place, const KeyArray& engine_keys,
         const KeyArray& request_keys, const std::vector<std::uint32_t>& parts) {
  const auto engine = as_span(engine_keys);
  const auto request = as_span(request_keys);
  if (engine.size() != request.size() || parts.size() != request.size()) {
    throw std::invalid_argument("engine keys, request keys and parts differ in number");
  }
  const nb::gil_scoped_release unlocked;
  std::vector<StoredBlock> blocks(request.size());
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = {engine[i], request[i], parts[i] % kMaxParts};
  const std::shared_ptr<PodSource> source = index.source(pod, "");
  const std::lock_guard lock(source->mutex);
  const std::optional<std::uint32_t> owner = index.local_owner(*source, place);
  if (!owner) throw std::invalid_argument("too many tiers, groups and ranks in one pod");
  index.store(*source, *owner, blocks, {});
}

std::size_t evict(BlockIndex& index, const std::string& pod, const Place& place, const KeyArray& engine_keys) {
  const nb::gil_scoped_release unlocked;
  std::size_t num_found = 0;
  for (const auto& source : index.sources_of(pod)) {
    const std::lock_guard lock(source->mutex);
    const std::optional<std::uint32_t> owner = index.local_owner(*source, place);
    if (owner) num_found += index.remove(*source, *owner, as_span(engine_keys));
  }
  return num_found;
}

std::size_t clear(BlockIndex& index, const std::string& pod, std::optional<std::int32_t> rank) {
  const nb::gil_scoped_release unlocked;
  std::size_t num_records = 0;
  for (const auto& source : index.sources_of(pod)) {
    const std::lock_guard lock(source->mutex);
    num_records += index.clear(*source, rank);
  }
  return num_records;
}

nb::list lookup(const BlockIndex& index, const KeyArray& keys, const BlockIndex::PodFilter& pods) {
  std::vector<BlockIndex::Run> runs;
  {
    const nb::gil_scoped_release unlocked;
    runs = index.lookup(as_span(keys), pods);
  }
  nb::list result;
  for (const BlockIndex::Run& run : runs) result.append(nb::make_tuple(run.num_keys, nb::cast(run.owners)));
  return result;
}

nb::dict score(const BlockIndex& index, const KeyArray& keys, const BlockIndex::PodFilter& pods,
               const BlockIndex::TierWeights& weights, double default_weight) {
  std::vector<std::pair<std::string_view, double>> scores;
  {
    const nb::gil_scoped_release unlocked;
    scores = index.score(as_span(keys), pods, weights, default_weight);
  }
  nb::dict result;
  for (const auto& [pod, value] : scores) result[nb::str(pod.data(), pod.size())] = value;
  return result;
}

std::shared_ptr<EventApplier> make_applier(std::shared_ptr<BlockIndex> index, const std::string& pod,
                                           const std::string& model, const std::string& algorithm,
                                           const nb::bytes& root, std::size_t block_size) {
  if (algorithm != "sha256_cbor" && algorithm != "xxhash_cbor") {
    throw std::invalid_argument("algorithm is 'sha256_cbor' or 'xxhash_cbor', not '" + algorithm + "'");
  }
  std::shared_ptr<PodSource> source = index->source(pod, model);
  return std::make_shared<EventApplier>(
      std::move(index), std::move(source),
      algorithm == "sha256_cbor" ? kvblocks::Algorithm::kSha256Cbor : kvblocks::Algorithm::kXxhashCbor, as_span(root),
      block_size);
}

nb::tuple apply(EventApplier& applier, const nb::bytes& payload) {
  BatchResult result;
  const std::span<const std::uint8_t> bytes = as_span(payload);
  {
    const nb::gil_scoped_release unlocked;
    result = applier.apply(bytes);
  }
  nb::object rejected = nb::none();
  if (std::ranges::any_of(result.num_rejected, [](std::uint32_t count) { return count != 0; })) {
    rejected = nb::cast(std::vector<std::uint32_t>(result.num_rejected.begin(), result.num_rejected.end()));
  }
  return nb::make_tuple(result.num_events, result.num_stored, result.num_removed, result.num_cleared, result.rank,
                        rejected);
}

nb::tuple stats(const BlockIndex& index) {
  const nb::gil_scoped_release unlocked;
  const BlockIndex::Stats stats = index.stats();
  const nb::gil_scoped_acquire locked;
  return nb::make_tuple(stats.num_blocks, stats.num_records, stats.memory_bytes, stats.num_evicted);
}

}  // namespace

NB_MODULE(_native, m) {
  // Engines exit without tearing everything down; that is not a leak worth a page on their users' terminal.
  nanobind::set_leak_warnings(false);
  m.attr("MAX_BLOCKS") = kMaxBlocks;
  m.attr("MAX_PARTS") = kMaxParts;
  m.attr("REJECTIONS") = nb::make_tuple("malformed_batch", "malformed_event", "unknown_type", "unknown_parent",
                                        "unknown_block", "block_size");

  nb::class_<BlockIndex>(m, "BlockIndex")
      .def(nb::init<std::size_t, std::size_t>(), "size"_a, "pod_cache_size"_a)
      .def("add",
           [](BlockIndex& index, const std::string& pod, const std::string& tier, std::int32_t group, std::int32_t rank,
              const KeyArray& engine_keys, const KeyArray& request_keys, const std::vector<std::uint32_t>& parts) {
             add(index, pod, {tier, group, rank}, engine_keys, request_keys, parts);
           },
           "pod"_a, "tier"_a, "group"_a, "rank"_a, "engine_keys"_a, "request_keys"_a, "parts"_a)
      .def("evict",
           [](BlockIndex& index, const std::string& pod, const std::string& tier, std::int32_t group, std::int32_t rank,
              const KeyArray& engine_keys) { return evict(index, pod, {tier, group, rank}, engine_keys); },
           "pod"_a, "tier"_a, "group"_a, "rank"_a, "engine_keys"_a)
      .def("clear", &clear, "pod"_a, "rank"_a.none())
      .def("lookup", &lookup, "keys"_a, "pods"_a.none())
      .def("score", &score, "keys"_a, "pods"_a.none(), "weights"_a, "default_weight"_a)
      .def("request_key", &BlockIndex::find_request_key, "engine_key"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("owner",
           [](const BlockIndex& index, OwnerId id) {
             const OwnerView view = index.owner(id);
             return nb::make_tuple(view.pod, view.tier, view.group, view.rank);
           },
           "owner_id"_a)
      .def("stats", &stats);

  nb::class_<EventApplier>(m, "EventApplier")
      .def(nb::new_(&make_applier), "index"_a, "pod"_a, "model"_a, "algorithm"_a, "root"_a, "block_size"_a)
      .def("apply", &apply, "payload"_a);
}

}  // namespace kvrouter
