#include <nanobind/stl/string_view.h>

#include <string_view>

#include "attention_paged.h"
#include "bindings.h"
#include "recording.h"

namespace nb = nanobind;

namespace folovllm {
void bind_attention(nb::module_& m) {
  nb::class_<PagedAttention>(m, "PagedAttention")
      .def(
          "__init__",
          [](PagedAttention* self, int num_heads, int num_kv_heads, int head_size, int block_size, float scale,
             std::string_view dtype) {
            new (self) PagedAttention({num_heads, num_kv_heads, head_size, block_size, scale, dtype_of(dtype)});
          },
          nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_size"), nb::arg("block_size"), nb::arg("scale"),
          nb::arg("dtype"))
      .def(
          "forward",
          [](PagedAttention& self, Address query, std::int64_t query_stride, Address kv_cache, Address query_start_loc,
             Address seq_lens, Address block_tables, std::int64_t block_table_stride, std::int64_t num_reqs,
             Address out, std::int64_t out_stride, bool batch_invariant) {
            AttentionBatch batch{
                .query = pointer<const void>(query),
                .query_stride = query_stride,
                .kv_cache = pointer<const void>(kv_cache),
                .query_start_loc = pointer<const std::int32_t>(query_start_loc),
                .seq_lens = pointer<const std::int32_t>(seq_lens),
                .block_tables = pointer<const std::int32_t>(block_tables),
                .block_table_stride = block_table_stride,
                .num_reqs = num_reqs,
                .out = pointer<void>(out),
                .out_stride = out_stride,
            };
            const AttentionMode mode = batch_invariant ? AttentionMode::kBatchInvariant : AttentionMode::kFast;
            self.forward(batch, mode);
            if (Recording* const recording = Recording::current()) {
              recording->add([self = &self, batch, mode](const StepSizes& sizes) mutable {
                batch.num_reqs = sizes.num_reqs;
                batch.block_table_stride = sizes.block_table_stride;
                self->forward(batch, mode);
              });
            }
          },
          nb::arg("query"), nb::arg("query_stride"), nb::arg("kv_cache"), nb::arg("query_start_loc"),
          nb::arg("seq_lens"), nb::arg("block_tables"), nb::arg("block_table_stride"), nb::arg("num_reqs"),
          nb::arg("out"), nb::arg("out_stride"), nb::arg("batch_invariant") = false, WithoutGil());
}

}  // namespace folovllm
