#include "checksum.h"

#define XXH_INLINE_ALL  // what the compiler's baseline allows: SSE2 on x86-64, NEON on ARM
#include <xxhash.h>

namespace flexkv {

bool is_supported(ChecksumIsa isa) {
#if defined(__x86_64__)
  if (isa == ChecksumIsa::kAvx512) return __builtin_cpu_supports("avx512f") != 0;
  if (isa == ChecksumIsa::kAvx2) return __builtin_cpu_supports("avx2") != 0;
#endif
  return isa == ChecksumIsa::kPortable;
}

ChecksumIsa best_checksum_isa() {
  static const ChecksumIsa best = is_supported(ChecksumIsa::kAvx512) ? ChecksumIsa::kAvx512
                                  : is_supported(ChecksumIsa::kAvx2) ? ChecksumIsa::kAvx2
                                                                     : ChecksumIsa::kPortable;
  return best;
}

std::uint64_t checksum_with(ChecksumIsa isa, std::span<const std::byte> data) {
#if defined(__x86_64__)
  if (isa == ChecksumIsa::kAvx512) return detail::checksum_avx512(data.data(), data.size());
  if (isa == ChecksumIsa::kAvx2) return detail::checksum_avx2(data.data(), data.size());
#endif
  (void)isa;
  return XXH3_64bits(data.data(), data.size());
}

std::uint64_t checksum(std::span<const std::byte> data) { return checksum_with(best_checksum_isa(), data); }

}  // namespace flexkv
