// A quantised panel as bf16, for any vector type of quantized_kernel_fp32_inl.h that also has
//
//   store_pairs(address, even, odd)   even and odd k's of kWidth columns, rounded to bf16 and side by side
//
// in an unnamed namespace of folovllm::quantized. What comes out are four panels of packed_weights.h.

// One word of kWidth columns: its pairs of k go to consecutive lines of the panel. `bias` is -zero * scale.
template <typename V, int BITS, std::size_t... PAIR>
FOLOVLLM_INLINE void dequantize_word(const std::uint32_t* words, typename V::Value scale, typename V::Value bias,
                                     std::uint16_t* out, std::index_sequence<PAIR...>) {
  constexpr std::size_t kLine = 2 * kPanelWidth;
  (V::store_pairs(out + PAIR * kLine,
                  V::multiply_add(V::template weights<BITS, static_cast<int>(2 * PAIR)>(words), scale, bias),
                  V::multiply_add(V::template weights<BITS, static_cast<int>(2 * PAIR + 1)>(words), scale, bias)),
   ...);
}

template <typename V, int BITS>
FOLOVLLM_ISA void dequantize_columns(const Shape& shape, const Panel& panel, std::int64_t first, std::uint16_t* out) {
  constexpr std::int64_t kPairs = 16 / BITS;
  const std::int64_t line = 2 * kPanelWidth;
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    const std::int64_t index = group * kPanelColumns + first;
    const auto scale = V::scales(panel.scales + index * scale_bytes(shape.scale_type), shape.scale_type);
    auto bias = V::zero();
    if (panel.zeros != nullptr) {
      const auto minus_one = V::broadcast(-1.0F);
      const auto minus_zero = V::multiply_add(V::zeros(panel.zeros + index), minus_one, bias);
      bias = V::multiply_add(minus_zero, scale, bias);
    }
    const std::int64_t begin = group * shape.group_words;
    const std::int64_t end = begin + shape.group_words < shape.num_words ? begin + shape.group_words : shape.num_words;
    for (std::int64_t word = begin; word < end; ++word) {
      dequantize_word<V, BITS>(panel.weights + word * kPanelColumns + first, scale, bias, out + word * kPairs * line,
                               std::make_index_sequence<kPairs>{});
    }
  }
}

// The whole panel; lines beyond K are left alone.
template <typename V>
inline void dequantize_panel(const Shape& shape, const Panel& panel, std::uint16_t* out) {
  const std::int64_t panel_size = dequantized_elements(shape) / (kPanelColumns / kPanelWidth);
  for (std::int64_t first = 0; first < kPanelColumns; first += V::kWidth) {
    std::uint16_t* const target = out + first / kPanelWidth * panel_size + first % kPanelWidth * 2;
    if (shape.bits == 4) {
      dequantize_columns<V, 4>(shape, panel, first, target);
    } else {
      dequantize_columns<V, 8>(shape, panel, first, target);
    }
  }
}
