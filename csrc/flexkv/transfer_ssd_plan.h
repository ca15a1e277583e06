// Where the blocks of an SSD tier lie, and how a batch of them is cut into reads or writes.
//
// F files, one per directory. Slot s is in file s % F, at the offset s / F * slot_bytes:
//
//     file 0 | slot 0       | slot F       | slot 2F | ...      slot | block: block_bytes | padding |
//     file 1 | slot 1       | slot F + 1   | ...                     |------- slot_bytes, a multiple of 4096
//
// A piece is what one request moves: a part of one block, or several whole blocks that are neighbours on both sides.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flexkv {

// Direct I/O: offsets, lengths and addresses are multiples of this. Enough for every disk in use.
constexpr std::uint32_t kSectorBytes = 4096;

struct SsdLayout {
  std::uint64_t block_bytes = 0;
  std::int64_t num_slots = 0;
  std::uint32_t num_files = 0;

  std::uint64_t slot_bytes() const { return (block_bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes; }
  std::uint32_t file_of(std::int64_t slot) const { return static_cast<std::uint32_t>(slot % num_files); }
  std::uint64_t offset_of(std::int64_t slot) const {
    return static_cast<std::uint64_t>(slot / num_files) * slot_bytes();
  }
  // Bytes that file must have.
  std::uint64_t file_bytes(std::uint32_t file) const {
    return static_cast<std::uint64_t>((num_slots + num_files - 1 - file) / num_files) * slot_bytes();
  }
};

struct Piece {
  std::uint32_t first;       // of `SsdPlan::order`
  std::uint32_t num_blocks;  // whole ones, or 1
  std::uint32_t file;
  std::uint32_t bytes;
  std::uint64_t in_slot;  // bytes from the first block's beginning
};

struct SsdPlan {
  // Indices into the batch, sorted by place on disk. Blocks of a piece are neighbours here.
  std::vector<std::uint32_t> order;
  std::vector<Piece> pieces;              // files take turns
  std::vector<std::uint32_t> num_pieces;  // by index into the batch: pieces this block is part of
};

struct PlanOptions {
  std::uint32_t io_bytes;  // most bytes of a piece, a multiple of kSectorBytes
  // Bytes between neighbours in memory when requests use it directly; 0 when they go through bounce buffers, where any
  // blocks may become neighbours.
  std::uint64_t block_stride;
};

// REQUIRES: slots in range and as many as pool_blocks.
SsdPlan make_plan(const SsdLayout& layout, std::span<const std::int64_t> slots,
                  std::span<const std::int64_t> pool_blocks, const PlanOptions& options);

// The same piece, block by block: after an error, to find out whose it was.
std::vector<Piece> split_by_block(const Piece& piece, std::uint64_t slot_bytes);

}  // namespace flexkv
