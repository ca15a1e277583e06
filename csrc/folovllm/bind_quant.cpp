#include <nanobind/stl/string_view.h>

#include <string_view>

#include "bindings.h"
#include "quantized_linear.h"
#include "recording.h"

namespace nb = nanobind;

namespace folovllm {
namespace {

void fill(QuantizedLinear& self, std::int64_t first_column, std::int64_t num_columns, Address qweight,
          std::int64_t qweight_stride, Address qzeros, std::int64_t qzeros_stride, Address scales,
          std::int64_t scales_stride, std::int64_t zero_offset) {
  self.fill(first_column, {pointer<const std::uint32_t>(qweight), qweight_stride, pointer<const std::uint32_t>(qzeros),
                           qzeros_stride, pointer<const std::byte>(scales), scales_stride, num_columns, zero_offset});
}

void forward(const QuantizedLinear& self, Address x, std::int64_t num_rows, std::int64_t x_stride, Address out,
             std::int64_t out_stride, std::string_view out_dtype, bool batch_invariant) {
  perform_on_tokens(num_rows, [=, self = &self, dtype = dtype_of(out_dtype)](std::int64_t rows) {
    self->forward(pointer<const std::byte>(x), rows, x_stride, pointer<std::byte>(out), out_stride, dtype,
                  batch_invariant);
  });
}

}  // namespace

void bind_quant(nb::module_& m) {
  nb::class_<QuantizedLinear>(m, "QuantizedLinear")
      .def(
          "__init__",
          [](QuantizedLinear* self, std::int64_t out_features, std::int64_t in_features, int bits,
             std::int64_t group_size, std::string_view dtype, std::string_view scale_dtype) {
            new (self) QuantizedLinear(out_features, in_features, bits, group_size, dtype_of(dtype),
                                       dtype_of(scale_dtype));
          },
          nb::arg("out_features"), nb::arg("in_features"), nb::arg("bits"), nb::arg("group_size"), nb::arg("dtype"),
          nb::arg("scale_dtype"))
      .def("set_permutation",
           [](QuantizedLinear& self, Address permutation) {
             self.set_permutation(pointer<const std::int32_t>(permutation));
           },
           nb::arg("permutation"), WithoutGil())
      .def("fill", &fill, nb::arg("first_column"), nb::arg("num_columns"), nb::arg("qweight"),
           nb::arg("qweight_stride"), nb::arg("qzeros"), nb::arg("qzeros_stride"), nb::arg("scales"),
           nb::arg("scales_stride"), nb::arg("zero_offset"), WithoutGil())
      .def("set_bias", [](QuantizedLinear& self, Address bias) { self.set_bias(pointer<const float>(bias)); },
           nb::arg("bias"), WithoutGil())
      .def("forward", &forward, nb::arg("x"), nb::arg("num_rows"), nb::arg("x_stride"), nb::arg("out"),
           nb::arg("out_stride"), nb::arg("out_dtype"), nb::arg("batch_invariant") = false, WithoutGil())
      .def("unpack",
           [](const QuantizedLinear& self, std::int64_t first_column, std::int64_t num_columns, Address out) {
             self.unpack(first_column, num_columns, pointer<float>(out));
           },
           nb::arg("first_column"), nb::arg("num_columns"), nb::arg("out"), WithoutGil())
      .def_prop_ro("nbytes", &QuantizedLinear::num_bytes);
}

}  // namespace folovllm
