// Python face of sampling.
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <string_view>

#include "bindings.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace folovllm {

void bind_sampling(nb::module_& m) {
  m.def(
      "argmax",
      [](Address logits, std::int64_t num_rows, std::int64_t vocab_size, std::int64_t row_stride,
         std::string_view dtype, Address out) {
        argmax({pointer<void>(logits), num_rows, vocab_size, row_stride, pointer<std::int64_t>(out)}, dtype_of(dtype));
      },
      "logits"_a, "num_rows"_a, "vocab_size"_a, "row_stride"_a, "dtype"_a, "out"_a, WithoutGil());
  m.def(
      "sample",
      [](Address logits, std::int64_t num_rows, std::int64_t vocab_size, std::int64_t row_stride, Address temperature,
         Address top_k, Address top_p, Address min_p, Address uniform, Address out) {
        sample({pointer<float>(logits), num_rows, vocab_size, row_stride, pointer<float>(temperature),
                pointer<std::int64_t>(top_k), pointer<float>(top_p), pointer<float>(min_p), pointer<double>(uniform),
                pointer<std::int64_t>(out)});
      },
      "logits"_a, "num_rows"_a, "vocab_size"_a, "row_stride"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
      "uniform"_a, "out"_a, WithoutGil());
}

}  // namespace folovllm
