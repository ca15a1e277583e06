#include "quantized_linear.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "thread_pool.h"

namespace folovllm {

using quantized::kPanelColumns;
using quantized::Panel;
using quantized::place_in_word;

namespace {

std::int64_t num_panels_of(std::int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

quantized::Shape shape_of(std::int64_t in_features, int bits, std::int64_t group_size, DType scale_type) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("bits=" + std::to_string(bits) + "; it must be 4 or 8");
  const std::int64_t per_word = 32 / bits;
  if (in_features < 1 || in_features % per_word != 0) {
    throw std::invalid_argument("in_features=" + std::to_string(in_features) + "; it must be a multiple of " +
                                std::to_string(per_word));
  }
  if (group_size < 1 || (group_size % per_word != 0 && group_size < in_features)) {
    throw std::invalid_argument("group_size=" + std::to_string(group_size) + "; it must be a multiple of " +
                                std::to_string(per_word));
  }
  group_size = std::min(group_size, in_features);
  return {bits, in_features / per_word, group_size / per_word, (in_features + group_size - 1) / group_size,
          scale_type};
}

// Even weights to the low half, odd ones to the high half: quantized_layout.h.
std::uint32_t reorder_word(int bits, std::uint32_t word) {
  if (bits == 4) {
    const std::uint32_t nibbles = (word ^ word >> 4) & 0x00f000f0U;
    word ^= nibbles ^ nibbles << 4;
  }
  const std::uint32_t bytes = (word ^ word >> 8) & 0x0000ff00U;
  return word ^ bytes ^ bytes << 8;
}

}  // namespace

QuantizedLinear::QuantizedLinear(std::int64_t out_features, std::int64_t in_features, int bits,
                                 std::int64_t group_size, DType dtype, DType scale_type)
    : out_features_(out_features),
      in_features_(in_features),
      group_size_(std::min(group_size, in_features)),
      dtype_(dtype),
      shape_(shape_of(in_features, bits, group_size, scale_type)),
      weights_(static_cast<std::size_t>(num_panels_of(std::max<std::int64_t>(out_features, 0)) * kPanelColumns *
                                        shape_.num_words * 4 + 1)) {
  if (out_features < 1) {
    throw std::invalid_argument("out_features=" + std::to_string(out_features) + "; it must be at least 1");
  }
  const std::int64_t num_scales = num_panels() * shape_.num_groups * kPanelColumns;
  scales_.resize(static_cast<std::size_t>(num_scales * quantized::scale_bytes(scale_type)));
}

std::int64_t QuantizedLinear::num_panels() const { return num_panels_of(out_features_); }

std::int64_t QuantizedLinear::scale_index(std::int64_t group, std::int64_t column) const {
  return (column / kPanelColumns * shape_.num_groups + group) * kPanelColumns + column % kPanelColumns;
}

Panel QuantizedLinear::panel(std::int64_t index) const {
  const std::int64_t first_scale = scale_index(0, index * kPanelColumns);
  return {reinterpret_cast<const std::uint32_t*>(weights_.data()) + index * kPanelColumns * shape_.num_words,
          scales_.data() + first_scale * quantized::scale_bytes(shape_.scale_type),
          zeros_.empty() ? nullptr : zeros_.data() + first_scale};
}

void QuantizedLinear::set_permutation(const std::int32_t* permutation) {
  std::vector<bool> seen(static_cast<std::size_t>(in_features_));
  for (std::int64_t i = 0; i < in_features_; ++i) {
    const std::int32_t k = permutation[i];
    if (k < 0 || k >= in_features_ || seen[static_cast<std::size_t>(k)]) {
      throw std::invalid_argument("the order of K is not a permutation of its " + std::to_string(in_features_) +
                                  " places");
    }
    seen[static_cast<std::size_t>(k)] = true;
  }
  permutation_.assign(permutation, permutation + in_features_);
}

void QuantizedLinear::check_columns(std::int64_t first, std::int64_t count) const {
  if (first < 0 || count < 0 || first > out_features_ - count) {
    throw std::invalid_argument("columns " + std::to_string(first) + " to " + std::to_string(first + count) + " of " +
                                std::to_string(out_features_));
  }
}

std::uint32_t QuantizedLinear::word_of(const Source& source, std::int64_t column, std::int64_t word) const {
  if (permutation_.empty()) return reorder_word(shape_.bits, source.qweight[word * source.qweight_stride + column]);
  const int per_word = 32 / shape_.bits;
  std::uint32_t packed = 0;
  for (int i = 0; i < per_word; ++i) {
    const std::int64_t k = permutation_[static_cast<std::size_t>(word * per_word + i)];
    const std::uint32_t stored = source.qweight[k / per_word * source.qweight_stride + column];
    const std::uint32_t value = stored >> (k % per_word * shape_.bits) & ((1U << shape_.bits) - 1);
    packed |= value << place_in_word(shape_.bits, i);
  }
  return packed;
}

void QuantizedLinear::fill(std::int64_t first_column, const Source& source) {
  check_columns(first_column, source.num_columns);
  if (source.num_columns % (32 / shape_.bits) != 0) {
    throw std::invalid_argument(std::to_string(source.num_columns) + " columns do not fill words of zero points");
  }
  fill_groups(first_column, source);
  auto* const weights = reinterpret_cast<std::uint32_t*>(weights_.data());
  parallel_for(shape_.num_words, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t word = begin; word < end; ++word) {
      std::int64_t column = 0;
      while (column < source.num_columns) {  // the columns of one panel lie side by side
        const std::int64_t target = first_column + column;
        const std::int64_t count = std::min(kPanelColumns - target % kPanelColumns, source.num_columns - column);
        std::uint32_t* const out = weights + (target / kPanelColumns * shape_.num_words + word) * kPanelColumns +
                                   target % kPanelColumns;
        for (std::int64_t i = 0; i < count; ++i) out[i] = word_of(source, column + i, word);
        column += count;
      }
    }
  });
}

