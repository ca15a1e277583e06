#include "transfer_ssd_plan.h"

#include <algorithm>
#include <numeric>

namespace flexkv {
namespace {

// Cuts one block into equal parts, none larger than io_bytes.
void cut_block(const SsdLayout& layout, std::uint32_t at, std::uint32_t file, std::uint32_t io_bytes,
               std::vector<Piece>& out) {
  const std::uint64_t total = layout.slot_bytes();
  const std::uint64_t parts = (total + io_bytes - 1) / io_bytes;
  const std::uint64_t part = (total / kSectorBytes + parts - 1) / parts * kSectorBytes;
  for (std::uint64_t begin = 0; begin < total; begin += part) {
    out.push_back({at, 1, file, static_cast<std::uint32_t>(std::min(part, total - begin)), begin});
  }
}

// Takes one piece of each file in turn, so that all disks have work.
std::vector<Piece> take_turns(const std::vector<std::vector<Piece>>& by_file) {
  std::vector<Piece> pieces;
  std::size_t longest = 0;
  for (const auto& list : by_file) longest = std::max(longest, list.size());
  for (std::size_t i = 0; i < longest; ++i) {
    for (const auto& list : by_file) {
      if (i < list.size()) pieces.push_back(list[i]);
    }
  }
  return pieces;
}

}  // namespace

SsdPlan make_plan(const SsdLayout& layout, std::span<const std::int64_t> slots,
                  std::span<const std::int64_t> pool_blocks, const PlanOptions& options) {
  SsdPlan plan;
  const auto count = static_cast<std::uint32_t>(slots.size());
  plan.order.resize(count);
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::sort(plan.order.begin(), plan.order.end(), [&](std::uint32_t a, std::uint32_t b) {
    const std::uint32_t file_a = layout.file_of(slots[a]), file_b = layout.file_of(slots[b]);
    return file_a != file_b ? file_a < file_b : slots[a] < slots[b];
  });

  const std::uint64_t slot_bytes = layout.slot_bytes();
  const bool may_join = options.block_stride == 0 || options.block_stride == slot_bytes;
  const auto are_neighbours = [&](std::uint32_t a, std::uint32_t b) {
    return slots[b] == slots[a] + layout.num_files &&
           (options.block_stride == 0 || pool_blocks[b] == pool_blocks[a] + 1);
  };
  std::vector<std::vector<Piece>> by_file(layout.num_files);
  plan.num_pieces.assign(count, 1);
  for (std::uint32_t at = 0; at < count;) {
    const std::uint32_t file = layout.file_of(slots[plan.order[at]]);
    if (slot_bytes > options.io_bytes) {
      const std::size_t before = by_file[file].size();
      cut_block(layout, at, file, options.io_bytes, by_file[file]);
      plan.num_pieces[plan.order[at++]] = static_cast<std::uint32_t>(by_file[file].size() - before);
      continue;
    }
    std::uint32_t end = at + 1;
    while (may_join && end < count && (end - at + 1) * slot_bytes <= options.io_bytes &&
           are_neighbours(plan.order[end - 1], plan.order[end])) {
      ++end;
    }
    by_file[file].push_back({at, end - at, file, static_cast<std::uint32_t>((end - at) * slot_bytes), 0});
    at = end;
  }
  plan.pieces = take_turns(by_file);
  return plan;
}

std::vector<Piece> split_by_block(const Piece& piece, std::uint64_t slot_bytes) {
  std::vector<Piece> parts;
  for (std::uint32_t i = 0; i < piece.num_blocks; ++i) {
    parts.push_back({piece.first + i, 1, piece.file, static_cast<std::uint32_t>(slot_bytes), 0});
  }
  return parts;
}

}  // namespace flexkv
