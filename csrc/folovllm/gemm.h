// Products of activations with packed weights: what PackedLinear asks and what the kernels of each instruction set do.
//
// A kernel file is compiled for its instruction set, so it defines nothing that another file's linker might pick up:
// everything in it but its `gemm_...` function is local, and it calls no inline function of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed_weights.h"

namespace folovllm {

// out = x W^T + bias, for one call.
struct Gemm {
  // Panels as in packed_weights.h.
  const std::byte* weights;
  std::int64_t panel_bytes;
  // Null, or one per output up to the end of the last panel.
  const float* bias;
  // Rows of the layer's dtype; strides are in elements.
  const std::byte* x;
  std::int64_t x_stride;
  std::byte* out;
  std::int64_t out_stride;
  DType dtype;
  DType out_dtype;
  std::int64_t num_rows;
  std::int64_t in_features;
  std::int64_t out_features;
};

// A half-open range.
struct Range {
  std::int64_t begin;
  std::int64_t end;
};

struct GemmKernel {
  // Bytes of what `prepare` makes of the activations of `gemm`; 0 if `compute` reads them as they are.
  std::int64_t (*prepared_bytes)(const Gemm& gemm);
  // Rearranges rows; ranges begin at multiples of 16.
  void (*prepare)(const Gemm& gemm, Range rows, std::byte* prepared);
  // Writes these rows of the outputs of these panels; rows begin at multiples of 16. Each output is accumulated over
  // k = 0, 1, 2, ... in one chain, whatever the ranges are: its bits depend on nothing but its row and its column.
  void (*compute)(const Gemm& gemm, const std::byte* prepared, Range rows, Range panels);
  // How many rows `compute` takes at most.
  std::int64_t rows_per_piece;
};

// One kernel per dtype and instruction set. A set's own file says what is special in it.
const GemmKernel& gemm_portable(DType dtype);
#if defined(__x86_64__)
const GemmKernel& gemm_avx2(DType dtype);
const GemmKernel& gemm_avx512(DType dtype);
const GemmKernel& gemm_avx512_bf16();
const GemmKernel& gemm_amx();
#endif

// The kernel for these on this machine, as limited by limit_isa. With `batch_invariant` it is the same one for every
// number of rows; without, bfloat16 may use another where that is faster.
const GemmKernel& choose_gemm(DType dtype, std::int64_t num_rows, bool batch_invariant);

// Compute it on the pool's threads.
void run_gemm(const Gemm& gemm, const GemmKernel& kernel);

// out = silu(first half of the product's outputs) * second half, of the bits that run_gemm and silu_mul give: what lies
// between them stays in a thread's cache. REQUIRES: half of out_features is a multiple of kPanelWidth, out_dtype is dtype.
void run_gated_gemm(const Gemm& gemm, const GemmKernel& kernel);

}  // namespace folovllm
