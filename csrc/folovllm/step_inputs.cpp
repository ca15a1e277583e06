#include "step_inputs.h"

#include <algorithm>

namespace folovllm {

DecodeSizes prepare_decodes(const BatchRows& batch, const std::int64_t* rows, std::int64_t num_reqs,
                            std::int64_t block_size, const DecodeInputs& out) {
  DecodeSizes sizes{0, 0};
  for (std::int64_t i = 0; i < num_reqs; ++i) {
    const std::int64_t row = rows[i];
    const std::int64_t position = batch.num_computed[row]++;
    const std::int64_t block = batch.block_table[row * batch.block_stride + position / block_size];
    const std::int64_t offset = position % block_size;
    out.input_ids[i] = batch.token_ids[row * batch.token_stride + position];
    out.positions[i] = position;
    out.slots[i] = block * block_size + offset;
    out.slot_blocks[i] = block;
    out.slot_offsets[i] = offset;
    out.seq_lens[i] = static_cast<std::int32_t>(position + 1);
    sizes.max_blocks = std::max(sizes.max_blocks, position / block_size + 1);
    sizes.num_sampling += position + 1 == batch.num_tokens[row] ? 1 : 0;
  }
  for (std::int64_t i = 0; i < num_reqs; ++i) {
    const std::int32_t* const from = batch.block_table + rows[i] * batch.block_stride;
    std::copy(from, from + sizes.max_blocks, out.block_tables + i * sizes.max_blocks);
  }
  return sizes;
}

}  // namespace folovllm
