// `kvblocks._native`: conversions only; `src/kvblocks/_native.pyi` documents what Python sees.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "kvblocks/block_hasher.h"

namespace nb = nanobind;

namespace {

using TokenArray = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableTokenArray = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OffsetArray = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DigestArray = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::span<const std::uint8_t> span_of(const nb::bytes& bytes) {
  return {static_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

kvblocks::Algorithm algorithm_named(const std::string& name) {
  if (name == "sha256_cbor") return kvblocks::Algorithm::kSha256Cbor;
  if (name == "xxhash_cbor") return kvblocks::Algorithm::kXxhashCbor;
  throw std::invalid_argument("no native algorithm " + name);
}

void hash_chain(const kvblocks::BlockHasher& hasher, const TokenArray& tokens, const nb::bytes& parent,
                const nb::bytes& extra_bytes, const OffsetArray& extra_offsets, DigestArray& out) {
  const std::span<const std::uint8_t> parent_span = span_of(parent);
  const kvblocks::ExtraKeys extra{span_of(extra_bytes), {extra_offsets.data(), extra_offsets.size()}};
  nb::gil_scoped_release release;
  hasher.hash_chain({tokens.data(), tokens.size()}, parent_span, extra, {out.data(), out.size()});
}

// Without a call for the small integers that token ids are.
bool read_int(PyObject* item, std::uint32_t& token) {
  auto* number = reinterpret_cast<PyLongObject*>(item);
#if PY_VERSION_HEX >= 0x030C0000
  if (PyUnstable_Long_IsCompact(number)) {
    const Py_ssize_t value = PyUnstable_Long_CompactValue(number);
#else
  if (static_cast<std::size_t>(Py_SIZE(item)) <= 1) {  // at most one digit (30 bits), and not negative
    const Py_ssize_t value = Py_SIZE(item) == 0 ? 0 : static_cast<Py_ssize_t>(number->ob_digit[0]);
#endif
    token = static_cast<std::uint32_t>(value);
    return value >= 0;
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
  if (overflow != 0 || value < 0 || value > std::numeric_limits<std::uint32_t>::max()) return false;
  token = static_cast<std::uint32_t>(value);
  return true;
}

// Reads an object that stands for an integer, as numpy's scalars do; bool is refused. May run Python code.
bool read_index(PyObject* item, std::uint32_t& token) {
  if (PyBool_Check(item)) return false;
  const nb::object held = nb::borrow(item);
  const nb::object index = nb::steal(PyNumber_Index(item));
  if (!index.is_valid()) {
    PyErr_Clear();
    return false;
  }
  return read_int(index.ptr(), token);
}

// The integer objects of a long prompt are spread over more memory than a cache holds: asking for them this many
// elements ahead was measured to take the copy from 4.8 to 3.9 ns per token.
constexpr std::size_t kPrefetchDistance = 32;

std::size_t copy_tokens(const nb::object& items, MutableTokenArray& out) {
  const bool is_list = PyList_Check(items.ptr());
  if (!is_list && !PyTuple_Check(items.ptr())) throw nb::type_error("items is a list or a tuple");
  std::uint32_t* tokens = out.data();
  const std::size_t count = out.size();
  for (std::size_t i = 0; i < count; ++i) {
    // Asked for each time: reading an element may run Python code, and that may shorten the list.
    const auto size = static_cast<std::size_t>(Py_SIZE(items.ptr()));
    if (i >= size) return i;
    PyObject** elements = is_list ? reinterpret_cast<PyListObject*>(items.ptr())->ob_item
                                  : reinterpret_cast<PyTupleObject*>(items.ptr())->ob_item;
    if (i + kPrefetchDistance < size) __builtin_prefetch(elements[i + kPrefetchDistance]);
    PyObject* item = elements[i];
    if (!(PyLong_CheckExact(item) ? read_int(item, tokens[i]) : read_index(item, tokens[i]))) return i;
  }
  return count;
}

nb::object split_digests(const DigestArray& packed) {
  nb::object list = nb::steal(PyList_New(static_cast<Py_ssize_t>(packed.shape(0))));
  if (!list.is_valid()) throw nb::python_error();
  const std::size_t size = packed.shape(1);
  for (std::size_t i = 0; i < packed.shape(0); ++i) {
    const char* digest = reinterpret_cast<const char*>(packed.data() + i * size);
    PyObject* item = PyBytes_FromStringAndSize(digest, static_cast<Py_ssize_t>(size));
    if (item == nullptr) throw nb::python_error();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), item);
  }
  return list;
}

}  // namespace

NB_MODULE(_native, module) {
  // Engines exit without tearing everything down; that is not a leak worth a page on their users' terminal.
  nanobind::set_leak_warnings(false);
  using namespace nb::literals;
  module.def("sha256_ni_supported", &kvblocks::sha256_ni_supported);
  module.def("copy_tokens", &copy_tokens, "items"_a, "out"_a);
  module.def("split_digests", &split_digests, "packed"_a);
  nb::class_<kvblocks::BlockHasher>(module, "BlockHasher")
      .def(
          "__init__",
          [](kvblocks::BlockHasher* self, const std::string& algorithm, const nb::bytes& none_hash,
             std::size_t block_size, bool portable) {
            new (self) kvblocks::BlockHasher(algorithm_named(algorithm), span_of(none_hash), block_size,
                                             portable ? kvblocks::Isa::kPortable : kvblocks::Isa::kBest);
          },
          "algorithm"_a, "none_hash"_a, "block_size"_a, "portable"_a = false)
      .def("hash_chain", &hash_chain, "tokens"_a, "parent"_a, "extra_bytes"_a, "extra_offsets"_a, "out"_a);
}
