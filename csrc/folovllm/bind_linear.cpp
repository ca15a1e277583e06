// PackedLinear for Python: addresses and names of dtypes in, nothing converted.
#include <nanobind/stl/string_view.h>

#include "bindings.h"
#include "packed_linear.h"
#include "recording.h"

namespace nb = nanobind;

namespace folovllm {
namespace {

void fill(PackedLinear& self, std::int64_t first_row, std::int64_t num_rows, Address source, std::int64_t row_stride,
          std::string_view source_dtype) {
  const DType dtype = dtype_of(source_dtype);
  const nb::gil_scoped_release no_gil;
  self.weights().fill(first_row, num_rows, pointer<const std::byte>(source), row_stride, dtype);
}

void set_bias(PackedLinear& self, Address source, std::string_view source_dtype) {
  self.set_bias(pointer<const std::byte>(source), dtype_of(source_dtype));
}

void forward(const PackedLinear& self, Address x, std::int64_t num_rows, std::int64_t x_stride, Address out,
             std::int64_t out_stride, std::string_view out_dtype, bool batch_invariant) {
  const DType dtype = dtype_of(out_dtype);
  const nb::gil_scoped_release no_gil;
  perform_on_tokens(num_rows, [=, self = &self](std::int64_t rows) {
    self->forward(pointer<const std::byte>(x), rows, x_stride, pointer<std::byte>(out), out_stride, dtype,
                  batch_invariant);
  });
}

void forward_silu_mul(const PackedLinear& self, Address x, std::int64_t num_rows, std::int64_t x_stride, Address out,
                      std::int64_t out_stride, bool batch_invariant) {
  const nb::gil_scoped_release no_gil;
  perform_on_tokens(num_rows, [=, self = &self](std::int64_t rows) {
    self->forward_silu_mul(pointer<const std::byte>(x), rows, x_stride, pointer<std::byte>(out), out_stride,
                           batch_invariant);
  });
}

void unpack(const PackedLinear& self, std::int64_t first_row, std::int64_t num_rows, Address out) {
  const nb::gil_scoped_release no_gil;
  self.weights().unpack(first_row, num_rows, pointer<std::byte>(out));
}

void gather(const PackedLinear& self, Address ids, std::int64_t num_rows, Address out) {
  const nb::gil_scoped_release no_gil;
  perform_on_tokens(num_rows, [=, self = &self](std::int64_t rows) {
    self->weights().gather(pointer<const std::int32_t>(ids), rows, pointer<std::byte>(out));
  });
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<PackedLinear>(m, "PackedLinear")
      .def(
          "__init__",
          [](PackedLinear* self, std::int64_t out_features, std::int64_t in_features, std::string_view dtype) {
            new (self) PackedLinear(out_features, in_features, dtype_of(dtype));
          },
          nb::arg("out_features"), nb::arg("in_features"), nb::arg("dtype"))
      .def("fill", &fill, nb::arg("first_row"), nb::arg("num_rows"), nb::arg("source"), nb::arg("row_stride"),
           nb::arg("source_dtype"))
      .def("set_bias", &set_bias, nb::arg("source"), nb::arg("source_dtype"))
      .def("forward", &forward, nb::arg("x"), nb::arg("num_rows"), nb::arg("x_stride"), nb::arg("out"),
           nb::arg("out_stride"), nb::arg("out_dtype"), nb::arg("batch_invariant") = false)
      .def("forward_silu_mul", &forward_silu_mul, nb::arg("x"), nb::arg("num_rows"), nb::arg("x_stride"),
           nb::arg("out"), nb::arg("out_stride"), nb::arg("batch_invariant") = false)
      .def("unpack", &unpack, nb::arg("first_row"), nb::arg("num_rows"), nb::arg("out"))
      .def("gather", &gather, nb::arg("ids"), nb::arg("num_rows"), nb::arg("out"))
      .def_prop_ro("nbytes", [](const PackedLinear& self) { return self.weights().num_bytes(); })
      .def_prop_ro("out_features", [](const PackedLinear& self) { return self.weights().out_features(); })
      .def_prop_ro("in_features", [](const PackedLinear& self) { return self.weights().in_features(); });
}

}  // namespace folovllm
