// The kernels of sampling_kernels.h at the level "avx512"; compile options in kernels.cmake.
#if defined(__x86_64__)
#include "sampling_kernels_inl.h"

namespace folovllm {

const SamplingKernels kSamplingAvx512 = FOLOVLLM_SAMPLING_TABLE;

}  // namespace folovllm
#endif
