#include "sampling.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu_features.h"
#include "sampling_row.h"
#include "thread_pool.h"

namespace folovllm {
namespace {

// Elements below which the caller works alone: about 10 us of work.
constexpr std::int64_t kElementsAlone = 32768;
// With fewer rows per thread than this, rows are cut in pieces: the last row must not keep one thread busy alone.
constexpr std::int64_t kRowsPerThread = 4;
constexpr std::int64_t kArgmaxPiece = 16384;

Row row_of(const Sample& op, std::int64_t i) {
  Row row{op.logits + i * op.row_stride,
          op.vocab_size,
          op.temperature != nullptr ? op.temperature[i] : 1.0F,
          op.top_k != nullptr ? op.top_k[i] : 0,
          op.top_p != nullptr ? op.top_p[i] : 1.0F,
          op.min_p != nullptr ? op.min_p[i] : 0.0F,
          op.uniform[i]};
  if (row.top_k < 0 || row.top_k >= row.size) row.top_k = 0;
  return row;
}

Scratch& scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

const SamplingKernels& sampling_kernels() {
#if defined(__x86_64__)
  if (current_isa() >= Isa::kAvx512) return kSamplingAvx512;
  if (current_isa() >= Isa::kAvx2) return kSamplingAvx2;
#endif
  return kSamplingPortable;
}

void argmax(const Argmax& op, DType dtype) {
  const auto kernel = sampling_kernels().argmax[static_cast<std::size_t>(dtype)];
  const auto element_bytes = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t num_pieces = (op.vocab_size + kArgmaxPiece - 1) / kArgmaxPiece;
  std::vector<Best> best(static_cast<std::size_t>(op.num_rows * num_pieces));
  const auto find = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t offset = i % num_pieces * kArgmaxPiece;
      const auto* const row = static_cast<const std::byte*>(op.logits) + i / num_pieces * op.row_stride * element_bytes;
      Best& here = best[static_cast<std::size_t>(i)];
      here = kernel(row + offset * element_bytes, std::min(kArgmaxPiece, op.vocab_size - offset));
      if (here.index >= 0) here.index += offset;
    }
  };
  if (op.num_rows * op.vocab_size <= kElementsAlone) {
    find(0, op.num_rows * num_pieces);
  } else {
    parallel_for(op.num_rows * num_pieces, 1, find);
  }
  for (std::int64_t row = 0; row < op.num_rows; ++row) {
    Best chosen{0.0F, -1};
    for (std::int64_t i = row * num_pieces; i < (row + 1) * num_pieces; ++i) {
      const Best& here = best[static_cast<std::size_t>(i)];
      if (here.index >= 0 && (chosen.index < 0 || here.value > chosen.value)) chosen = here;
    }
    op.out[row] = std::max<std::int64_t>(chosen.index, 0);
  }
}

void sample(const Sample& op) {
  const auto sample_rows = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) op.out[i] = sample_row(row_of(op, i), false, scratch());
  };
  if (op.num_rows * op.vocab_size <= kElementsAlone) return sample_rows(0, op.num_rows);
  const bool in_pieces = op.num_rows < kRowsPerThread * num_threads() && op.vocab_size > kElementsAlone;
  if (!in_pieces) return parallel_for(op.num_rows, std::max<std::int64_t>(1, kElementsAlone / op.vocab_size), sample_rows);
  for (std::int64_t i = 0; i < op.num_rows; ++i) op.out[i] = sample_row(row_of(op, i), true, scratch());
}

}  // namespace folovllm
