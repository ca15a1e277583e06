// How a quantised layer is applied:
//
//   bf16 with matrix tiles: parts of each panel become bf16 integers in the first level cache, for all rows at once,
//   whose bits do not depend on their number
//
//   one row of bf16: in integers, where the machine can (quantized_kernel_vnni.cpp)
//
//   few rows, or bits that must not depend on their number: each panel is dequantised in registers, again for every
//   12 rows; weights cross from memory in their packed size
//
//   many rows of bf16: each panel is dequantised to bf16 in a thread's scratch, where the kernels of unquantised layers
//   (gemm.h) take it
#include <algorithm>
#include <memory>

#include "cpu_features.h"
#include "gemm.h"
#include "quantized_linear.h"
#include "thread_pool.h"

namespace folovllm {

using quantized::kPanelColumns;
using quantized::Rows;

namespace {

// Rows at a time: bounds the buffers. Those of a panel's sums lie on a thread's stack.
constexpr std::int64_t kFewRows = 240;
constexpr std::int64_t kManyRows = 1024;
constexpr std::int64_t kTileRows = 512;

quantized::PanelKernel panel_kernel(Isa isa, bool takes_bf16) {
  if (takes_bf16) return quantized::run_panel_avx512_bf16;
  if (isa >= Isa::kAvx512) return quantized::run_panel_avx512;
  return isa == Isa::kAvx2 ? quantized::run_panel_avx2 : quantized::run_panel_portable;
}

quantized::PanelDequantizer panel_dequantizer(Isa isa) {
  if (isa >= Isa::kAvx512Bf16) return quantized::dequantize_avx512_bf16;
  if (isa == Isa::kAvx512) return quantized::dequantize_avx512;
  return isa == Isa::kAvx2 ? quantized::dequantize_avx2 : quantized::dequantize_portable;
}

// From how many rows on writing a panel out as bf16 pays.
std::int64_t rows_to_dequantize(Isa isa) { return isa >= Isa::kAmx ? 192 : 48; }

// Memory of a thread, kept from call to call.
enum class Use { kWide, kPermuted, kSums, kPrepared, kPanel };

template <Use USE>
std::byte* scratch(std::int64_t num_bytes) {
  thread_local std::unique_ptr<HugeBuffer> buffer;
  if (buffer == nullptr || static_cast<std::int64_t>(buffer->size()) < num_bytes) {
    buffer.reset();
    buffer = std::make_unique<HugeBuffer>(static_cast<std::size_t>(num_bytes));
  }
  return buffer->data();
}

}  // namespace

// Rows as the kernels take them, K in the order of the weights: x itself where it is already so.
QuantizedLinear::Input QuantizedLinear::prepare(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride,
                                                bool as_bf16, bool with_sums) const {
  const bool is_ready = permutation_.empty() && (as_bf16 || dtype_ == DType::kFloat32);
  with_sums = with_sums && !zeros_.empty();
  if (is_ready && !with_sums) return {x, x_stride, nullptr};
  const auto size = static_cast<std::int64_t>(size_of(dtype_));
  const std::int64_t depth = in_features_;
  const std::int32_t* const order = permutation_.empty() ? nullptr : permutation_.data();
  const bool needs_wide = with_sums || !as_bf16;
  auto* const wide = needs_wide ? reinterpret_cast<float*>(scratch<Use::kWide>(num_rows * depth * 4)) : nullptr;
  auto* const permuted =
      as_bf16 && !is_ready ? reinterpret_cast<std::uint16_t*>(scratch<Use::kPermuted>(num_rows * depth * 2)) : nullptr;
  auto* const sums =
      with_sums ? reinterpret_cast<float*>(scratch<Use::kSums>(num_rows * shape_.num_groups * 4)) : nullptr;
  parallel_for(num_rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::byte* const source = x + row * x_stride * size;
      if (permuted != nullptr) {
        const auto* const values = reinterpret_cast<const std::uint16_t*>(source);
        for (std::int64_t k = 0; k < depth; ++k) permuted[row * depth + k] = values[order[k]];
      }
      if (wide != nullptr) {
        with_type(dtype_, [&](auto element) {
          const auto* const values = reinterpret_cast<const decltype(element)*>(source);
          for (std::int64_t k = 0; k < depth; ++k) {
            wide[row * depth + k] = to_float(values[order == nullptr ? k : order[k]]);
          }
        });
      }
      if (sums != nullptr) sum_groups(wide + row * depth, sums + row * shape_.num_groups);
    }
  });
  if (is_ready) return {x, x_stride, sums};
  return {as_bf16 ? reinterpret_cast<const std::byte*>(permuted) : reinterpret_cast<const std::byte*>(wide), depth, sums};
}

