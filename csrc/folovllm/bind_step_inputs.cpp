// Python face of step_inputs.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "bindings.h"
#include "step_inputs.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace folovllm {
namespace {

template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The arrays of one runner, which keeps them.
struct DecodePreparer {
  BatchRows batch;
  std::int64_t block_size;
  DecodeInputs inputs;
};

}  // namespace

void bind_step_inputs(nb::module_& m) {
  nb::class_<DecodePreparer>(m, "DecodePreparer")
      .def(
          "__init__",
          [](DecodePreparer* self, Matrix<std::int32_t> token_ids, Matrix<std::int32_t> block_table,
             Vector<std::int64_t> num_tokens, Vector<std::int64_t> num_computed, std::int64_t block_size,
             Vector<std::int32_t> input_ids, Vector<std::int64_t> positions, Vector<std::int64_t> slots,
             Vector<std::int64_t> slot_blocks, Vector<std::int64_t> slot_offsets, Vector<std::int32_t> seq_lens,
             Vector<std::int32_t> block_tables) {
            const BatchRows batch{token_ids.data(),         token_ids.stride(0), block_table.data(),
                                  block_table.stride(0), num_tokens.data(),   num_computed.data()};
            new (self) DecodePreparer{batch,
                                      block_size,
                                      {input_ids.data(), positions.data(), slots.data(), slot_blocks.data(),
                                       slot_offsets.data(), seq_lens.data(), block_tables.data()}};
          },
          "token_ids"_a, "block_table"_a, "num_tokens"_a, "num_computed"_a, "block_size"_a, "input_ids"_a,
          "positions"_a, "slots"_a, "slot_blocks"_a, "slot_offsets"_a, "seq_lens"_a, "block_tables"_a)
      .def(
          "prepare",
          [](const DecodePreparer& self, Vector<const std::int64_t> rows) {
            const DecodeSizes sizes = prepare_decodes(self.batch, rows.data(), static_cast<std::int64_t>(rows.shape(0)),
                                                      self.block_size, self.inputs);
            return std::pair(sizes.max_blocks, sizes.num_sampling);
          },
          "rows"_a);
}

}  // namespace folovllm
