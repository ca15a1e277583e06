// Exact attention for this instruction set.
#include "attention_vec_portable.h"

#include "attention_exact.h"

namespace folovllm::attention {

const Kernels& portable_kernels(DType dtype) { return exact_kernels_of(dtype); }

}  // namespace folovllm::attention
