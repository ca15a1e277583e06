// The kernels of fused_table.h at the level "portable"; compile options in kernels.cmake.
#include "fused_kernels_inl.h"

namespace folovllm {

const FusedTable kFusedPortable = FOLOVLLM_FUSED_TABLE;

}  // namespace folovllm
