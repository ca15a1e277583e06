#include "bindings.h"

namespace folovllm {

void bind_attention(nanobind::module_& m) { (void)m; }

}  // namespace folovllm
