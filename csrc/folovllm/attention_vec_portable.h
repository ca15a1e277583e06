// Eight floats in plain C++. The other attention_vec_*.h offer the same operations; each is included by files of one
// instruction set only, and in a namespace of its own, so that the linker never mixes them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "number_formats.h"

namespace folovllm::attention {
namespace {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kUnroll = 4;  // rows of a matrix product held in registers

  struct F {
    float lane[kWidth];
  };

  template <typename Op>
  static F each(Op op) {
    F r;
    for (int i = 0; i < kWidth; ++i) r.lane[i] = op(i);
    return r;
  }

  static F set1(float x) { return each([&](int) { return x; }); }
  static F iota() { return each([](int i) { return static_cast<float>(i); }); }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static F load(const BFloat16* p) { return each([&](int i) { return to_float(p[i]); }); }
  static F load(const Float16* p) { return each([&](int i) { return to_float(p[i]); }); }
  template <typename T>
  static F load_first(const T* p, int n) {
    return each([&](int i) { return i < n ? to_float(p[i]) : 0.0F; });
  }
  static void store(float* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = x.lane[i];
  }
  template <typename T>
  static void store_first(T* p, F x, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(x.lane[i]);
  }
  static F add(F a, F b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
  // b where either is a NaN.
  static F max(F a, F b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  // a < b ? x : y
  static F where_less(F a, F b, F x, F y) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static F round(F x) {
    constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: what is added to it loses its fraction
    return each([&](int i) { return (x.lane[i] + kMagic) - kMagic; });
  }
  // x * 2^n for whole n from -126 to 127.
  static F scale_by_power(F x, F n) {
    return each([&](int i) {
      const auto exponent = static_cast<std::uint32_t>(n.lane[i] == n.lane[i] ? static_cast<int>(n.lane[i]) : 0) + 127U;
      return x.lane[i] * std::bit_cast<float>(exponent << 23);
    });
  }
  static float sum(F x) {
    for (int n = kWidth / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) x.lane[i] += x.lane[i + n];
    }
    return x.lane[0];
  }
  static float largest(F x) {
    float r = x.lane[0];
    for (const float lane : x.lane) r = lane > r ? lane : r;
    return r;
  }
  static void transpose(F* x) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < i; ++j) {
        const float t = x[i].lane[j];
        x[i].lane[j] = x[j].lane[i];
        x[j].lane[i] = t;
      }
    }
  }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace folovllm::attention
