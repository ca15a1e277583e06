// Exact attention over the `Vec` of an instruction set: included by one file per set, after its attention_vec_*.h.
//
// Two shapes of the same arithmetic. What decides a row's bits is the order of its own operations, not which of them
// share a vector:
//
//                          few rows (decodes)        many rows (chunks)
//     score, over d        lanes are keys            lanes are rows          one chain of fma, d = 0, 1, ...
//     maximum, exp2, sum   lanes are keys            lanes are rows          sum: kWidth chains, then a tree
//     values, over keys    lanes are d               lanes are rows          one chain of fma, key = 0, 1, ...
//
// A key that a row does not see has weight 0 and cannot change it. Needs -ffp-contract=off.
#pragma once

#include <cstring>

#include "attention_softmax.h"

namespace folovllm::attention {
namespace {

constexpr int kFewRows = 8;
constexpr int kExactRows = 64;

// ---- few rows ----

template <int R>
struct FewRows {
  float score[R][kTile];  // then exp2(score - max)
  float max[R];
  float sum[R];
  int visible[R];  // keys of the sequence that the row sees
};

template <typename T, int R>
void score_few(const Shape& shape, const KeyRows<T>& rows, const KeyRows<T>& next, int num_keys, const float* q,
               FewRows<R>& few) {
  constexpr int kW = Vec::kWidth;
  Vec::F acc[kTile / kW][R];
  for (auto& group : acc) {
    for (auto& x : group) x = Vec::set1(0.0F);
  }
  for (int d = 0; d < shape.padded_head; d += kW) {
    for (int first = 0; first < num_keys; first += kW) {
      Vec::F k[kW];
      for (int i = 0; i < kW; ++i) k[i] = load_head(rows.k[first + i], d, shape.head_size);
      if (d == 0) {
        for (int i = 0; i < kW; ++i) prefetch_row(next.k[first + i], shape.head_size * static_cast<int>(sizeof(T)));
      }
      Vec::transpose(k);
      Vec::F* const group = acc[first / kW];
      for (int i = 0; i < kW; ++i) {
        for (int r = 0; r < R; ++r) {
          group[r] = Vec::fma(Vec::set1(q[r * shape.padded_head + d + i]), k[i], group[r]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int first = 0; first < kTile; first += kW) Vec::store(&few.score[r][first], acc[first / kW][r]);
  }
}

// Turns scores into weights; returns by what the earlier sums and values of the row are multiplied.
template <int R>
float weigh_few(const Shape& shape, FewRows<R>& few, int r, int tile_begin) {
  constexpr int kW = Vec::kWidth;
  const Vec::F end = Vec::set1(static_cast<float>(larger(0, smaller(few.visible[r] - tile_begin, kTile))));
  Vec::F max = Vec::set1(few.max[r]);
  Vec::F score[kTile / kW];
  for (int i = 0; i < kTile / kW; ++i) {
    const Vec::F key = Vec::add(Vec::iota(), Vec::set1(static_cast<float>(i * kW)));
    const Vec::F scaled = Vec::mul(Vec::load(&few.score[r][i * kW]), Vec::set1(shape.scale_log2));
    score[i] = Vec::where_less(key, end, scaled, Vec::set1(kMinusInfinity));
    max = Vec::max(score[i], max);
  }
  const float new_max = Vec::largest(max);
  const Vec::F reference = finite_max(Vec::set1(new_max));
  Vec::F sum = Vec::set1(0.0F);
  for (int i = 0; i < kTile / kW; ++i) {
    const Vec::F weight = exp2(Vec::sub(score[i], reference));
    sum = i == 0 ? weight : Vec::add(sum, weight);
    Vec::store(&few.score[r][i * kW], weight);
  }
  float lanes[kW];
  Vec::store(lanes, exp2(Vec::sub(Vec::set1(few.max[r]), reference)));
  const float scale = lanes[0];
  Vec::store(lanes, Vec::fma(Vec::set1(few.sum[r]), Vec::set1(scale), Vec::set1(Vec::sum(sum))));
  few.sum[r] = lanes[0];
  few.max[r] = new_max;
  return scale;
}

// Adds weights x V to N vectors of each row, from element d on.
template <typename T, int R, int N>
void add_values_few(const Shape& shape, const KeyRows<T>& rows, const KeyRows<T>& next, int num_keys, int d,
                    const FewRows<R>& few, const float* scale, float* acc) {
  Vec::F sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      sum[r][n] = Vec::mul(Vec::load(acc + r * shape.padded_head + d + n * Vec::kWidth), Vec::set1(scale[r]));
    }
  }
  const bool is_whole = d + N * Vec::kWidth <= shape.head_size;
  for (int key = 0; key < num_keys; ++key) {
    const T* const v = rows.k[key] + shape.v_offset;
    prefetch_row(next.k[key] + shape.v_offset + d, N * Vec::kWidth * static_cast<int>(sizeof(T)));
    Vec::F x[N];
    for (int n = 0; n < N; ++n) {
      x[n] = is_whole ? Vec::load(v + d + n * Vec::kWidth) : load_head(v, d + n * Vec::kWidth, shape.head_size);
    }
    for (int r = 0; r < R; ++r) {
      const Vec::F weight = Vec::set1(few.score[r][key]);
      for (int n = 0; n < N; ++n) sum[r][n] = Vec::fma(weight, x[n], sum[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) Vec::store(acc + r * shape.padded_head + d + n * Vec::kWidth, sum[r][n]);
  }
}

// As many vectors at a time as registers hold, then half of that for the rest, and so on.
template <typename T, int R, int N>
void add_all_values_few(const Shape& shape, const KeyRows<T>& rows, const KeyRows<T>& next, int num_keys, int d,
                        const FewRows<R>& few, const float* scale, float* acc) {
  for (; d + N * Vec::kWidth <= shape.padded_head; d += N * Vec::kWidth) {
    add_values_few<T, R, N>(shape, rows, next, num_keys, d, few, scale, acc);
  }
  if constexpr (N > 1) add_all_values_few<T, R, N / 2>(shape, rows, next, num_keys, d, few, scale, acc);
}

template <typename T, int R>
void attend_few(const Shape& shape, const RowTile& tile, int num_rows, int key_begin, int key_end, State state,
                std::byte* scratch) {
  constexpr int kW = Vec::kWidth;
  const int padded = shape.padded_head;
  float* const q = reinterpret_cast<float*>(scratch);
  float* const acc = q + R * padded;
  FewRows<R> few;
  for (int r = 0; r < R; ++r) {
    // Rows that fill up R are copies of the last.
    const int row = smaller(r, num_rows - 1);
    for (int d = 0; d < padded; d += kW) {
      Vec::store(q + r * padded + d, load_head(query_row<T>(shape, tile, row), d, shape.head_size));
      Vec::store(acc + r * padded + d, Vec::set1(0.0F));
    }
    few.max[r] = kMinusInfinity;
    few.sum[r] = 0.0F;
    few.visible[r] = tile.first_visible + row / shape.group;
  }
  KeyRows<T> rows;
  rows.fill(shape, tile, key_begin, key_end);
  KeyRows<T> next = rows;  // what is read ahead of the last tile is that tile
  for (int begin = key_begin; begin < key_end; begin += kTile) {
    const int num_keys = smaller(kTile, key_end - begin);
    if (begin + kTile < key_end) next.fill(shape, tile, begin + kTile, key_end);
    score_few<T, R>(shape, rows, next, num_keys, q, few);
    float scale[R];
    for (int r = 0; r < R; ++r) scale[r] = weigh_few<R>(shape, few, r, begin);
    add_all_values_few<T, R, larger(1, smaller(8, Vec::kUnroll / R))>(shape, rows, next, num_keys, 0, few, scale, acc);
    rows = next;
  }
  std::memcpy(state.max, few.max, sizeof(float) * static_cast<std::size_t>(num_rows));
  std::memcpy(state.sum, few.sum, sizeof(float) * static_cast<std::size_t>(num_rows));
  std::memcpy(state.acc, acc, sizeof(float) * static_cast<std::size_t>(num_rows * padded));
}

// ---- many rows, in strips of kWidth ----

// Matrices of a tile. The strips' own are [padded_head][kWidth].
struct Scratch {
  float* k;       // [kTile][padded_head]
  float* v;       // [kTile][padded_head]
  float* weight;  // [kTile][kWidth]
  float* strips;
  int padded;

  Scratch(std::byte* memory, int padded_head)
      : k(reinterpret_cast<float*>(memory)),
        v(k + kTile * padded_head),
        weight(v + kTile * padded_head),
        strips(weight + kTile * Vec::kWidth),
        padded(padded_head) {}

  int strip_floats() const { return (2 * padded + 3) * Vec::kWidth; }
  float* q(int strip) const { return strips + strip * strip_floats(); }
  float* acc(int strip) const { return q(strip) + padded * Vec::kWidth; }
  float* max(int strip) const { return acc(strip) + padded * Vec::kWidth; }
  float* sum(int strip) const { return max(strip) + Vec::kWidth; }
  float* visible(int strip) const { return sum(strip) + Vec::kWidth; }
};

inline std::size_t exact_scratch_bytes(const Shape& shape) {
  const int strips = (larger(kExactRows, shape.group) + Vec::kWidth - 1) / Vec::kWidth;
  const int floats = 2 * kTile * shape.padded_head + kTile * Vec::kWidth +
                     strips * (2 * shape.padded_head + 3) * Vec::kWidth;
  return sizeof(float) * static_cast<std::size_t>(floats);
}

template <typename T>
void start_strip(const Shape& shape, const RowTile& tile, int num_rows, int strip, const Scratch& scratch) {
  constexpr int kW = Vec::kWidth;
  for (int lane = 0; lane < kW; ++lane) {
    const int row = smaller(strip * kW + lane, num_rows - 1);
    scratch.max(strip)[lane] = kMinusInfinity;
    scratch.sum(strip)[lane] = 0.0F;
    scratch.visible(strip)[lane] = static_cast<float>(tile.first_visible + row / shape.group);
  }
  for (int d = 0; d < scratch.padded; d += kW) {
    Vec::F q[kW];
    for (int lane = 0; lane < kW; ++lane) {
      const int row = smaller(strip * kW + lane, num_rows - 1);
      q[lane] = load_head(query_row<T>(shape, tile, row), d, shape.head_size);
    }
    Vec::transpose(q);
    for (int i = 0; i < kW; ++i) {
      Vec::store(scratch.q(strip) + (d + i) * kW, q[i]);
      Vec::store(scratch.acc(strip) + (d + i) * kW, Vec::set1(0.0F));
    }
  }
}

inline void score_strip(const Scratch& scratch, int strip, int num_keys) {
  constexpr int kW = Vec::kWidth;
  constexpr int kN = Vec::kUnroll;
  const float* const q = scratch.q(strip);
  for (int key = 0; key < num_keys; key += kN) {
    Vec::F acc[kN];
    for (auto& x : acc) x = Vec::set1(0.0F);
    const float* const k = scratch.k + key * scratch.padded;
    for (int d = 0; d < scratch.padded; ++d) {
      const Vec::F x = Vec::load(q + d * kW);
      for (int i = 0; i < kN; ++i) acc[i] = Vec::fma(x, Vec::set1(k[i * scratch.padded + d]), acc[i]);
    }
    for (int i = 0; i < kN; ++i) Vec::store(scratch.weight + (key + i) * kW, acc[i]);
  }
}

// The weights of keys from `num_keys` on become 0.
inline Vec::F weigh_strip(const Shape& shape, const Scratch& scratch, int strip, int tile_begin, int num_keys) {
  constexpr int kW = Vec::kWidth;
  const Vec::F old_max = Vec::load(scratch.max(strip));
  const Vec::F end = Vec::sub(Vec::load(scratch.visible(strip)), Vec::set1(static_cast<float>(tile_begin)));
  Vec::F max = old_max;
  for (int key = 0; key < num_keys; ++key) {
    const Vec::F scaled = Vec::mul(Vec::load(scratch.weight + key * kW), Vec::set1(shape.scale_log2));
    const Vec::F score =
        Vec::where_less(Vec::set1(static_cast<float>(key)), end, scaled, Vec::set1(kMinusInfinity));
    Vec::store(scratch.weight + key * kW, score);
    max = Vec::max(score, max);
  }
  const Vec::F reference = finite_max(max);
  for (int key = 0; key < num_keys; ++key) {
    Vec::store(scratch.weight + key * kW, exp2(Vec::sub(Vec::load(scratch.weight + key * kW), reference)));
  }
  for (int key = num_keys; key < kTile; ++key) Vec::store(scratch.weight + key * kW, Vec::set1(0.0F));
  // The same tree as Vec::sum over lanes.
  Vec::F part[kW];
  for (int i = 0; i < kW; ++i) {
    part[i] = Vec::load(scratch.weight + i * kW);
    for (int key = kW + i; key < kTile; key += kW) part[i] = Vec::add(part[i], Vec::load(scratch.weight + key * kW));
  }
  for (int n = kW / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] = Vec::add(part[i], part[i + n]);
  }
  const Vec::F scale = exp2(Vec::sub(old_max, reference));
  Vec::store(scratch.sum(strip), Vec::fma(Vec::load(scratch.sum(strip)), scale, part[0]));
  Vec::store(scratch.max(strip), max);
  return scale;
}

inline void add_values_strip(const Scratch& scratch, int strip, int num_keys, Vec::F scale) {
  constexpr int kW = Vec::kWidth;
  constexpr int kN = Vec::kUnroll;
  float* const acc = scratch.acc(strip);
  for (int d = 0; d < scratch.padded; d += kN) {
    Vec::F sum[kN];
    for (int i = 0; i < kN; ++i) sum[i] = Vec::mul(Vec::load(acc + (d + i) * kW), scale);
    for (int key = 0; key < num_keys; ++key) {
      const Vec::F weight = Vec::load(scratch.weight + key * kW);
      const float* const v = scratch.v + key * scratch.padded + d;
      for (int i = 0; i < kN; ++i) sum[i] = Vec::fma(weight, Vec::set1(v[i]), sum[i]);
    }
    for (int i = 0; i < kN; ++i) Vec::store(acc + (d + i) * kW, sum[i]);
  }
}

template <typename T>
void widen_keys(const Shape& shape, const KeyRows<T>& rows, int num_keys, const Scratch& scratch) {
  for (int key = 0; key < num_keys; ++key) {
    const T* const k = rows.k[key];
    for (int d = 0; d < shape.padded_head; d += Vec::kWidth) {
      Vec::store(scratch.k + key * scratch.padded + d, load_head(k, d, shape.head_size));
      Vec::store(scratch.v + key * scratch.padded + d, load_head(k + shape.v_offset, d, shape.head_size));
    }
  }
}

inline void end_strip(const Scratch& scratch, int num_rows, int strip, State state) {
  constexpr int kW = Vec::kWidth;
  const int count = smaller(kW, num_rows - strip * kW);
  std::memcpy(state.max + strip * kW, scratch.max(strip), sizeof(float) * static_cast<std::size_t>(count));
  std::memcpy(state.sum + strip * kW, scratch.sum(strip), sizeof(float) * static_cast<std::size_t>(count));
  for (int d = 0; d < scratch.padded; d += kW) {
    Vec::F x[kW];
    for (int i = 0; i < kW; ++i) x[i] = Vec::load(scratch.acc(strip) + (d + i) * kW);
    Vec::transpose(x);
    for (int i = 0; i < count; ++i) Vec::store(state.acc + (strip * kW + i) * scratch.padded + d, x[i]);
  }
}

template <typename T>
void attend_strips(const Shape& shape, const RowTile& tile, int num_rows, int key_begin, int key_end, State state,
                   std::byte* memory) {
  const Scratch scratch(memory, shape.padded_head);
  const int num_strips = (num_rows + Vec::kWidth - 1) / Vec::kWidth;
  for (int strip = 0; strip < num_strips; ++strip) start_strip<T>(shape, tile, num_rows, strip, scratch);
  KeyRows<T> rows;
  for (int begin = key_begin; begin < key_end; begin += kTile) {
    rows.fill(shape, tile, begin, key_end);
    const int num_keys = smaller(kTile, key_end - begin);
    widen_keys(shape, rows, round_up(num_keys, Vec::kUnroll), scratch);
    for (int strip = 0; strip < num_strips; ++strip) {
      const int last_row = smaller((strip + 1) * Vec::kWidth, num_rows) - 1;
      const int seen = smaller(num_keys, tile.first_visible + last_row / shape.group - begin);
      if (seen <= 0) continue;
      score_strip(scratch, strip, seen);
      add_values_strip(scratch, strip, seen, weigh_strip(shape, scratch, strip, begin, seen));
    }
  }
  for (int strip = 0; strip < num_strips; ++strip) end_strip(scratch, num_rows, strip, state);
}

template <typename T>
void attend_exactly(const Shape& shape, const RowTile& tile, int key_begin, int key_end, State state,
                    std::byte* scratch) {
  const int num_rows = tile.num_tokens * shape.group;
  if (num_rows == 1) {
    attend_few<T, 1>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (num_rows == 2) {
    attend_few<T, 2>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (num_rows <= 4) {
    attend_few<T, 4>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else if (num_rows <= kFewRows) {
    attend_few<T, kFewRows>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  } else {
    attend_strips<T>(shape, tile, num_rows, key_begin, key_end, state, scratch);
  }
}

template <typename T>
constexpr Kernels exact_kernels() {
  return {kExactRows, true, &exact_scratch_bytes, &attend_exactly<T>, &merge_states, &finish_rows<T>};
}

inline const Kernels& exact_kernels_of(DType dtype) {
  static constexpr Kernels kOfFloat32 = exact_kernels<float>();
  static constexpr Kernels kOfBFloat16 = exact_kernels<BFloat16>();
  static constexpr Kernels kOfFloat16 = exact_kernels<Float16>();
  if (dtype == DType::kFloat32) return kOfFloat32;
  return dtype == DType::kBFloat16 ? kOfBFloat16 : kOfFloat16;
}

}  // namespace
}  // namespace folovllm::attention
