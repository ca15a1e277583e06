// Plain C++, for machines without any of the others: weights and activations become fp32.
#include "gemm_vector_inl.h"

namespace folovllm {
namespace {

struct Vector {
  float lanes[4];
};

template <typename T>
struct PortableOps {
  using X = float;
  using Acc = Vector;
  using Input = const float*;
  static constexpr int kLanes = 4;
  static constexpr int kDepth = std::is_same_v<T, BFloat16> ? 2 : 1;
  static constexpr std::int64_t kVectorBytes = kLanes * kDepth * static_cast<std::int64_t>(sizeof(T));
  static constexpr int kMaxRows = 2;
  static constexpr bool kConverts = !std::is_same_v<T, float>;
  static constexpr int panels(int rows) { return rows > 0 ? 1 : 0; }

  struct Weights {
    float lanes[kDepth][kLanes];
  };

  static Acc zero() { return {}; }

  static Weights load(const std::byte* bytes) {
    const T* const values = reinterpret_cast<const T*>(bytes);
    Weights weights;
    for (int i = 0; i < kLanes; ++i) {
      for (int d = 0; d < kDepth; ++d) weights.lanes[d][i] = to_float(values[i * kDepth + d]);
    }
    return weights;
  }

  static Input broadcast(const float* x) { return x; }

  static Acc fma(Acc acc, const Weights& weights, Input x) {
    for (int d = 0; d < kDepth; ++d) {
      for (int i = 0; i < kLanes; ++i) acc.lanes[i] += weights.lanes[d][i] * x[d];
    }
    return acc;
  }

  static Acc add(Acc acc, const float* bias) {
    for (int i = 0; i < kLanes; ++i) acc.lanes[i] += bias[i];
    return acc;
  }

  static void store(std::byte* out, DType dtype, const Acc& acc) {
    with_type(dtype, [&]<typename Out>(Out) {
      for (int i = 0; i < kLanes; ++i) reinterpret_cast<Out*>(out)[i] = from_float<Out>(acc.lanes[i]);
    });
  }

  static void convert(const std::byte* x, std::int64_t offset, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(reinterpret_cast<const T*>(x)[offset + i]);
  }
};

}  // namespace

const GemmKernel& gemm_portable(DType dtype) {
  return with_type(dtype, []<typename T>(T) -> const GemmKernel& { return VectorGemm<PortableOps<T>>::kKernel; });
}

}  // namespace folovllm
