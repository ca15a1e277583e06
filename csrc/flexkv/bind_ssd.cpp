// Python face of the SSD tier's transfers and of the checksum; the GIL is released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "checksum.h"
#include "transfer_ssd.h"

namespace nb = nanobind;

namespace flexkv {
namespace {

using Ids = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

template <typename Array>
auto span_of(const Array& array) {
  return std::span(array.data(), array.size());
}

template <typename T>
NewArray<T> to_array(std::vector<T> values) {
  auto* held = new std::vector<T>(std::move(values));
  nb::capsule owner(held, [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
  return NewArray<T>(held->data(), {held->size()}, owner);
}

SsdBackend backend_of(const std::string& name) {
  if (name == "auto") return SsdBackend::kAuto;
  if (name == "io_uring") return SsdBackend::kIoUring;
  if (name == "threads") return SsdBackend::kThreads;
  throw std::invalid_argument("backend is 'auto', 'io_uring' or 'threads', not '" + name + "'");
}

Clock::time_point deadline_in(double seconds) {
  // A bound that no clock overflows: some 30 years.
  if (!(seconds >= 0 && seconds <= 1e9)) throw std::invalid_argument("timeout_s is 0 or more seconds");
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::pair<NewArray<std::int32_t>, NewArray<std::uint64_t>> write(SsdTransfer& self, const Ids& slots,
                                                                 const Ids& pool_blocks, double timeout_s) {
  std::vector<std::int32_t> status(slots.size());
  std::vector<std::uint64_t> checksums(slots.size());
  {
    const nb::gil_scoped_release release;
    self.write(span_of(slots), span_of(pool_blocks), deadline_in(timeout_s), status, checksums);
  }
  return {to_array(std::move(status)), to_array(std::move(checksums))};
}

NewArray<std::int32_t> read(SsdTransfer& self, const Ids& slots, const Ids& pool_blocks, const Checksums& checksums,
                            double timeout_s) {
  std::vector<std::int32_t> status(slots.size());
  {
    const nb::gil_scoped_release release;
    self.read(span_of(slots), span_of(pool_blocks), span_of(checksums), deadline_in(timeout_s), status);
  }
  return to_array(std::move(status));
}

void translate_error(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const SsdTransferError& stuck) {
    PyErr_SetString(nb::module_::import_("flexkv.errors").attr("TransferError").ptr(), stuck.what());
  } catch (const std::system_error& system) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(system.code().value(), system.what()).ptr());
  }
}

void bind_checksum(nb::module_& m) {
  m.def("checksum", [](const Bytes& data) {
    const nb::gil_scoped_release release;
    return checksum(std::as_bytes(span_of(data)));
  }, nb::arg("data"));
  m.def("checksum_isa", [] {
    const ChecksumIsa isa = best_checksum_isa();
    return isa == ChecksumIsa::kAvx512 ? "avx512" : isa == ChecksumIsa::kAvx2 ? "avx2" : "portable";
  });
}

void bind_options(nb::module_& m) {
  nb::class_<SsdOptions>(m, "SsdOptions")
      .def("__init__", [](SsdOptions* self, std::uint32_t queue_depth, std::uint32_t io_bytes,
                          const std::string& backend, std::uint32_t num_threads, bool register_memory, bool direct,
                          std::uint32_t drain_timeout_ms) {
        new (self) SsdOptions{queue_depth, io_bytes, backend_of(backend), num_threads, register_memory, direct,
                              std::chrono::milliseconds(drain_timeout_ms)};
      }, nb::kw_only(), nb::arg("queue_depth") = SsdOptions{}.queue_depth, nb::arg("io_bytes") = SsdOptions{}.io_bytes,
         nb::arg("backend") = "auto", nb::arg("num_threads") = SsdOptions{}.num_threads,
         nb::arg("register_memory") = true, nb::arg("direct") = true,
         nb::arg("drain_timeout_ms") = SsdOptions{}.drain_timeout.count());
}

}  // namespace

void bind_ssd(nb::module_& m) {
  nb::register_exception_translator(translate_error);
  bind_checksum(m);
  bind_options(m);
  nb::class_<SsdTransfer>(m, "SsdTransfer")
      .def("__init__", [](SsdTransfer* self, const std::vector<std::string>& paths, std::uint64_t block_bytes,
                          std::int64_t num_slots, const PoolSide& pool, const SsdOptions& options) {
        const nb::gil_scoped_release release;  // pinning memory takes a while
        const SsdLayout layout{block_bytes, num_slots, static_cast<std::uint32_t>(paths.size())};
        new (self) SsdTransfer(layout, paths, pool, options);
      }, nb::kw_only(), nb::arg("paths"), nb::arg("block_bytes"), nb::arg("num_slots"), nb::arg("pool"),
         nb::arg("options"))
      .def("write", &write, nb::arg("slots"), nb::arg("pool_blocks"), nb::arg("timeout_s"))
      .def("read", &read, nb::arg("slots"), nb::arg("pool_blocks"), nb::arg("checksums"), nb::arg("timeout_s"))
      .def("sync", &SsdTransfer::sync, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("backend", [](const SsdTransfer& self) { return self.is_io_uring() ? "io_uring" : "threads"; })
      .def_prop_ro("is_direct", &SsdTransfer::is_direct)
      .def_prop_ro("is_bounced", &SsdTransfer::is_bounced)
      .def_prop_ro("is_memory_registered", &SsdTransfer::is_memory_registered)
      .def_prop_ro("fallbacks", &SsdTransfer::fallbacks)
      .def("counters", [](const SsdTransfer& self) {
        const SsdCounters& counters = self.counters();
        return nb::make_tuple(counters.num_requests, counters.num_short, counters.num_repeated);
      });
}

}  // namespace flexkv
