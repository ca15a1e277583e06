// The operations of a layer that are neither a matrix product nor attention, each in one pass over its data.
//
// Values are rounded to the tensors' dtype at the same points as in the layers' torch code, and everything between two
// such points is fp32. A row's arithmetic depends on nothing but the row: it has the same bits alone and in a batch, with
// any number of threads, and at every level of instructions (except that the portable one, without fused multiply-adds,
// may round silu otherwise).
#pragma once

#include <cstdint>

#include "number_formats.h"

namespace folovllm {

// out[row] = round(x[row] / rms(x[row])) * weight. `x_stride` elements from row to row of x; out is contiguous.
struct RmsNorm {
  const void* x;
  std::int64_t x_stride;
  const void* weight;
  void* out;
  std::int64_t num_rows;
  std::int64_t size;
  float eps;
};
void rms_norm(const RmsNorm& op, DType dtype);

// residual += x, then out = norm(residual) as above. Contiguous rows; `out` may be `x`.
struct AddRmsNorm {
  const void* x;
  void* residual;
  const void* weight;
  void* out;
  std::int64_t num_rows;
  std::int64_t size;
  float eps;
};
void add_rms_norm(const AddRmsNorm& op, DType dtype);

// out[row] = round(silu(gate)) * up of contiguous rows [gate | up] of 2 * size elements. `out_stride` elements from row to
// row of out.
struct SiluMul {
  const void* gate_up;
  void* out;
  std::int64_t out_stride;
  std::int64_t num_rows;
  std::int64_t size;
};
void silu_mul(const SiluMul& op, DType dtype);
// The same on the calling thread alone, also within a job of the pool.
void silu_mul_alone(const SiluMul& op, DType dtype);

// out[row] = table[ids[row]], converted; the rows of the table are `row_stride` elements apart.
struct Embed {
  const void* table;
  std::int64_t row_stride;
  const std::int32_t* ids;
  std::int64_t num_rows;
  std::int64_t size;
  void* out;
};
void embed(const Embed& op, DType table_dtype, DType dtype);

// The shapes and constants that all steps of one attention layer share.
struct QKVLayout {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_size;
  std::int64_t block_size;  // tokens per block of the cache
  DType dtype;
  const void* cos_sin;  // [max_positions, head_size]: cos of head_size / 2 angles, then sin
  const void* q_norm;   // [head_size], or null: queries are not normalised
  const void* k_norm;
  float eps;

  // Throws std::invalid_argument for a size below 1 or an odd head_size.
  void check() const;
};

// Per token: rows [q heads | k heads | v heads] -> query [q heads], contiguous, and the token's slot of the cache:
//
//   kv_cache[num_blocks, 2 (K, V), num_kv_heads, block_size, head_size], slot = block * block_size + offset
//
// Queries and keys are normalised (if they have a norm) and rotated by the angles of their position.
struct RotateAndWrite {
  const void* qkv;
  std::int64_t qkv_stride;
  const std::int64_t* positions;
  const std::int64_t* slot_mapping;  // below 0: not written
  void* kv_cache;
  void* query;
  std::int64_t num_tokens;
};
void rotate_and_write(const QKVLayout& layout, const RotateAndWrite& op);

}  // namespace folovllm
