#include "kvblocks/sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <utility>
#endif

namespace kvblocks {

#if defined(__x86_64__)

#define KVBLOCKS_SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))
#define KVBLOCKS_SHA_INLINE __attribute__((target("sha,sse4.1,ssse3"), always_inline)) inline

namespace {

// The SHA instructions want the state as two vectors, highest word first: {a b e f} and {c d g h}.
struct PackedState {
  __m128i abef;
  __m128i cdgh;
};

KVBLOCKS_SHA_INLINE PackedState pack(const Sha256State& state) {
  const __m128i dcba = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state.data()));
  const __m128i hgfe = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state.data() + 4));
  const __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1B);
  return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xF0)};
}

KVBLOCKS_SHA_INLINE void unpack(const PackedState& packed, Sha256State& state) {
  const __m128i feba = _mm_shuffle_epi32(packed.abef, 0x1B);
  const __m128i dchg = _mm_shuffle_epi32(packed.cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data()), _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data() + 4), _mm_alignr_epi8(dchg, feba, 8));
}

// Rounds 4*kGroup .. 4*kGroup+3. `w` holds the last 16 message words, four per vector; group g lives in w[g % 4].
template <int kGroup>
KVBLOCKS_SHA_INLINE void four_rounds(PackedState& s, __m128i (&w)[4]) {
  __m128i& current = w[kGroup % 4];
  if constexpr (kGroup >= 4) {
    const __m128i back7 = _mm_alignr_epi8(w[(kGroup + 3) % 4], w[(kGroup + 2) % 4], 4);
    const __m128i partial = _mm_add_epi32(_mm_sha256msg1_epu32(current, w[(kGroup + 1) % 4]), back7);
    current = _mm_sha256msg2_epu32(partial, w[(kGroup + 3) % 4]);
  }
  const __m128i constants =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(kSha256RoundConstants.data() + 4 * kGroup));
  const __m128i input = _mm_add_epi32(current, constants);
  s.cdgh = _mm_sha256rnds2_epu32(s.cdgh, s.abef, input);
  s.abef = _mm_sha256rnds2_epu32(s.abef, s.cdgh, _mm_shuffle_epi32(input, 0x0E));
}

template <int... kGroups>
KVBLOCKS_SHA_INLINE void all_rounds(PackedState& s, __m128i (&w)[4], std::integer_sequence<int, kGroups...>) {
  (four_rounds<kGroups>(s, w), ...);
}

}  // namespace

KVBLOCKS_SHA_TARGET void sha256_compress_ni(Sha256State& state, const std::uint8_t* message, std::size_t num_blocks) {
  const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  PackedState s = pack(state);
  for (; num_blocks > 0; --num_blocks, message += kSha256BlockBytes) {
    const PackedState before = s;
    __m128i w[4];
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(message) + i), swap_bytes);
    }
    all_rounds(s, w, std::make_integer_sequence<int, 16>{});
    s.abef = _mm_add_epi32(s.abef, before.abef);
    s.cdgh = _mm_add_epi32(s.cdgh, before.cdgh);
  }
  unpack(s, state);
}

bool sha256_ni_supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_SSSE3) == 0 || (c & bit_SSE4_1) == 0) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & bit_SHA) != 0;
}

#else

void sha256_compress_ni(Sha256State& state, const std::uint8_t* message, std::size_t num_blocks) {
  sha256_compress_portable(state, message, num_blocks);
}

bool sha256_ni_supported() { return false; }

#endif

}  // namespace kvblocks
