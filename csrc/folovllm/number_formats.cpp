#include "number_formats.h"

#include <stdexcept>
#include <string>

namespace folovllm {

DType dtype_of(std::string_view name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype '" + std::string(name) +
                              "' is not known; it must be float32, bfloat16 or float16");
}

}  // namespace folovllm
