// XXH3-64 compiled for AVX2; only called where is_supported() says so.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Nothing but xxhash.h may follow: an inline function of another header would be compiled for AVX2 too, and the
// linker might take that copy for the whole program.
#pragma GCC push_options
#pragma GCC target("avx2")
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#include <xxhash.h>

namespace flexkv::detail {

std::uint64_t checksum_avx2(const void* data, std::size_t size) { return XXH3_64bits(data, size); }

}  // namespace flexkv::detail

#pragma GCC pop_options

#endif
