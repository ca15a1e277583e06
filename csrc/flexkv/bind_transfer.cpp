// Python face of transfer_host: addresses and strides in, the GIL released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>

#include "transfer_host.h"

namespace nb = nanobind;

namespace flexkv {
namespace {

using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const int64_t> span_of(const Ids& ids) { return {ids.data(), ids.size()}; }

std::byte* pointer(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

DeviceSide device_side(const std::vector<uintptr_t>& layers, int64_t num_blocks, int64_t block_stride,
                       const std::vector<std::pair<int64_t, int64_t>>& dims, int64_t element_bytes) {
  DeviceSide side{{}, num_blocks, block_stride, {}, element_bytes};
  for (const uintptr_t layer : layers) side.layers.push_back(pointer(layer));
  for (const auto& [size, stride] : dims) side.dims.push_back({size, stride});
  return side;
}

}  // namespace

void bind_transfer(nb::module_& m) {
  nb::class_<DeviceSide>(m, "DeviceSide")
      .def("__init__", [](DeviceSide* self, const std::vector<uintptr_t>& layers, int64_t num_blocks,
                          int64_t block_stride, const std::vector<std::pair<int64_t, int64_t>>& dims,
                          int64_t element_bytes) {
        new (self) DeviceSide(device_side(layers, num_blocks, block_stride, dims, element_bytes));
      }, nb::arg("layers"), nb::arg("num_blocks"), nb::arg("block_stride"), nb::arg("dims"), nb::arg("element_bytes"));
  nb::class_<PoolSide>(m, "PoolSide")
      .def("__init__", [](PoolSide* self, uintptr_t base, int64_t num_blocks, int64_t block_stride, int64_t offset) {
        new (self) PoolSide{pointer(base), num_blocks, block_stride, offset};
      }, nb::arg("base"), nb::arg("num_blocks"), nb::arg("block_stride"), nb::arg("offset"));
  nb::class_<HostTransfer>(m, "HostTransfer")
      .def(nb::init<DeviceSide, PoolSide, int>(), nb::arg("device"), nb::arg("pool"), nb::arg("num_threads"))
      .def("copy", [](HostTransfer& self, bool to_device, const Ids& device_blocks, const Ids& pool_blocks,
                      int64_t first_layer, int64_t num_layers) {
        const nb::gil_scoped_release release;
        self.copy(to_device ? Direction::kToDevice : Direction::kToPool, span_of(device_blocks), span_of(pool_blocks),
                  first_layer, num_layers);
      }, nb::kw_only(), nb::arg("to_device"), nb::arg("device_blocks"), nb::arg("pool_blocks"),
         nb::arg("first_layer"), nb::arg("num_layers"))
      .def_prop_ro("layer_bytes", &HostTransfer::layer_bytes);
}

}  // namespace flexkv
