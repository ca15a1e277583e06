// The kernels of sampling_kernels.h at the level "portable"; compile options in kernels.cmake.
#include "sampling_kernels_inl.h"

namespace folovllm {

const SamplingKernels kSamplingPortable = FOLOVLLM_SAMPLING_TABLE;

}  // namespace folovllm
