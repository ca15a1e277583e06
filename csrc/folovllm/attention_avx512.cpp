// Exact attention for this instruction set.
#include "attention_vec_avx512.h"

#include "attention_exact.h"

namespace folovllm::attention {

const Kernels& avx512_kernels(DType dtype) { return exact_kernels_of(dtype); }

}  // namespace folovllm::attention
