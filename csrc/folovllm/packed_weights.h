// The weights of a linear layer in the one order that every kernel reads: panels of 16 output features, each panel one
// run of memory, walked from front to back by whoever computes these outputs.
//
//   float32, float16     panel p: [in_features][16]             k:  w[16p][k] w[16p+1][k] ... w[16p+15][k]
//
//   bfloat16             panel p: [padded / 2][16][2]           k, k+1 in pairs:
//                          w[16p][k] w[16p][k+1]  w[16p+1][k] w[16p+1][k+1]  ...  w[16p+15][k] w[16p+15][k+1]
//                        which is an operand of vdpbf16ps (64 bytes), and 16 of these the right operand of a matrix
//                        tile (1 KiB: 32 k's x 16 outputs).
//
// padded = in_features rounded up to 32. Outputs beyond out_features and k's beyond in_features are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "number_formats.h"

namespace folovllm {

constexpr std::int64_t kPanelWidth = 16;
// Along k, of bfloat16 panels: the depth of a tile.
constexpr std::int64_t kTileDepth = 32;

// Zeroed memory of its own, on huge pages where the system grants them.
class HugeBuffer {
 public:
  // Throws std::bad_alloc.
  explicit HugeBuffer(std::size_t size);
  ~HugeBuffer();
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

class PackedWeights {
 public:
  // Throws std::invalid_argument for sizes below 1.
  PackedWeights(std::int64_t out_features, std::int64_t in_features, DType dtype);

  // Rows [first_row, first_row + num_rows) from `source`, [num_rows, in_features] with `row_stride` elements from row
  // to row. Throws std::invalid_argument for rows that are not there.
  void fill(std::int64_t first_row, std::int64_t num_rows, const std::byte* source, std::int64_t row_stride,
            DType source_dtype);

  // The same rows back, in dtype(), contiguous.
  void unpack(std::int64_t first_row, std::int64_t num_rows, std::byte* out) const;

  // Rows ids[0], ids[1], ..., likewise. REQUIRES: they are there.
  void gather(const std::int32_t* ids, std::int64_t num_rows, std::byte* out) const;

  const std::byte* data() const { return buffer_.data(); }
  std::size_t num_bytes() const { return buffer_.size(); }
  std::int64_t out_features() const { return out_features_; }
  std::int64_t in_features() const { return in_features_; }
  std::int64_t num_panels() const { return (out_features_ + kPanelWidth - 1) / kPanelWidth; }
  std::int64_t panel_bytes() const { return panel_bytes_; }
  DType dtype() const { return dtype_; }

 private:
  void check_rows(std::int64_t first_row, std::int64_t num_rows) const;
  template <typename RowOf>
  void copy_rows(RowOf row_of, std::int64_t num_rows, std::byte* out) const;

  // Constant after construction, but for the bytes of the buffer:
  std::int64_t out_features_;
  std::int64_t in_features_;
  DType dtype_;
  std::int64_t panel_bytes_;
  HugeBuffer buffer_;
};

}  // namespace folovllm