void QuantizedLinear::sum_groups(const float* x, float* sums) const {
  for (std::int64_t group = 0; group < shape_.num_groups; ++group) {
    float sum = 0;
    const std::int64_t end = std::min((group + 1) * group_size_, in_features_);
    for (std::int64_t k = group * group_size_; k < end; ++k) sum += x[k];
    sums[group] = sum;
  }
}

template <typename T>
void QuantizedLinear::store(const float* sums, std::int64_t panel, std::int64_t num_rows, std::byte* out,
                            std::int64_t out_stride) const {
  const std::int64_t first = panel * kPanelColumns;
  const std::int64_t count = std::min(kPanelColumns, out_features_ - first);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* const from = sums + row * kPanelColumns;
    T* const to = reinterpret_cast<T*>(out) + row * out_stride + first;
    if (bias_.empty()) {
      for (std::int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
    } else {
      const float* const bias = bias_.data() + first;
      for (std::int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i] + bias[i]);
    }
  }
}

void QuantizedLinear::forward(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                              std::int64_t out_stride, DType out_type, bool batch_invariant) const {
  // The kernels of unquantised layers write fp32 or the layer's own dtype.
  const bool can_dequantize = dtype_ == DType::kBFloat16 && out_type != DType::kFloat16 && !batch_invariant;
  const Isa isa = current_isa();
  const bool dequantizes = can_dequantize && num_rows >= rows_to_dequantize(isa);
  const bool is_alone = num_rows == 1 && !batch_invariant;
  const bool uses_tiles = !dequantizes && !is_alone && dtype_ == DType::kBFloat16 && isa >= Isa::kAmx;
  const std::int64_t block = uses_tiles ? kTileRows : dequantizes ? kManyRows : kFewRows;
  const auto x_bytes = static_cast<std::int64_t>(size_of(dtype_));
  const auto out_bytes = static_cast<std::int64_t>(size_of(out_type));
  for (std::int64_t row = 0; row < num_rows; row += block) {
    const std::int64_t count = std::min(block, num_rows - row);
    const std::byte* const source = x + row * x_stride * x_bytes;
    std::byte* const target = out + row * out_stride * out_bytes;
    if (uses_tiles) {
      forward_tiles(source, count, x_stride, target, out_stride, out_type);
    } else if (dequantizes) {
      forward_dequantized(source, count, x_stride, target, out_stride, out_type);
    } else {
      forward_packed(source, count, x_stride, target, out_stride, out_type, batch_invariant);
    }
  }
}

void QuantizedLinear::forward_tiles(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                                    std::int64_t out_stride, DType out_type) const {
  const Input input = prepare(x, num_rows, x_stride, true, false);
  std::byte* const prepared = scratch<Use::kPrepared>(quantized::amx_prepared_bytes(shape_, num_rows));
  auto* const group_sums = reinterpret_cast<float*>(scratch<Use::kSums>(num_rows * shape_.num_groups * 4));
  parallel_for(num_rows, 16, [&](std::int64_t begin, std::int64_t end) {
    quantized::amx_prepare(shape_, reinterpret_cast<const std::uint16_t*>(input.x), input.x_stride, begin, end, prepared,
                           group_sums);
  });
  const Rows rows{prepared, 0, group_sums, num_rows};
  parallel_for(num_panels(), 1, [&](std::int64_t begin, std::int64_t end) {
    auto* const sums = reinterpret_cast<float*>(scratch<Use::kPanel>(num_rows * kPanelColumns * 4));
    for (std::int64_t index = begin; index < end; ++index) {
      quantized::run_panel_amx(shape_, panel(index), rows, sums);
      with_type(out_type,
                [&](auto element) { store<decltype(element)>(sums, index, num_rows, out, out_stride); });
    }
  });
}

void QuantizedLinear::forward_packed(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride, std::byte* out,
                                     std::int64_t out_stride, DType out_type, bool batch_invariant) const {
  const Isa isa = current_isa();
  const bool as_bf16 = dtype_ == DType::kBFloat16 && isa >= Isa::kAvx512Bf16;
  if (as_bf16 && num_rows == 1 && !batch_invariant && quantized::can_split_row(shape_)) {
    if (forward_alone(x, out, out_type)) return;
  }
  const quantized::PanelKernel kernel = panel_kernel(isa, as_bf16);
  const Input input = prepare(x, num_rows, x_stride, as_bf16, true);
  const Rows rows{input.x, input.x_stride, input.sums, num_rows};
  parallel_for(num_panels(), 1, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) float sums[kFewRows * kPanelColumns];
    for (std::int64_t index = begin; index < end; ++index) {
      kernel(shape_, panel(index), rows, sums);
      with_type(out_type,
                [&](auto element) { store<decltype(element)>(sums, index, num_rows, out, out_stride); });
    }
  });
}

