// The kernels of fused_table.h, written once over the vectors of fused_vec.h.
#pragma once

#include "fused_table.h"
#include "fused_vec.h"

namespace folovllm {
namespace {

template <typename T>
FOLOVLLM_INLINE float sum_of_squares(const T* x, std::int64_t size) {
  Sum sum;
  sum.add(
      size, [&](std::int64_t i) { return load(x + i) * load(x + i); },
      [&](std::int64_t i, std::int64_t count) {
        const Floats last = load_first(x + i, count);
        return last * last;
      });
  return sum.total();
}

FOLOVLLM_INLINE float inverse_rms(float squares, std::int64_t size, float eps) {
  return 1.0F / __builtin_sqrtf(squares / static_cast<float>(size) + eps);
}

template <typename T>
FOLOVLLM_INLINE Floats normed(Floats x, float scale, Floats weight) {
  return rounded<T>(rounded<T>(x * scale) * weight);
}

template <typename T>
FOLOVLLM_INLINE void normalise_row(const T* x, const T* weight, T* out, std::int64_t size, float eps) {
  const float scale = inverse_rms(sum_of_squares(x, size), size, eps);
  for_vectors(size, [&](std::int64_t i, auto load_at, auto store_at) {
    store_at(out + i, rounded<T>(load_at(x + i) * scale) * load_at(weight + i));
  });
}

template <typename T>
void rms_norm_rows(const RmsNorm& op, std::int64_t begin, std::int64_t end) {
  const T* const x = static_cast<const T*>(op.x);
  for (std::int64_t row = begin; row < end; ++row) {
    normalise_row(x + row * op.x_stride, static_cast<const T*>(op.weight), static_cast<T*>(op.out) + row * op.size,
                  op.size, op.eps);
  }
}

template <typename T>
void add_rms_norm_rows(const AddRmsNorm& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(op.x) + row * op.size;
    T* const residual = static_cast<T*>(op.residual) + row * op.size;
    for_vectors(op.size, [&](std::int64_t i, auto load_at, auto store_at) {
      store_at(residual + i, load_at(residual + i) + load_at(x + i));
    });
    normalise_row<T>(residual, static_cast<const T*>(op.weight), static_cast<T*>(op.out) + row * op.size, op.size,
                     op.eps);
  }
}

template <typename T>
void silu_mul_rows(const SiluMul& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* const gate = static_cast<const T*>(op.gate_up) + row * 2 * op.size;
    const T* const up = gate + op.size;
    T* const out = static_cast<T*>(op.out) + row * op.out_stride;
    for_vectors(op.size, [&](std::int64_t i, auto load_at, auto store_at) {
      const Floats x = load_at(gate + i);
      store_at(out + i, rounded<T>(x / (exp(-x) + 1.0F)) * load_at(up + i));
    });
  }
}

template <typename From, typename To>
void embed_rows(const Embed& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const From* const from = static_cast<const From*>(op.table) + op.ids[row] * op.row_stride;
    To* const to = static_cast<To*>(op.out) + row * op.size;
    for_vectors(op.size, [&](std::int64_t i, auto load_at, auto store_at) { store_at(to + i, load_at(from + i)); });
  }
}

// One head: its norm if it has one, then the two halves turned against each other.
template <typename T>
FOLOVLLM_INLINE void rotate_head(const T* x, const T* norm, const T* cos_sin, T* out, std::int64_t size, float eps) {
  const std::int64_t half = size / 2;
  const float scale = norm != nullptr ? inverse_rms(sum_of_squares(x, size), size, eps) : 1.0F;
  for_vectors(half, [&](std::int64_t i, auto load_at, auto store_at) {
    Floats first = load_at(x + i);
    Floats second = load_at(x + half + i);
    if (norm != nullptr) {
      first = normed<T>(first, scale, load_at(norm + i));
      second = normed<T>(second, scale, load_at(norm + half + i));
    }
    const Floats cos = load_at(cos_sin + i);
    const Floats sin = load_at(cos_sin + half + i);
    store_at(out + i, rounded<T>(first * cos) - rounded<T>(second * sin));
    store_at(out + half + i, rounded<T>(second * cos) + rounded<T>(first * sin));
  });
}

template <typename T>
void rotate_and_write_tokens(const QKVLayout& layout, const RotateAndWrite& op, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = layout.head_size;
  const std::int64_t head_stride = layout.block_size * size;  // of the cache
  for (std::int64_t token = begin; token < end; ++token) {
    const T* const q = static_cast<const T*>(op.qkv) + token * op.qkv_stride;
    const T* const cos_sin = static_cast<const T*>(layout.cos_sin) + op.positions[token] * size;
    T* const query = static_cast<T*>(op.query) + token * layout.num_heads * size;
    for (std::int64_t h = 0; h < layout.num_heads; ++h) {
      rotate_head(q + h * size, static_cast<const T*>(layout.q_norm), cos_sin, query + h * size, size, layout.eps);
    }
    const std::int64_t slot = op.slot_mapping[token];
    if (slot < 0) continue;
    const T* const k = q + layout.num_heads * size;
    const T* const v = k + layout.num_kv_heads * size;
    T* const key = static_cast<T*>(op.kv_cache) +
                   slot / layout.block_size * 2 * layout.num_kv_heads * head_stride + slot % layout.block_size * size;
    T* const value = key + layout.num_kv_heads * head_stride;
    for (std::int64_t h = 0; h < layout.num_kv_heads; ++h) {
      rotate_head(k + h * size, static_cast<const T*>(layout.k_norm), cos_sin, key + h * head_stride, size, layout.eps);
      __builtin_memcpy(value + h * head_stride, v + h * size, static_cast<std::size_t>(size) * sizeof(T));
    }
  }
}

template <typename T>
constexpr FusedKernels kKernels = {
    rms_norm_rows<T>,
    add_rms_norm_rows<T>,
    silu_mul_rows<T>,
    {embed_rows<float, T>, embed_rows<BFloat16, T>, embed_rows<Float16, T>},
    rotate_and_write_tokens<T>,
};

}  // namespace
}  // namespace folovllm

// In the order of DType.
#define FOLOVLLM_FUSED_TABLE {{kKernels<float>, kKernels<BFloat16>, kKernels<Float16>}}
