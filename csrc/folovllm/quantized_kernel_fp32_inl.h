// The fp32 kernel of quantised panels, for any vector type. Each includer defines first
//
//   FOLOVLLM_ISA   the attribute that lets a function use the instruction set
//   Vector         with kWidth, `Value`, `RowCounts` (of quantized_tables.h), kFewRows, up to which four vectors of
//                  columns are taken together, more rows two, and
//                  zero, load, store, broadcast, multiply_add(a, b, c) = a * b + c,
//                  scales(address, type), zeros(address), weights<BITS, K>(words): the K-th weights of kWidth words
//
// in an unnamed namespace of folovllm::quantized, so that every instruction set has functions of its own.

template <int BITS, int ROWS, int VECTORS, int K>
FOLOVLLM_ISA inline __attribute__((always_inline)) void add_weight(Vector::Value (&sums)[ROWS][VECTORS],
                                                                   const std::uint32_t* words, const float* x,
                                                                   std::int64_t x_stride) {
  Vector::Value weights[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) weights[v] = Vector::template weights<BITS, K>(words + v * Vector::kWidth);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    const auto input = Vector::broadcast(x[r * x_stride + K]);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vector::multiply_add(weights[v], input, sums[r][v]);
  }
}

template <int BITS, int ROWS, int VECTORS, std::size_t... K>
FOLOVLLM_ISA inline __attribute__((always_inline)) void add_word(Vector::Value (&sums)[ROWS][VECTORS],
                                                                 const std::uint32_t* words, const float* x,
                                                                 std::int64_t x_stride, std::index_sequence<K...>) {
  (add_weight<BITS, ROWS, VECTORS, static_cast<int>(K)>(sums, words, x, x_stride), ...);
}

// One group of ROWS rows by VECTORS vectors of columns from column `first` on, added to `out`.
template <int BITS, int ROWS, int VECTORS>
FOLOVLLM_ISA void run_group(const Shape& shape, const Panel& panel, const Rows& rows, std::int64_t group,
                            std::int64_t first, float* out) {
  constexpr int kPerWord = 32 / BITS;
  const std::int64_t begin = group * shape.group_words;
  const std::int64_t end = begin + shape.group_words < shape.num_words ? begin + shape.group_words : shape.num_words;
  Vector::Value sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vector::zero();
  }
  const float* x = static_cast<const float*>(rows.x) + begin * kPerWord;
  const std::uint32_t* words = panel.weights + begin * kPanelColumns + first;
  for (std::int64_t word = begin; word < end; ++word, words += kPanelColumns, x += kPerWord) {
    add_word<BITS, ROWS, VECTORS>(sums, words, x, rows.x_stride, std::make_index_sequence<kPerWord>{});
  }
  for (int v = 0; v < VECTORS; ++v) {
    const std::int64_t index = group * kPanelColumns + first + v * Vector::kWidth;
    const auto scale = Vector::scales(panel.scales + index * scale_bytes(shape.scale_type), shape.scale_type);
    const auto zero = panel.zeros != nullptr ? Vector::zeros(panel.zeros + index) : Vector::zero();
    for (int r = 0; r < ROWS; ++r) {
      float* target = out + r * kPanelColumns + first + v * Vector::kWidth;
      auto sum = sums[r][v];
      if (panel.zeros != nullptr) {
        sum = Vector::multiply_add(zero, Vector::broadcast(-rows.sums[r * shape.num_groups + group]), sum);
      }
      Vector::store(target, Vector::multiply_add(sum, scale, Vector::load(target)));
    }
  }
}

template <int BITS, int ROWS>
FOLOVLLM_ISA void run_rows(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  constexpr int kVectors = ROWS <= Vector::kFewRows ? 4 : 2;
  for (std::int64_t i = 0; i < ROWS * kPanelColumns; ++i) out[i] = 0;
  for (std::int64_t group = 0; group < shape.num_groups; ++group) {
    for (std::int64_t first = 0; first < kPanelColumns; first += kVectors * Vector::kWidth) {
      run_group<BITS, ROWS, kVectors>(shape, panel, rows, group, first, out);
    }
  }
}

inline void run_panel(const Shape& shape, const Panel& panel, const Rows& rows, float* out) {
  static constexpr typename Vector::RowCounts kInt4([]<int ROWS> { return &run_rows<4, ROWS>; });
  static constexpr typename Vector::RowCounts kInt8([]<int ROWS> { return &run_rows<8, ROWS>; });
  run_by_rows(shape.bits == 4 ? kInt4 : kInt8, 4, shape, panel, rows, out);
}
