// The kernels of fused_table.h at the level "avx512"; compile options in kernels.cmake.
#if defined(__x86_64__)
#include "fused_kernels_inl.h"

namespace folovllm {

const FusedTable kFusedAvx512 = FOLOVLLM_FUSED_TABLE;

}  // namespace folovllm
#endif
