// The kernels of fused_ops.h as each level of instructions provides them: on rows [begin, end), for one dtype.
//
//   fused_ops.cpp: level -> dtype -> kernel, rows -> threads
//     `- fused_{portable,avx2,avx512}.cpp: the same source, fused_kernels_inl.h, compiled for each level
#pragma once

#include <cstdint>

#include "fused_ops.h"

namespace folovllm {

struct FusedKernels {
  void (*rms_norm)(const RmsNorm&, std::int64_t begin, std::int64_t end);
  void (*add_rms_norm)(const AddRmsNorm&, std::int64_t begin, std::int64_t end);
  void (*silu_mul)(const SiluMul&, std::int64_t begin, std::int64_t end);
  void (*embed[3])(const Embed&, std::int64_t begin, std::int64_t end);  // by the table's dtype
  void (*rotate_and_write)(const QKVLayout&, const RotateAndWrite&, std::int64_t begin, std::int64_t end);
};

struct FusedTable {
  FusedKernels of[3];  // by dtype
};

extern const FusedTable kFusedPortable;
#if defined(__x86_64__)
extern const FusedTable kFusedAvx2;
extern const FusedTable kFusedAvx512;
#endif

}  // namespace folovllm
