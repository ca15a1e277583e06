#include "cpu_features.h"

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace folovllm {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

// Tiles are saved with a process only once it has asked for them (Linux 5.16 and later).
bool request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return ::syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool has_bit(unsigned value, int bit) { return (value >> bit & 1U) != 0; }

std::uint64_t enabled_states() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

Isa detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has_bit(c, 27) /* OSXSAVE */) return Isa::kPortable;
  const bool has_fma = has_bit(c, 12);
  const bool has_f16c = has_bit(c, 29);
  const std::uint64_t states = enabled_states();
  constexpr std::uint64_t kAvxState = 0x6;
  constexpr std::uint64_t kAvx512State = 0xe6;
  constexpr std::uint64_t kTileState = 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return Isa::kPortable;
  const unsigned features_b = b;
  const unsigned features_d = d;
  if (!has_fma || !has_f16c || !has_bit(features_b, 5) || (states & kAvxState) != kAvxState) return Isa::kPortable;
  const bool has_avx512 =
      has_bit(features_b, 16) && has_bit(features_b, 17) && has_bit(features_b, 30) && has_bit(features_b, 31);
  if (!has_avx512 || (states & kAvx512State) != kAvx512State) return Isa::kAvx2;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || !has_bit(a, 5)) return Isa::kAvx512;
  const bool has_amx = has_bit(features_d, 22) && has_bit(features_d, 24);
  if (!has_amx || (states & kTileState) != kTileState || !request_tiles()) return Isa::kAvx512Bf16;
  return Isa::kAmx;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

std::atomic<Isa>& limit() {
  static std::atomic<Isa> value{detected_isa()};
  return value;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return limit().load(std::memory_order_relaxed); }

void limit_isa(Isa isa) { limit().store(isa < detected_isa() ? isa : detected_isa(), std::memory_order_relaxed); }

std::string_view isa_name(Isa isa) { return kNames[static_cast<std::size_t>(isa)]; }

Isa isa_of(std::string_view name) {
  std::string allowed;
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Isa>(i);
    allowed += (i == 0 ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is not known; it must be one of " + allowed);
}

}  // namespace folovllm
