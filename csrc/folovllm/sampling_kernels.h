// What sampling does to every token of the vocabulary, as each level of instructions provides it.
//
//   sampling.cpp: rows and pieces of rows -> threads
//     |- sampling_row.cpp: one row
//     |    |- sampling_top.cpp: the first k candidates, for small k and top_p that few tokens reach
//     |    `- sampling_ranks.cpp: any k and top_p, by a histogram
//     `- sampling_{portable,avx2,avx512}.cpp: the same source, sampling_kernels_inl.h, compiled for each level
#pragma once

#include <cstdint>

namespace folovllm {

// A row's maxima are taken over blocks of tokens, in each over the groups of tokens that are equal modulo kGroups.
constexpr std::int64_t kBlock = 256;
constexpr std::int64_t kGroups = 16;
// A row's mass is summed over segments.
constexpr std::int64_t kSegment = 512;

// The weight of a logit x: exp((x - max) * inverse_temperature) if x >= cut, else 0. Infinite x count as the largest
// finite number.
struct Softmax {
  float max;
  float inverse_temperature;
  float cut;
};

struct Best {
  float value;
  std::int64_t index;  // -1: all are NaN
};

struct SamplingKernels {
  // The first largest of `size` elements, by dtype.
  Best (*argmax[3])(const void* x, std::int64_t size);
  // out[block * kGroups + group], -infinity for a group without tokens or of NaN.
  void (*block_maxima)(const float* x, std::int64_t size, float* out);
  void (*weights)(const Softmax& softmax, const float* x, std::int64_t size, float* out);
  // out[segment]: the sum of its weights.
  void (*segment_masses)(const Softmax& softmax, const float* x, std::int64_t size, float* out);
  // The indices of low <= x <= high, rising; returns how many.
  std::int64_t (*find_between)(const float* x, std::int64_t size, float low, float high, std::int32_t* out);
};

extern const SamplingKernels kSamplingPortable;
#if defined(__x86_64__)
extern const SamplingKernels kSamplingAvx2;
extern const SamplingKernels kSamplingAvx512;
#endif

// Those of the current level.
const SamplingKernels& sampling_kernels();

}  // namespace folovllm
