#include "packed_linear.h"

#include <stdexcept>
#include <string>


namespace folovllm {
namespace {

void check_stride(const char* name, std::int64_t stride, std::int64_t row, std::int64_t num_rows) {
  if (num_rows <= 1 || stride >= row) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(stride) + " is shorter than a row of " +
                              std::to_string(row));
}

}  // namespace

PackedLinear::PackedLinear(std::int64_t out_features, std::int64_t in_features, DType dtype)
    : weights_(out_features, in_features, dtype) {}

void PackedLinear::set_bias(const std::byte* source, DType source_dtype) {
  bias_.assign(static_cast<std::size_t>(weights_.num_panels() * kPanelWidth), 0.0F);
  with_type(source_dtype, [&]<typename T>(T) {
    const auto* const values = reinterpret_cast<const T*>(source);
    for (std::int64_t i = 0; i < weights_.out_features(); ++i) bias_[static_cast<std::size_t>(i)] = to_float(values[i]);
  });
}

Gemm PackedLinear::gemm(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                        std::int64_t out_stride, DType out_dtype) const {
  if (num_rows < 0) throw std::invalid_argument("num_rows=" + std::to_string(num_rows) + " is negative");
  check_stride("x_stride", x_stride, weights_.in_features(), num_rows);
  return {.weights = weights_.data(),
          .panel_bytes = weights_.panel_bytes(),
          .bias = bias_.empty() ? nullptr : bias_.data(),
          .x = x,
          .x_stride = x_stride,
          .out = out,
          .out_stride = out_stride,
          .dtype = weights_.dtype(),
          .out_dtype = out_dtype,
          .num_rows = num_rows,
          .in_features = weights_.in_features(),
          .out_features = weights_.out_features()};
}

void PackedLinear::forward(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                           std::int64_t out_stride, DType out_dtype, bool batch_invariant) const {
  if (out_dtype != DType::kFloat32 && out_dtype != weights_.dtype()) {
    throw std::invalid_argument("out_dtype is not allowed; it must be float32 or the layer's own dtype");
  }
  const Gemm product = gemm(x, num_rows, x_stride, out, out_stride, out_dtype);
  check_stride("out_stride", out_stride, weights_.out_features(), num_rows);
  if (num_rows > 0) run_gemm(product, choose_gemm(weights_.dtype(), num_rows, batch_invariant));
}

void PackedLinear::forward_silu_mul(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                                    std::int64_t out_stride, bool batch_invariant) const {
  if (weights_.out_features() % (2 * kPanelWidth) != 0) {
    throw std::invalid_argument("a layer of " + std::to_string(weights_.out_features()) +
                                " outputs cannot be gated; their number must be a multiple of 32");
  }
  const Gemm product = gemm(x, num_rows, x_stride, out, out_stride, weights_.dtype());
  check_stride("out_stride", out_stride, weights_.out_features() / 2, num_rows);
  if (num_rows > 0) run_gated_gemm(product, choose_gemm(weights_.dtype(), num_rows, batch_invariant));
}

}  // namespace folovllm
