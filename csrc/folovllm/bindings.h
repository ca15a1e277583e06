// What the parts of the extension module share. Tensors cross the border as addresses (`Tensor.data_ptr()`): nothing
// is converted, and the caller answers for shape, dtype and contiguity, which the Python faces check.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace folovllm {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

using WithoutGil = nanobind::call_guard<nanobind::gil_scoped_release>;

}  // namespace folovllm
