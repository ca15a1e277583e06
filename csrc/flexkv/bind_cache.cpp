// Python's view of the cache index: Mempool and RadixTree.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "flexkv/errors.h"
#include "flexkv/mempool.h"
#include "flexkv/radix_tree.h"

namespace nb = nanobind;

namespace flexkv {

namespace {

using DigestArray = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BlockIdArray = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewBlockIds = nb::ndarray<nb::numpy, std::int64_t, nb::ndim<1>>;
using NewDigests = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<2>>;

template <typename T>
nb::capsule owner_of(std::vector<T>* values) {
  return nb::capsule(values, [](void* held) noexcept { delete static_cast<std::vector<T>*>(held); });
}

NewBlockIds to_block_ids(std::vector<std::int64_t> ids) {
  auto* held = new std::vector<std::int64_t>(std::move(ids));
  return NewBlockIds(held->data(), {held->size()}, owner_of(held));
}

NewDigests to_digests(std::vector<std::uint8_t> digests, std::size_t digest_size) {
  auto* held = new std::vector<std::uint8_t>(std::move(digests));
  return NewDigests(held->data(), {held->size() / digest_size, digest_size}, owner_of(held));
}

Digests digests_of(const RadixTree& tree, const DigestArray& digests) {
  if (digests.shape(1) != tree.digest_size()) {
    throw std::invalid_argument("digests have " + std::to_string(tree.digest_size()) + " bytes here, not " +
                                std::to_string(digests.shape(1)));
  }
  return {digests.data(), digests.shape(0)};
}

std::pair<NewBlockIds, NewDigests> to_pair(const RadixTree& tree, Removal removal) {
  return {to_block_ids(std::move(removal.block_ids)), to_digests(std::move(removal.digests), tree.digest_size())};
}

void translate_state_error(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const StateError& state_error) {
    PyErr_SetString(nb::module_::import_("flexkv.errors").attr("CacheStateError").ptr(), state_error.what());
  }
}

void bind_mempool(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Mempool>(module, "Mempool")
      .def(nb::init<std::size_t>(), "num_blocks"_a)
      .def(
          "allocate",
          [](Mempool& pool, std::size_t count) {
            // Refused before memory for the answer is taken.
            std::vector<std::int64_t> ids(count <= pool.num_free() ? count : pool.num_free() + 1);
            pool.allocate(ids);
            return to_block_ids(std::move(ids));
          },
          "num_blocks"_a)
      .def(
          "recycle", [](Mempool& pool, const BlockIdArray& ids) { pool.recycle({ids.data(), ids.size()}); },
          "block_ids"_a)
      .def("is_free", &Mempool::is_free, "block_id"_a)
      .def_prop_ro("num_free", &Mempool::num_free)
      .def_prop_ro("num_blocks", &Mempool::num_blocks)
      .def("memory_bytes", &Mempool::memory_bytes);
}

}  // namespace

void bind_cache(nb::module_& module) {
  using namespace nb::literals;
  nb::register_exception_translator(translate_state_error);
  bind_mempool(module);
  nb::class_<RadixTree>(module, "RadixTree")
      .def(nb::init<std::size_t, const std::string&>(), "digest_size"_a, "policy"_a)
      .def(
          "match",
          [](const RadixTree& tree, const DigestArray& sequence) {
            const MatchLength length = tree.match(digests_of(tree, sequence));
            return std::pair(length.num_present, length.num_ready);
          },
          "sequence"_a)
      .def(
          "lock_prefix",
          [](RadixTree& tree, const DigestArray& sequence, bool ready_only) {
            const LockedPrefix prefix = tree.lock_prefix(digests_of(tree, sequence), ready_only);
            return std::pair(prefix.handle, prefix.num_blocks);
          },
          "sequence"_a, "ready_only"_a)
      .def(
          "path_block_ids",
          [](const RadixTree& tree, Handle handle, std::size_t first, std::size_t count) {
            if (count > tree.counts().num_blocks + tree.counts().num_detached_blocks) {
              throw StateError("the tree does not have " + std::to_string(count) + " blocks");
            }
            std::vector<std::int64_t> ids(count);
            tree.path_block_ids(handle, first, ids);
            return to_block_ids(std::move(ids));
          },
          "handle"_a, "first"_a, "count"_a)
      .def(
          "insert",
          [](RadixTree& tree, Handle handle, const DigestArray& digests, const BlockIdArray& ids) {
            return tree.insert(handle, digests_of(tree, digests), {ids.data(), ids.size()});
          },
          "handle"_a, "digests"_a, "block_ids"_a)
      .def("set_ready", &RadixTree::set_ready, "handle"_a, "num_blocks"_a)
      .def("is_attached", &RadixTree::is_attached, "handle"_a)
      .def("is_servable", &RadixTree::is_servable, "handle"_a)
      .def(
          "remove",
          [](RadixTree& tree, Handle handle, std::size_t num_blocks) {
            return to_pair(tree, tree.remove(handle, num_blocks));
          },
          "handle"_a, "num_blocks"_a)
      .def(
          "unlock", [](RadixTree& tree, Handle handle) { return to_block_ids(tree.unlock(handle)); }, "handle"_a)
      .def(
          "evict", [](RadixTree& tree, std::size_t count) { return to_pair(tree, tree.evict(count)); },
          "num_blocks"_a)
      .def("counts",
           [](const RadixTree& tree) {
             const TreeCounts counts = tree.counts();
             return std::tuple(counts.num_blocks, counts.num_ready_blocks, counts.num_detached_blocks, counts.num_nodes,
                               counts.num_locks);
           })
      .def("memory_bytes", &RadixTree::memory_bytes)
      .def("all_block_ids", [](const RadixTree& tree) { return to_block_ids(tree.all_block_ids()); })
      .def("check_integrity", &RadixTree::check_integrity);
}

}  // namespace flexkv
