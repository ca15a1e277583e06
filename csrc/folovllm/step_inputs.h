// The inputs of a step in which each request computes one token, from the rows of the batch.
//
// All steps but those with prompts are of this kind. Where tensors go to a device, they are the host's side of it.
#pragma once

#include <cstdint>

namespace folovllm {

// The persistent arrays of the batch (worker/input_batch.py), by row; strides in elements.
struct BatchRows {
  const std::int32_t* token_ids;
  std::int64_t token_stride;
  const std::int32_t* block_table;
  std::int64_t block_stride;
  const std::int64_t* num_tokens;
  std::int64_t* num_computed;
};

// What the model gets: one entry per request, and of block_tables one row of `max_blocks`.
struct DecodeInputs {
  std::int32_t* input_ids;
  std::int64_t* positions;
  std::int64_t* slots;
  std::int64_t* slot_blocks;
  std::int64_t* slot_offsets;
  std::int32_t* seq_lens;
  std::int32_t* block_tables;
};

struct DecodeSizes {
  std::int64_t max_blocks;    // blocks of the longest request
  std::int64_t num_sampling;  // requests whose last known token this is
};

// Compute the next token of each of `rows`, and count it as computed.
DecodeSizes prepare_decodes(const BatchRows& batch, const std::int64_t* rows, std::int64_t num_reqs,
                            std::int64_t block_size, const DecodeInputs& out);

}  // namespace folovllm