bool QuantizedLinear::forward_alone(const std::byte* x, std::byte* out, DType out_type) const {
  const Input input = prepare(x, 1, in_features_, true, false);
  const std::int64_t part_bytes = (in_features_ + 63) / 64 * 64;
  std::byte* const memory = scratch<Use::kPrepared>(2 * part_bytes + shape_.num_groups * 8);
  const quantized::SplitRow row{reinterpret_cast<std::int32_t*>(memory),
                                reinterpret_cast<std::int32_t*>(memory + part_bytes),
                                reinterpret_cast<float*>(memory + 2 * part_bytes),
                                reinterpret_cast<std::int32_t*>(memory + 2 * part_bytes + shape_.num_groups * 4)};
  if (!quantized::split_row(shape_, reinterpret_cast<const std::uint16_t*>(input.x), in_features_, row)) return false;
  parallel_for(num_panels(), 1, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) float sums[kPanelColumns];
    for (std::int64_t index = begin; index < end; ++index) {
      quantized::run_split_row(shape_, panel(index), row, sums);
      with_type(out_type, [&](auto element) { store<decltype(element)>(sums, index, 1, out, out_features_); });
    }
  });
  return true;
}

void QuantizedLinear::forward_dequantized(const std::byte* x, std::int64_t num_rows, std::int64_t x_stride,
                                          std::byte* out, std::int64_t out_stride, DType out_type) const {
  const GemmKernel& kernel = choose_gemm(DType::kBFloat16, num_rows, false);
  const quantized::PanelDequantizer dequantize = panel_dequantizer(current_isa());
  const Input input = prepare(x, num_rows, x_stride, true, false);
  const std::int64_t panel_bytes = quantized::dequantized_elements(shape_) * 2 / (kPanelColumns / kPanelWidth);
  const Gemm whole{.weights = nullptr,
                   .panel_bytes = panel_bytes,
                   .bias = nullptr,
                   .x = input.x,
                   .x_stride = input.x_stride,
                   .out = out,
                   .out_stride = out_stride,
                   .dtype = DType::kBFloat16,
                   .out_dtype = out_type,
                   .num_rows = num_rows,
                   .in_features = in_features_,
                   .out_features = kPanelColumns};
  std::byte* prepared = nullptr;
  if (const std::int64_t num_bytes = kernel.prepared_bytes(whole); num_bytes > 0) {
    prepared = scratch<Use::kPrepared>(num_bytes);
    parallel_for((num_rows + 15) / 16, 2, [&](std::int64_t begin, std::int64_t end) {
      kernel.prepare(whole, {begin * 16, std::min(end * 16, num_rows)}, prepared);
    });
  }
  // Several panels at a time, as all activations pass for each group, and may come from beyond the second level cache.
  constexpr std::int64_t kMostPanels = 4;
  const std::int64_t group = std::clamp<std::int64_t>(num_panels() / (2 * num_threads()), 1, kMostPanels);
  const std::int64_t dequantized_bytes = panel_bytes * (kPanelColumns / kPanelWidth);
  parallel_for(num_panels(), group, [&](std::int64_t begin, std::int64_t end) {
    std::byte* const weights = scratch<Use::kPanel>(dequantized_bytes * group);
    for (std::int64_t first = begin; first < end; first += group) {
      const std::int64_t last = std::min(first + group, end);
      for (std::int64_t index = first; index < last; ++index) {
        std::byte* const panel_weights = weights + (index - first) * dequantized_bytes;
        dequantize(shape_, panel(index), reinterpret_cast<std::uint16_t*>(panel_weights));
        clear_padding(panel_weights, panel_bytes);
      }
      const std::int64_t column = first * kPanelColumns;
      Gemm gemm = whole;
      gemm.weights = weights;
      gemm.bias = bias_.empty() ? nullptr : bias_.data() + column;
      gemm.out = out + column * static_cast<std::int64_t>(size_of(out_type));
      gemm.out_features = std::min((last - first) * kPanelColumns, out_features_ - column);
      const std::int64_t num_parts = (gemm.out_features + kPanelWidth - 1) / kPanelWidth;
      for (std::int64_t row = 0; row < num_rows; row += kernel.rows_per_piece) {
        kernel.compute(gemm, prepared, {row, std::min(row + kernel.rows_per_piece, num_rows)}, {0, num_parts});
      }
    }
  });
}

void QuantizedLinear::clear_padding(std::byte* weights, std::int64_t panel_bytes) const {
  const std::int64_t used = in_features_ * kPanelWidth * 2;
  for (std::int64_t part = 0; part < kPanelColumns / kPanelWidth; ++part) {
    std::fill(weights + part * panel_bytes + used, weights + (part + 1) * panel_bytes, std::byte{0});
  }
}

}  // namespace folovllm
