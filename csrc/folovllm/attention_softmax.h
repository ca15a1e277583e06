// What all kernels share over the `Vec` of their instruction set, which is included before this file.
#pragma once

#include <limits>

#include "attention_kernel.h"

namespace folovllm::attention {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// 2^x within 1e-7 of it for x from -126 to 127; 0 below, exactly 1 at 0, NaN of NaN.
inline Vec::F exp2(Vec::F x) {
  const Vec::F bounded = Vec::max(Vec::set1(-126.0F), x);
  const Vec::F whole = Vec::round(bounded);
  const Vec::F f = Vec::sub(bounded, whole);
  // 1 + f * q(f), q fitted to the least relative error for |f| <= 1/2.
  Vec::F q = Vec::set1(0.001326472731307149F);
  q = Vec::fma(q, f, Vec::set1(0.009671512991189957F));
  q = Vec::fma(q, f, Vec::set1(0.05550733581185341F));
  q = Vec::fma(q, f, Vec::set1(0.24022242426872253F));
  q = Vec::fma(q, f, Vec::set1(0.6931470036506653F));
  q = Vec::fma(q, f, Vec::set1(1.0F));
  return Vec::where_less(x, Vec::set1(-126.0F), Vec::set1(0.0F), Vec::scale_by_power(q, whole));
}

// The maximum of a row that has seen keys, or 0, so that -inf minus it is not a NaN.
inline Vec::F finite_max(Vec::F max) {
  return Vec::where_less(max, Vec::set1(std::numeric_limits<float>::lowest()), Vec::set1(0.0F), max);
}

inline float exp2_of(float x) {
  float lanes[Vec::kWidth];
  Vec::store(lanes, exp2(Vec::set1(x)));
  return lanes[0];
}

template <typename T>
Vec::F load_head(const T* row, int d, int head_size) {
  return d + Vec::kWidth <= head_size ? Vec::load(row + d)
                                      : Vec::load_first(row + d, head_size > d ? head_size - d : 0);
}

template <typename T>
const T* query_row(const Shape& shape, const RowTile& tile, int row) {
  return static_cast<const T*>(tile.query) + row / shape.group * tile.query_stride +
         static_cast<std::int64_t>(row % shape.group) * shape.head_size;
}

// Where the K of the keys of one tile lie; V is v_offset behind. Entries from the last key on repeat it, so that whole
// vectors of keys can be read.
template <typename T>
struct KeyRows {
  const T* k[kTile];

  void fill(const Shape& shape, const RowTile& tile, int begin, int end) {
    const int num_keys = smaller(end - begin, kTile);
    int column = begin / shape.block_size;
    int offset = begin % shape.block_size;
    const T* block = block_of(shape, tile, column);
    for (int i = 0; i < num_keys; ++i) {
      k[i] = block + static_cast<std::int64_t>(offset) * shape.head_size;
      if (++offset == shape.block_size && i + 1 < num_keys) {
        offset = 0;
        block = block_of(shape, tile, ++column);
      }
    }
    for (int i = num_keys; i < kTile; ++i) k[i] = k[num_keys - 1];
  }

 private:
  static const T* block_of(const Shape& shape, const RowTile& tile, int column) {
    return static_cast<const T*>(tile.kv_head) + tile.block_table[column] * shape.block_stride;
  }
};

inline void prefetch_row(const void* row, int bytes) {
  for (int i = 0; i < bytes; i += 64) Vec::prefetch(static_cast<const char*>(row) + i);
}

inline void merge_states(const Shape& shape, int num_rows, State state, State later) {
  for (int row = 0; row < num_rows; ++row) {
    if (later.max[row] == kMinusInfinity) continue;
    float* const acc = state.acc + static_cast<std::int64_t>(row) * shape.padded_head;
    const float* const later_acc = later.acc + static_cast<std::int64_t>(row) * shape.padded_head;
    const float max = state.max[row] > later.max[row] ? state.max[row] : later.max[row];
    const float weight = exp2_of(state.max[row] - max);
    const float later_weight = exp2_of(later.max[row] - max);
    state.max[row] = max;
    state.sum[row] = state.sum[row] * weight + later.sum[row] * later_weight;
    for (int d = 0; d < shape.padded_head; d += Vec::kWidth) {
      const Vec::F added = Vec::mul(Vec::load(later_acc + d), Vec::set1(later_weight));
      Vec::store(acc + d, Vec::fma(Vec::load(acc + d), Vec::set1(weight), added));
    }
  }
}

template <typename T>
void finish_rows(const Shape& shape, int num_tokens, State state, void* out, std::int64_t out_stride) {
  for (int row = 0; row < num_tokens * shape.group; ++row) {
    T* const out_row = static_cast<T*>(out) + row / shape.group * out_stride +
                       static_cast<std::int64_t>(row % shape.group) * shape.head_size;
    const float* const acc = state.acc + static_cast<std::int64_t>(row) * shape.padded_head;
    const Vec::F weight = Vec::set1(1.0F / state.sum[row]);
    for (int d = 0; d < shape.head_size; d += Vec::kWidth) {
      const int count = smaller(Vec::kWidth, shape.head_size - d);
      Vec::store_first(out_row + d, Vec::mul(Vec::load(acc + d), weight), count);
    }
  }
}

}  // namespace
}  // namespace folovllm::attention
