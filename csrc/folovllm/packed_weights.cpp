#include "packed_weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "thread_pool.h"

namespace folovllm {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

// Elements from one k to the next of the same row, in a panel, are not alike in the two layouts: k and k + 1 of
// bfloat16 are neighbours.
template <typename T>
std::int64_t panel_offset(std::int64_t lane, std::int64_t k) {
  if constexpr (std::is_same_v<T, BFloat16>) return (k / 2 * kPanelWidth + lane) * 2 + k % 2;
  return k * kPanelWidth + lane;
}

template <typename T, typename Source>
T converted(Source value) {
  if constexpr (std::is_same_v<T, Source>) return value;
  return from_float<T>(to_float(value));
}

// Lanes [0, num_lanes) of a panel that starts at `panel`, from rows of `source`.
template <typename T, typename Source>
void fill_lanes(T* panel, std::int64_t num_lanes, const Source* source, std::int64_t row_stride,
                std::int64_t in_features) {
  for (std::int64_t k = 0; k + 1 < in_features; k += 2) {
    T* const first = panel + panel_offset<T>(0, k);
    T* const second = panel + panel_offset<T>(0, k + 1);
    constexpr std::int64_t kStep = std::is_same_v<T, BFloat16> ? 2 : 1;
    for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
      first[lane * kStep] = converted<T>(source[lane * row_stride + k]);
      second[lane * kStep] = converted<T>(source[lane * row_stride + k + 1]);
    }
  }
  if (in_features % 2 == 0) return;
  const std::int64_t k = in_features - 1;
  for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
    panel[panel_offset<T>(lane, k)] = converted<T>(source[lane * row_stride + k]);
  }
}

std::int64_t bytes_of_panel(std::int64_t in_features, DType dtype) {
  const std::int64_t step = dtype == DType::kBFloat16 ? kTileDepth : 1;
  return (in_features + step - 1) / step * step * kPanelWidth * static_cast<std::int64_t>(size_of(dtype));
}

std::int64_t checked_size(std::int64_t size, const char* name) {
  if (size >= 1) return size;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(size) + " is not allowed; it must be 1 or more");
}

}  // namespace

HugeBuffer::HugeBuffer(std::size_t size) : size_(round_up(size, kPage)) {
  // Huge pages begin at their multiples, so the mapping is made longer and both ends given back.
  const std::size_t reserved = size_ < kHugePage ? size_ : size_ + kHugePage;
  void* const mapped = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(mapped);
  if (reserved == size_) return;
  const std::size_t lead = round_up(reinterpret_cast<std::uintptr_t>(mapped), kHugePage) -
                           reinterpret_cast<std::uintptr_t>(mapped);
  if (lead > 0) ::munmap(data_, lead);
  data_ += lead;
  if (lead < kHugePage) ::munmap(data_ + size_, kHugePage - lead);
  ::madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without it everything works, more slowly
}

HugeBuffer::~HugeBuffer() { ::munmap(data_, size_); }

PackedWeights::PackedWeights(std::int64_t out_features, std::int64_t in_features, DType dtype)
    : out_features_(checked_size(out_features, "out_features")),
      in_features_(checked_size(in_features, "in_features")),
      dtype_(dtype),
      panel_bytes_(bytes_of_panel(in_features, dtype)),
      buffer_(static_cast<std::size_t>(num_panels() * panel_bytes_)) {}

void PackedWeights::check_rows(std::int64_t first_row, std::int64_t num_rows) const {
  if (first_row >= 0 && num_rows >= 0 && first_row <= out_features_ - num_rows) return;
  throw std::invalid_argument("rows " + std::to_string(first_row) + " to " + std::to_string(first_row + num_rows) +
                              " are not within the layer's " + std::to_string(out_features_));
}

void PackedWeights::fill(std::int64_t first_row, std::int64_t num_rows, const std::byte* source,
                         std::int64_t row_stride, DType source_dtype) {
  check_rows(first_row, num_rows);
  if (num_rows == 0) return;
  const std::int64_t first_panel = first_row / kPanelWidth;
  const std::int64_t end_panel = (first_row + num_rows + kPanelWidth - 1) / kPanelWidth;
  with_type(dtype_, [&]<typename T>(T) {
    with_type(source_dtype, [&]<typename Source>(Source) {
      const auto* const rows = reinterpret_cast<const Source*>(source);
      parallel_for(end_panel - first_panel, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t panel = first_panel + begin; panel < first_panel + end; ++panel) {
          const std::int64_t from = std::max(first_row, panel * kPanelWidth);
          const std::int64_t to = std::min(first_row + num_rows, (panel + 1) * kPanelWidth);
          T* const target = reinterpret_cast<T*>(buffer_.data() + panel * panel_bytes_);
          fill_lanes(target + panel_offset<T>(from - panel * kPanelWidth, 0), to - from,
                     rows + (from - first_row) * row_stride, row_stride, in_features_);
        }
      });
    });
  });
}

template <typename RowOf>
void PackedWeights::copy_rows(RowOf row_of, std::int64_t num_rows, std::byte* out) const {
  with_type(dtype_, [&]<typename T>(T) {
    auto* const rows = reinterpret_cast<T*>(out);
    constexpr std::int64_t kGrain = 16;
    parallel_for(num_rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t from = row_of(row);
        const auto* const panel = reinterpret_cast<const T*>(buffer_.data() + from / kPanelWidth * panel_bytes_);
        for (std::int64_t k = 0; k < in_features_; ++k) {
          rows[row * in_features_ + k] = panel[panel_offset<T>(from % kPanelWidth, k)];
        }
      }
    });
  });
}

void PackedWeights::unpack(std::int64_t first_row, std::int64_t num_rows, std::byte* out) const {
  check_rows(first_row, num_rows);
  copy_rows([first_row](std::int64_t row) { return first_row + row; }, num_rows, out);
}

void PackedWeights::gather(const std::int32_t* ids, std::int64_t num_rows, std::byte* out) const {
  copy_rows([ids](std::int64_t row) { return std::int64_t{ids[row]}; }, num_rows, out);
}

}  // namespace folovllm
