// Which instructions this machine has, and which the kernels may use.
#pragma once

#include <cstdint>
#include <string_view>

namespace folovllm {

// Ordered: each level includes those before it.
enum class Isa : std::uint8_t {
  kPortable,    // plain C++
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // and its bf16 dot products
  kAmx,         // and bf16 matrix tiles, which the operating system has granted to this process
};

// The best level of this machine; determined once.
Isa detected_isa();

// The level the kernels use: `detected_isa`, or lower when limited.
Isa current_isa();

// Use at most `isa` from now on; for tests and comparisons. Not while a kernel runs.
void limit_isa(Isa isa);

// "portable", "avx2", "avx512", "avx512_bf16", "amx".
std::string_view isa_name(Isa isa);

// The level of a name; throws std::invalid_argument, which lists the names, for another.
Isa isa_of(std::string_view name);

}  // namespace folovllm
