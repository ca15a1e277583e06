// From logits to one token per row, without sorting the vocabulary.
//
// The token is a function of the row's logits, its options and its uniform number alone: neither of the other rows nor of
// the number of threads. NaN is never chosen, unless a row has nothing else.
#pragma once

#include <cstdint>

#include "number_formats.h"

namespace folovllm {

// Rows are `row_stride` elements apart.
struct Argmax {
  const void* logits;
  std::int64_t num_rows;
  std::int64_t vocab_size;
  std::int64_t row_stride;
  std::int64_t* out;
};

// The most likely token of each row, the lowest among equals; 0 for a row of NaN.
void argmax(const Argmax& op, DType dtype);

// Draws from softmax(logits / temperature), restricted in this order to the tokens
//   of at least min_p times the most likely one's probability,
//   the top_k most likely (the lowest ids among equals at the border, so that k remain),
//   the smallest set of the most likely that reaches top_p of what is left.
// The token is where the cumulative distribution passes `uniform`: over tokens by falling logit, then by id, if top_k or
// top_p restricts the row, and by id otherwise.
struct Sample {
  const float* logits;
  std::int64_t num_rows;
  std::int64_t vocab_size;
  std::int64_t row_stride;
  const float* temperature;   // above 0; null: 1 for all rows
  const std::int64_t* top_k;  // 0, or vocab_size and above: all; null: all
  const float* top_p;         // 1: all; null: all
  const float* min_p;         // 0: all; null: all
  const double* uniform;      // in [0, 1)
  std::int64_t* out;
};
void sample(const Sample& op);

}  // namespace folovllm
