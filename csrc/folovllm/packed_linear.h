// A linear layer: weights packed once, used for every number of rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "packed_weights.h"

namespace folovllm {

// `fill` and `set_bias` come before `forward`, which any number of threads may call at once.
class PackedLinear {
 public:
  // Throws std::invalid_argument for sizes below 1.
  PackedLinear(std::int64_t out_features, std::int64_t in_features, DType dtype);

  PackedWeights& weights() { return weights_; }
  const PackedWeights& weights() const { return weights_; }

  // [out_features], kept as fp32.
  void set_bias(const std::byte* source, DType source_dtype);

  // out = x W^T + bias on the pool's threads. `x` is [num_rows, in_features] of the layer's dtype, `out` [num_rows,
  // out_features] of `out_dtype`; strides are in elements. A row's bits depend on no other row and on no number of
  // threads; nor on num_rows in fp32 and fp16, and in bfloat16 with `batch_invariant`.
  // Throws std::invalid_argument unless out_dtype is fp32 or the layer's, num_rows >= 0, and no stride is short.
  void forward(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
               std::int64_t out_stride, DType out_dtype, bool batch_invariant) const;

  // out = silu(gate) * up, where `forward` gives rows [gate | up]; `out` is [num_rows, out_features / 2] of the layer's
  // dtype. The bits are those of `forward` and then `silu_mul`.
  // Throws std::invalid_argument unless out_features is a multiple of 32, num_rows >= 0, and no stride is short.
  void forward_silu_mul(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                        std::int64_t out_stride, bool batch_invariant) const;

 private:
  Gemm gemm(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out, std::int64_t out_stride,
            DType out_dtype) const;

  PackedWeights weights_;
  std::vector<float> bias_;  // empty, or padded with zeros to the end of the last panel
};

}  // namespace folovllm
