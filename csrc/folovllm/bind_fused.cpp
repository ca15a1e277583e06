// Python face of fused_ops.
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <string_view>

#include "bindings.h"
#include "fused_ops.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace folovllm {
namespace {

void construct_layout(QKVLayout* self, std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_size,
                      std::int64_t block_size, std::string_view dtype, Address cos_sin, Address q_norm, Address k_norm,
                      float eps) {
  const QKVLayout layout{num_heads, num_kv_heads, head_size, block_size, dtype_of(dtype), pointer<const void>(cos_sin),
                         pointer<const void>(q_norm), pointer<const void>(k_norm), eps};
  layout.check();
  new (self) QKVLayout(layout);
}

}  // namespace

void bind_fused(nb::module_& m) {
  m.def(
      "rms_norm",
      [](Address x, std::int64_t x_stride, Address weight, Address out, std::int64_t num_rows, std::int64_t size,
         float eps, std::string_view dtype) {
        perform_on_tokens(num_rows, [=, type = dtype_of(dtype)](std::int64_t rows) {
          rms_norm({pointer<void>(x), x_stride, pointer<void>(weight), pointer<void>(out), rows, size, eps}, type);
        });
      },
      "x"_a, "x_stride"_a, "weight"_a, "out"_a, "num_rows"_a, "size"_a, "eps"_a, "dtype"_a, WithoutGil());
  m.def(
      "add_rms_norm",
      [](Address x, Address residual, Address weight, Address out, std::int64_t num_rows, std::int64_t size, float eps,
         std::string_view dtype) {
        perform_on_tokens(num_rows, [=, type = dtype_of(dtype)](std::int64_t rows) {
          add_rms_norm(
              {pointer<void>(x), pointer<void>(residual), pointer<void>(weight), pointer<void>(out), rows, size, eps},
              type);
        });
      },
      "x"_a, "residual"_a, "weight"_a, "out"_a, "num_rows"_a, "size"_a, "eps"_a, "dtype"_a, WithoutGil());
  m.def(
      "silu_mul",
      [](Address gate_up, Address out, std::int64_t num_rows, std::int64_t size, std::string_view dtype) {
        perform_on_tokens(num_rows, [=, type = dtype_of(dtype)](std::int64_t rows) {
          silu_mul({pointer<void>(gate_up), pointer<void>(out), size, rows, size}, type);
        });
      },
      "gate_up"_a, "out"_a, "num_rows"_a, "size"_a, "dtype"_a, WithoutGil());
  m.def(
      "embed",
      [](Address table, std::int64_t row_stride, Address ids, std::int64_t num_rows, std::int64_t size, Address out,
         std::string_view table_dtype, std::string_view dtype) {
        perform_on_tokens(num_rows, [=, from = dtype_of(table_dtype), to = dtype_of(dtype)](std::int64_t rows) {
          embed({pointer<void>(table), row_stride, pointer<const std::int32_t>(ids), rows, size, pointer<void>(out)},
                from, to);
        });
      },
      "table"_a, "row_stride"_a, "ids"_a, "num_rows"_a, "size"_a, "out"_a, "table_dtype"_a, "dtype"_a, WithoutGil());
  nb::class_<QKVLayout>(m, "QKVLayout")
      .def("__init__", &construct_layout, "num_heads"_a, "num_kv_heads"_a, "head_size"_a, "block_size"_a, "dtype"_a,
           "cos_sin"_a, "q_norm"_a = 0, "k_norm"_a = 0, "eps"_a = 0.0F);
  m.def(
      "rotate_and_write",
      [](const QKVLayout& layout, Address qkv, std::int64_t qkv_stride, Address positions, Address slot_mapping,
         Address kv_cache, Address query, std::int64_t num_tokens) {
        perform_on_tokens(num_tokens, [=, layout = &layout](std::int64_t rows) {
          rotate_and_write(*layout, {pointer<void>(qkv), qkv_stride, pointer<const std::int64_t>(positions),
                                     pointer<const std::int64_t>(slot_mapping), pointer<void>(kv_cache),
                                     pointer<void>(query), rows});
        });
      },
      "layout"_a, "qkv"_a, "qkv_stride"_a, "positions"_a, "slot_mapping"_a, "kv_cache"_a, "query"_a, "num_tokens"_a,
      WithoutGil());
}

}  // namespace folovllm
