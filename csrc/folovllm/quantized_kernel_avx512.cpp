// Quantised panels with AVX-512 in fp32: 4-bit weights become floats by one table look-up (vpermps), whose index is the
// low 4 bits of an element, so that nothing need be masked off.
#include "quantized_layout.h"
#include "quantized_tables.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLOVLLM_ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")))
#define FOLOVLLM_INLINE FOLOVLLM_ISA __attribute__((always_inline)) inline

namespace folovllm::quantized {
namespace {

#include "quantized_vector_avx512_inl.h"

#include "quantized_kernel_fp32_inl.h"

#include "quantized_dequantize_inl.h"

}  // namespace

void run_panel_avx512(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  run_panel(shape, panel, rows, out);
}

void dequantize_avx512(const Shape& shape, const Panel& panel, std::uint16_t* out) {
  dequantize_panel<Vector>(shape, panel, out);
}

}  // namespace folovllm::quantized

#else

namespace folovllm::quantized {
void run_panel_avx512(const Shape&, const Panel&, const Rows&, float*) { __builtin_unreachable(); }
void dequantize_avx512(const Shape&, const Panel&, std::uint16_t*) { __builtin_unreachable(); }
}  // namespace folovllm::quantized

#endif