void QuantizedLinear::fill_groups(std::int64_t first_column, const Source& source) {
  const int bits = shape_.bits;
  const int per_word = 32 / bits;
  const std::int64_t size = quantized::scale_bytes(shape_.scale_type);
  // The offset goes to the word as a whole, carries included: that is how writers of the older format took it off.
  const std::uint32_t ones = bits == 4 ? 0x11111111U : 0x01010101U;
  const std::uint32_t offset = ones * static_cast<std::uint32_t>(source.zero_offset);
  for (std::int64_t group = 0; group < shape_.num_groups; ++group) {
    for (std::int64_t column = 0; column < source.num_columns; ++column) {
      const std::int64_t index = scale_index(group, first_column + column);
      std::memcpy(scales_.data() + index * size, source.scales + (group * source.scales_stride + column) * size,
                  static_cast<std::size_t>(size));
      const std::uint32_t word = source.qzeros[group * source.qzeros_stride + column / per_word] + offset;
      const std::uint32_t zero = word >> (column % per_word * bits) & ((1U << bits) - 1);
      const int centred = static_cast<int>(zero) - (1 << (bits - 1));
      if (centred != 0 && zeros_.empty()) {
        zeros_.resize(static_cast<std::size_t>(num_panels() * shape_.num_groups * kPanelColumns));
      }
      if (!zeros_.empty()) zeros_[static_cast<std::size_t>(index)] = static_cast<std::int8_t>(centred);
    }
  }
}

void QuantizedLinear::set_bias(const float* bias) {
  bias_.assign(static_cast<std::size_t>(num_panels() * kPanelColumns), 0.0F);
  std::copy_n(bias, out_features_, bias_.begin());
}

void QuantizedLinear::unpack(std::int64_t first_column, std::int64_t num_columns, float* out) const {
  check_columns(first_column, num_columns);
  const int per_word = 32 / shape_.bits;
  parallel_for(num_columns, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t column = first_column + row;
      const std::uint32_t* const words = panel(column / kPanelColumns).weights + column % kPanelColumns;
      for (std::int64_t place = 0; place < in_features_; ++place) {
        const std::uint32_t word = words[place / per_word * kPanelColumns];
        const auto shift = place_in_word(shape_.bits, static_cast<int>(place % per_word));
        const auto q = static_cast<int>(word >> shift & ((1U << shape_.bits) - 1)) - (1 << (shape_.bits - 1));
        const std::int64_t index = scale_index(place / group_size_, column);
        const int zero = zeros_.empty() ? 0 : zeros_[static_cast<std::size_t>(index)];
        const float scale = with_type(shape_.scale_type, [&](auto element) {
          std::memcpy(&element, scales_.data() + index * static_cast<std::int64_t>(sizeof(element)), sizeof(element));
          return to_float(element);
        });
        const std::int64_t k = permutation_.empty() ? place : permutation_[static_cast<std::size_t>(place)];
        out[row * in_features_ + k] = scale * static_cast<float>(q - zero);
      }
    }
  });
}

std::size_t QuantizedLinear::num_bytes() const {
  return weights_.size() + scales_.size() + zeros_.size() + (permutation_.size() + bias_.size()) * 4;
}

}  // namespace folovllm
