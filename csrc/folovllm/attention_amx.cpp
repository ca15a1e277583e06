// bfloat16 attention with matrix tiles (AMX). A tile is 16 rows of 64 bytes:
//
//   0..3  sums, 16 x 16 floats: {first, second 16 keys (or d)} x {first, second strip of rows}
//   4, 5  16 keys (or d) x 32 d (or keys)
//   6, 7  16 pairs of d (or keys) x 16 rows
#include "attention_vec_avx512.h"

#include "amx_tiles.h"
#include "attention_chunk_bf16.h"

namespace folovllm::attention {
namespace {

constexpr std::int64_t kRowBytes = kPair * sizeof(float);

void store_sums(float* to) {
  store_tile<0>(to, kRowBytes);
  store_tile<1>(to + 16, kRowBytes);
  store_tile<2>(to + 16 * kPair, kRowBytes);
  store_tile<3>(to + 16 * kPair + 16, kRowBytes);
}

struct TileEngine {
  // Belongs to the thread, and other kernels have theirs.
  const TileConfig config;

  // v[key / 32][d][32 keys]: a tile is 16 d x 32 keys.
  void pack_v(const Shape& shape, const KeyRows<BFloat16>* rows, int num_keys, const ChunkScratch& scratch) const {
    for (int key = 0; key < num_keys; key += 32) {
      for (int d = 0; d < scratch.padded; d += 16) {
        __m512 x[16];
        for (int i = 0; i < 16; ++i) {
          x[i] = _mm512_castsi512_ps(load_key_pair(shape, rows, num_keys, key / 2 + i, d));
        }
        Vec::transpose(x);
        BFloat16* const tile = scratch.v + key * scratch.padded + d * 32;
        for (int i = 0; i < 16; ++i) _mm512_store_ps(tile + i * 32, x[i]);
      }
    }
  }

  template <typename Between>
  void score(const KeyBlock& block, int pair, int key, Between&& between) const {
    const int padded = block.scratch.padded;
    const std::int64_t key_bytes = block.groups.stride * std::int64_t{sizeof(BFloat16)};
    const BFloat16* const first = block.groups.k[key / 16];
    const BFloat16* const second = block.groups.k[key / 16 + 1];
    const std::uint32_t* const q = block.scratch.q(pair);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int d = 0; d < padded; d += 32) {
      load_tile<4>(first + d, key_bytes);
      load_tile<6>(q + d / 2 * kPair, kRowBytes);
      multiply_tiles<0, 4, 6>();
      load_tile<7>(q + d / 2 * kPair + 16, kRowBytes);
      multiply_tiles<1, 4, 7>();
      load_tile<5>(second + d, key_bytes);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
      between(d / 32, padded / 32);
    }
    store_sums(block.scratch.score(key));
  }

  void add_values(const ChunkScratch& scratch, int pair, int begin, int end) const {
    if (begin == end) return;
    for (int d = 0; d < scratch.padded; d += 32) {
      float* const acc = scratch.acc(pair) + d * kPair;
      load_tile<0>(acc, kRowBytes);
      load_tile<1>(acc + 16, kRowBytes);
      load_tile<2>(acc + 16 * kPair, kRowBytes);
      load_tile<3>(acc + 16 * kPair + 16, kRowBytes);
      for (int key = begin; key < end; key += 32) {
        const BFloat16* const v = scratch.v + key * scratch.padded + d * 32;
        const std::uint32_t* const weight = scratch.weight(key);
        load_tile<4>(v, 64);
        load_tile<6>(weight, kRowBytes);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(weight + 16, kRowBytes);
        multiply_tiles<1, 4, 7>();
        load_tile<5>(v + 16 * 32, 64);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
      store_sums(acc);
    }
  }
};

}  // namespace

const Kernels& amx_kernels() {
  static constexpr Kernels kKernels = bf16_kernels<TileEngine>();
  return kKernels;
}

}  // namespace folovllm::attention
