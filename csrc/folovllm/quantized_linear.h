// A linear layer of GPTQ weights: y = x W^T + b with W[n][k] = scale[g][n] * (q[n][k] - zero[g][n]), g the group of k.
//
// Packed once into panels (quantized_layout.h), straight from the checkpoint's tensors:
//
//   qweight  int32 [K * bits / 32][N]    32 / bits consecutive k's of a column in a word, the first in the low bits
//   qzeros   int32 [groups][N * bits / 32]   the same along N; each is the zero point, or in the older format one less
//   scales   fp32, fp16 or bf16 [groups][N]
//
// A checkpoint may order K otherwise than by groups ("act order"); sorted by group, the weights are in plain order and
// x is permuted on the way in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "number_formats.h"
#include "packed_weights.h"
#include "quantized_layout.h"

namespace folovllm {

class QuantizedLinear {
 public:
  // Some output columns as the checkpoint has them; strides in elements from row to row.
  struct Source {
    const std::uint32_t* qweight;
    std::int64_t qweight_stride;
    const std::uint32_t* qzeros;
    std::int64_t qzeros_stride;
    const std::byte* scales;
    std::int64_t scales_stride;
    std::int64_t num_columns;
    std::int64_t zero_offset;  // what is added to the stored zero points: 1 in the older format, 0 in "gptq_v2"
  };

  // `group_size` is in elements of K, the whole of it for in_features; `dtype` is that of x, `scale_type` of scales.
  // Throws std::invalid_argument: bits other than 4 and 8, sizes below 1, in_features or group_size that do not fill
  // words.
  QuantizedLinear(std::int64_t out_features, std::int64_t in_features, int bits, std::int64_t group_size, DType dtype,
                  DType scale_type);

  // K's order: place i of the sorted weights is k = permutation[i] of the checkpoint and of x. Before `fill`.
  // Throws std::invalid_argument if it is no permutation.
  void set_permutation(const std::int32_t* permutation);

  // Columns from `first_column` on. Throws std::invalid_argument for columns that are not there, or if their number
  // does not fill words of zero points.
  void fill(std::int64_t first_column, const Source& source);

  // `bias`: fp32 [out_features], copied.
  void set_bias(const float* bias);

  // x [num_rows][in_features] of `dtype` -> out [num_rows][out_features] of `out_type`; strides in elements.
  // With `batch_invariant`, and always for fp32 and fp16, the bits of a row do not depend on num_rows.
  void forward(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
               std::int64_t out_stride, DType out_type, bool batch_invariant) const;

  // Dequantised columns as fp32 [num_columns][in_features], K in the checkpoint's order.
  void unpack(std::int64_t first_column, std::int64_t num_columns, float* out) const;

  std::size_t num_bytes() const;
  std::int64_t out_features() const { return out_features_; }
  std::int64_t in_features() const { return in_features_; }

 private:
  // Rows as the kernels take them.
  struct Input {
    const std::byte* x;
    std::int64_t x_stride;
    const float* sums;  // of each group, if asked for and needed
  };

  void check_columns(std::int64_t first, std::int64_t count) const;
  std::int64_t num_panels() const;
  std::int64_t scale_index(std::int64_t group, std::int64_t column) const;
  quantized::Panel panel(std::int64_t index) const;
  std::uint32_t word_of(const Source& source, std::int64_t column, std::int64_t word) const;
  void fill_groups(std::int64_t first_column, const Source& source);
  Input prepare(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, bool as_bf16, bool with_sums) const;
  void sum_groups(const float* x, float* sums) const;
  void forward_tiles(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                     std::int64_t out_stride, DType out_type) const;
  void forward_packed(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                      std::int64_t out_stride, DType out_type, bool batch_invariant) const;
  // One row, in integers; false, having done nothing, if that cannot be.
  bool forward_alone(const std::byte* x, std::byte* out, DType out_type) const;
  void forward_dequantized(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                           std::int64_t out_stride, DType out_type) const;
  void clear_padding(std::byte* weights, std::int64_t panel_bytes) const;
  template <typename T>
  void store(const float* sums, std::int64_t panel, std::int64_t num_rows, std::byte* out,
             std::int64_t out_stride) const;

  // Constant after construction:
  std::int64_t out_features_;
  std::int64_t in_features_;
  std::int64_t group_size_;
  DType dtype_;
  quantized::Shape shape_;
  // Filled before the first forward:
  std::vector<std::int32_t> permutation_;  // empty: none
  HugeBuffer weights_;
  std::vector<std::byte> scales_;
  std::vector<std::int8_t> zeros_;  // empty: all are 2^(bits-1)
  std::vector<float> bias_;         // empty: none
};

}  // namespace folovllm
