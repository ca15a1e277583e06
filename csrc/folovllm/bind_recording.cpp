// Python face of recording.
#include "bindings.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace folovllm {

void bind_recording(nb::module_& m) {
  nb::class_<Recording>(m, "Recording")
      .def(nb::init<>())
      .def(
          "begin",
          [](Recording& self, std::int64_t num_tokens, std::int64_t num_reqs, std::int64_t block_table_stride) {
            self.begin({num_tokens, num_reqs, block_table_stride});
          },
          "num_tokens"_a, "num_reqs"_a, "block_table_stride"_a)
      .def("end", &Recording::end)
      .def(
          "run",
          [](const Recording& self, std::int64_t num_tokens, std::int64_t num_reqs, std::int64_t block_table_stride) {
            self.run({num_tokens, num_reqs, block_table_stride});
          },
          "num_tokens"_a, "num_reqs"_a, "block_table_stride"_a, WithoutGil())
      .def_prop_ro("num_calls", &Recording::num_calls);
}

}  // namespace folovllm
