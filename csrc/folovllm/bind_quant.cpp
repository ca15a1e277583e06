#include "bindings.h"

namespace folovllm {

void bind_quant(nanobind::module_& m) { (void)m; }

}  // namespace folovllm
