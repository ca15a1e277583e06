// The extension module folovllm._native.
#include "bindings.h"

#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace folovllm {
void bind_linear(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_fused(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_quant(nb::module_& m);
void bind_recording(nb::module_& m);
void bind_step_inputs(nb::module_& m);
}  // namespace folovllm

NB_MODULE(_native, m) {
  using namespace folovllm;
  // Engines exit without tearing everything down; that is not a leak worth a page on their users' terminal.
  nb::set_leak_warnings(false);
  m.def("set_num_threads", &set_num_threads, nb::arg("num_threads"), nb::arg("cpus") = std::vector<int>{},
        WithoutGil());
  m.def("num_threads", &num_threads);
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def("current_isa", [] { return isa_name(current_isa()); });
  m.def("limit_isa", [](std::string_view name) { limit_isa(isa_of(name)); }, nb::arg("name"));
  bind_linear(m);
  bind_attention(m);
  bind_fused(m);
  bind_sampling(m);
  bind_quant(m);
  bind_recording(m);
  bind_step_inputs(m);
}
