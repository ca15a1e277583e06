// The kernels of sampling_kernels.h, written once over the vectors of fused_vec.h.
#pragma once

#include "fused_vec.h"
#include "sampling_kernels.h"

namespace folovllm {
namespace {

constexpr float kInfinity = __builtin_inff();

// The larger of the two; `best` if x is NaN.
FOLOVLLM_INLINE Floats larger(Floats x, Floats best) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, best);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, best);
#else
  return x > best ? x : best;
#endif
}

// Bit i: low <= x[i] <= high.
FOLOVLLM_INLINE unsigned lanes_between(Floats x, Floats low, Floats high) {
#if defined(__AVX512F__)
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LE_OQ);
#elif defined(__AVX2__)
  const __m256 is_between = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
  return static_cast<unsigned>(_mm256_movemask_ps(is_between));
#else
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= (x[i] >= low[i] && x[i] <= high[i] ? 1U : 0U) << i;
  return lanes;
#endif
}

// -- argmax ------------------------------------------------------------------------------------------------------------

// Looked through again for the index when it holds the largest value: small enough to be cached still.
constexpr std::int64_t kArgmaxChunk = 2048;

template <typename T>
FOLOVLLM_INLINE Floats load_first_or_lowest(const T* from, std::int64_t count) {
  Floats x = load_first(from, count);
  for (std::int64_t i = count; i < kLanes; ++i) x[i] = -kInfinity;
  return x;
}

template <typename T>
FOLOVLLM_INLINE float largest(const T* x, std::int64_t size) {
  constexpr int kParts = 4;  // a comparison need not wait for the one before
  Floats best[kParts];
  for (Floats& part : best) part = all(-kInfinity);
  std::int64_t i = 0;
  for (; i + kParts * kLanes <= size; i += kParts * kLanes) {
    for (int p = 0; p < kParts; ++p) best[p] = larger(load(x + i + p * kLanes), best[p]);
  }
  for (; i < size; i += kLanes) {
    best[0] = larger(i + kLanes <= size ? load(x + i) : load_first_or_lowest(x + i, size - i), best[0]);
  }
  for (int p = 1; p < kParts; ++p) best[0] = larger(best[p], best[0]);
  float value = best[0][0];
  for (int lane = 1; lane < kLanes; ++lane) value = best[0][lane] > value ? best[0][lane] : value;
  return value;
}

// The first element equal to `value`, or -1.
template <typename T>
FOLOVLLM_INLINE std::int64_t first_equal(const T* x, std::int64_t size, float value) {
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t count = size - i < kLanes ? size - i : kLanes;
    const Floats here = count == kLanes ? load(x + i) : load_first(x + i, count);
    const unsigned lanes = lanes_between(here, all(value), all(value)) & ((1U << count) - 1U);
    if (lanes != 0) return i + __builtin_ctz(lanes);
  }
  return -1;
}

template <typename T>
Best argmax_of(const void* from, std::int64_t size) {
  const T* const x = static_cast<const T*>(from);
  float best = -kInfinity;
  std::int64_t chunk = -1;
  for (std::int64_t begin = 0; begin < size; begin += kArgmaxChunk) {
    const float value = largest(x + begin, size - begin < kArgmaxChunk ? size - begin : kArgmaxChunk);
    if (value > best) {
      best = value;
      chunk = begin;
    }
  }
  if (chunk < 0) return {best, first_equal(x, size, best)};
  return {best, chunk + first_equal(x + chunk, size - chunk, best)};
}

// -- maxima, weights, masses -------------------------------------------------------------------------------------------

FOLOVLLM_INLINE void maxima_of_block(const float* x, float* out) {
  constexpr int kParts = 2 * kGroups / kLanes;
  Floats best[kParts];
  for (Floats& part : best) part = all(-kInfinity);
  for (std::int64_t i = 0; i < kBlock; i += 2 * kGroups) {
    for (int p = 0; p < kParts; ++p) best[p] = larger(load(x + i + p * kLanes), best[p]);
  }
  for (int p = 0; p < kParts / 2; ++p) store(out + p * kLanes, larger(best[p + kParts / 2], best[p]));
}

void block_maxima(const float* x, std::int64_t size, float* out) {
  for (; size >= kBlock; size -= kBlock, x += kBlock, out += kGroups) maxima_of_block(x, out);
  if (size == 0) return;
  float padded[kBlock];
  for (std::int64_t i = 0; i < kBlock; ++i) padded[i] = i < size ? x[i] : -kInfinity;
  maxima_of_block(padded, out);
}

struct VectorSoftmax {
  Floats max, inverse_temperature, cut, largest;

  FOLOVLLM_INLINE explicit VectorSoftmax(const Softmax& softmax)
      : max(all(softmax.max)),
        inverse_temperature(all(softmax.inverse_temperature)),
        cut(all(softmax.cut)),
        largest(all(__FLT_MAX__)) {}

  FOLOVLLM_INLINE Floats weight(Floats x) const {
    const Floats finite = x > largest ? largest : x;
    const Floats weight = exp((finite - max) * inverse_temperature);
    return x >= cut ? weight : Floats{};
  }
};

void weights(const Softmax& softmax, const float* x, std::int64_t size, float* out) {
  const VectorSoftmax vector(softmax);
  for_vectors(size, [&](std::int64_t i, auto load_at, auto store_at) {
    store_at(out + i, vector.weight(load_at(x + i)));
  });
}

void segment_masses(const Softmax& softmax, const float* x, std::int64_t size, float* out) {
  const VectorSoftmax vector(softmax);
  for (std::int64_t begin = 0; begin < size; begin += kSegment, ++out) {
    const float* const from = x + begin;
    Sum sum;
    sum.add(
        size - begin < kSegment ? size - begin : kSegment,
        [&](std::int64_t i) { return vector.weight(load(from + i)); },
        [&](std::int64_t i, std::int64_t count) { return vector.weight(load_first_or_lowest(from + i, count)); });
    *out = sum.total();
  }
}

std::int64_t find_between(const float* x, std::int64_t size, float low, float high, std::int32_t* out) {
  std::int64_t num_found = 0;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t count = size - i < kLanes ? size - i : kLanes;
    const Floats here = count == kLanes ? load(x + i) : load_first(x + i, count);
    unsigned lanes = lanes_between(here, all(low), all(high)) & ((1U << count) - 1U);
    for (; lanes != 0; lanes &= lanes - 1) out[num_found++] = static_cast<std::int32_t>(i + __builtin_ctz(lanes));
  }
  return num_found;
}

}  // namespace
}  // namespace folovllm

// argmax in the order of DType.
#define FOLOVLLM_SAMPLING_TABLE                                                                                     \
  {                                                                                                                 \
    {argmax_of<float>, argmax_of<BFloat16>, argmax_of<Float16>}, block_maxima, weights, segment_masses, find_between \
  }
