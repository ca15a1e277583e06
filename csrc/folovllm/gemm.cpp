#include "gemm.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include "cpu_features.h"
#include "fused_ops.h"
#include "thread_pool.h"

namespace folovllm {
namespace {

// More rows than this are taken in turns, which bounds the memory for prepared activations; weights are read again
// each turn, at a small part of the time that so many rows take.
constexpr std::int64_t kMaxRows = 1024;
// Weights per piece of work: long enough to stream and to be worth handing out, short enough to share out evenly.
constexpr std::int64_t kPieceBytes = 512 << 10;
constexpr std::int64_t kPiecesPerThread = 8;
// Below this a piece costs less than waking a thread for it.
constexpr std::int64_t kMinPieceBytes = 32 << 10;
// Activations per piece, which stay in a second level cache while its weights pass; but rows enough for the weights.
constexpr std::int64_t kActivationBytes = 1536 << 10;
constexpr std::int64_t kMinRows = 64;
// Rows and panels that kernels take together.
constexpr std::int64_t kRowStep = 32;
constexpr std::int64_t kPanelStep = 4;
// Rows that are prepared together.
constexpr std::int64_t kRowsAtOnce = 16;
// From so many rows for each thread on, every thread has rows of its own: it reads all weights, but with so many rows
// their products take longer than that, and no thread waits for another's rows.
constexpr std::int64_t kMinOwnedRows = 192;

// What a thread keeps at most of gates and ups before it makes outputs of them: in its second level cache.
constexpr std::int64_t kGatedBytes = 256 << 10;

// Memory that a thread keeps from call to call.
enum class Use { kPrepared, kGated };

template <Use kUse>
std::byte* scratch(std::int64_t num_bytes) {
  thread_local std::unique_ptr<HugeBuffer> buffer;
  if (buffer == nullptr || static_cast<std::int64_t>(buffer->size()) < num_bytes) {
    buffer.reset();
    buffer = std::make_unique<HugeBuffer>(static_cast<std::size_t>(num_bytes));
  }
  return buffer->data();
}

// Rows of each piece, whose number is a multiple of `multiple`.
std::int64_t rows_per_piece(const Gemm& gemm, const GemmKernel& kernel, std::int64_t multiple) {
  const std::int64_t row_bytes = gemm.in_features * static_cast<std::int64_t>(size_of(gemm.dtype));
  const std::int64_t most = std::min(std::max(kActivationBytes / row_bytes, kMinRows), kernel.rows_per_piece);
  // Pieces of one size, rounded up to the kernels' step.
  const std::int64_t least_pieces = (gemm.num_rows + most - 1) / most;
  const std::int64_t num_pieces = (least_pieces + multiple - 1) / multiple * multiple;
  return ((gemm.num_rows + num_pieces - 1) / num_pieces + kRowStep - 1) / kRowStep * kRowStep;
}

std::int64_t panels_per_piece(const Gemm& gemm, std::int64_t num_panels, std::int64_t num_row_pieces) {
  const std::int64_t by_size = kPieceBytes / gemm.panel_bytes;
  const std::int64_t by_share = num_panels * num_row_pieces / (kPiecesPerThread * num_threads());
  // Up to 16 rows take about the time of their weights, more take longer.
  const std::int64_t least = kMinPieceBytes / gemm.panel_bytes / ((gemm.num_rows + 15) / 16);
  const std::int64_t wanted = std::max<std::int64_t>({std::min(by_size, by_share), least, 1});
  return (wanted + kPanelStep - 1) / kPanelStep * kPanelStep;
}

// A product, or a gated one, over some of its rows and panels. A gated product has as many panels as its gate.
class Product {
 public:
  Product(const Gemm& gemm, const GemmKernel& kernel, bool is_gated)
      : gemm(gemm),
        kernel(kernel),
        num_panels((gemm.out_features + kPanelWidth - 1) / kPanelWidth / (is_gated ? 2 : 1)),
        is_gated_(is_gated) {}

  void prepare(Range rows, std::byte* prepared) const { kernel.prepare(gemm, rows, prepared); }

  void compute(const std::byte* prepared, Range rows, Range panels) const {
    if (!is_gated_) return kernel.compute(gemm, prepared, rows, panels);
    const std::int64_t panel_bytes = (rows.end - rows.begin) * 2 * kPanelWidth * size();
    const std::int64_t step = std::max(kGatedBytes / panel_bytes / kPanelStep * kPanelStep, kPanelStep);
    for (std::int64_t panel = panels.begin; panel < panels.end; panel += step) {
      compute_gated(prepared, rows, {panel, std::min(panel + step, panels.end)});
    }
  }

  const Gemm& gemm;
  const GemmKernel& kernel;
  const std::int64_t num_panels;

 private:
  std::int64_t size() const { return static_cast<std::int64_t>(size_of(gemm.dtype)); }

  // Gates and ups of these panels side by side, then outputs.
  void compute_gated(const std::byte* prepared, Range rows, Range panels) const {
    const std::int64_t num_rows = rows.end - rows.begin;
    const std::int64_t width = (panels.end - panels.begin) * kPanelWidth;
    std::byte* const sums = scratch<Use::kGated>(num_rows * 2 * width * size());
    Gemm before = gemm;
    before.num_rows = rows.begin;
    if (prepared != nullptr) prepared += kernel.prepared_bytes(before);
    for (int part = 0; part < 2; ++part) {
      const std::int64_t panel = panels.begin + part * num_panels;
      Gemm some = gemm;
      some.weights += panel * gemm.panel_bytes;
      if (some.bias != nullptr) some.bias += panel * kPanelWidth;
      some.x += rows.begin * gemm.x_stride * size();
      some.num_rows = num_rows;
      some.out = sums + part * width * size();
      some.out_stride = 2 * width;
      some.out_features = width;
      kernel.compute(some, prepared, {0, num_rows}, {0, panels.end - panels.begin});
    }
    std::byte* const out = gemm.out + (rows.begin * gemm.out_stride + panels.begin * kPanelWidth) * size();
    silu_mul_alone({sums, out, gemm.out_stride, num_rows, width}, gemm.dtype);
  }

  const bool is_gated_;
};

// All threads prepare the rows, then all share out the panels.
void run_shared(const Product& product, std::int64_t piece_rows) {
  const Gemm& gemm = product.gemm;
  std::byte* prepared = nullptr;
  if (const std::int64_t num_bytes = product.kernel.prepared_bytes(gemm); num_bytes > 0) {
    prepared = scratch<Use::kPrepared>(num_bytes);
    const std::int64_t num_tiles = (gemm.num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
    const std::int64_t grain = kMinPieceBytes / (num_bytes / gemm.num_rows * kRowsAtOnce) + 1;
    parallel_for(num_tiles, grain, [&](std::int64_t begin, std::int64_t end) {
      product.prepare({begin * kRowsAtOnce, std::min(end * kRowsAtOnce, gemm.num_rows)}, prepared);
    });
  }
  const std::int64_t num_row_pieces = (gemm.num_rows + piece_rows - 1) / piece_rows;
  const std::int64_t step = panels_per_piece(gemm, product.num_panels, num_row_pieces);
  const std::int64_t num_panel_pieces = (product.num_panels + step - 1) / step;
  parallel_for(num_row_pieces * num_panel_pieces, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const std::int64_t row = piece / num_panel_pieces * piece_rows;
      const std::int64_t panel = piece % num_panel_pieces * step;
      product.compute(prepared, {row, std::min(row + piece_rows, gemm.num_rows)},
                      {panel, std::min(panel + step, product.num_panels)});
    }
  });
}

// Rows that one thread prepares and multiplies, so that they stay in its own cache. A thread without rows left helps.
struct OwnedRows {
  std::atomic<bool> is_taken{false};
  std::atomic<bool> is_prepared{false};
  std::atomic<std::int64_t> next_panel{0};

  // The next panels: a quarter of what is left, so that long runs come first and helpers find short ones at the end.
  Range take(std::int64_t num_panels) {
    std::int64_t begin = next_panel.load(std::memory_order_relaxed);
    while (begin < num_panels) {
      const std::int64_t wanted = (num_panels - begin) / 4 / kPanelStep * kPanelStep;
      const std::int64_t end = std::min(begin + std::max(wanted, kPanelStep), num_panels);
      if (next_panel.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
    }
    return {num_panels, num_panels};
  }
};

void run_owned(const Product& product, std::int64_t piece_rows) {
  const std::int64_t num_rows = product.gemm.num_rows;
  std::byte* const prepared = scratch<Use::kPrepared>(product.kernel.prepared_bytes(product.gemm));
  const std::int64_t num_pieces = (num_rows + piece_rows - 1) / piece_rows;
  std::array<OwnedRows, kMaxRows / kRowStep> pieces;
  const auto rows_of = [&](std::int64_t piece) {
    return Range{piece * piece_rows, std::min((piece + 1) * piece_rows, num_rows)};
  };
  const auto multiply = [&](std::int64_t piece) {
    OwnedRows& owned = pieces[static_cast<std::size_t>(piece)];
    while (true) {
      const Range panels = owned.take(product.num_panels);
      if (panels.begin == panels.end) return;
      product.compute(prepared, rows_of(piece), panels);
    }
  };
  auto work = [&](int thread, int threads) {
    const std::int64_t first = num_pieces * thread / threads;
    for (std::int64_t i = 0; i < num_pieces; ++i) {
      const std::int64_t piece = (first + i) % num_pieces;
      OwnedRows& owned = pieces[static_cast<std::size_t>(piece)];
      if (owned.is_taken.exchange(true, std::memory_order_relaxed)) continue;
      product.prepare(rows_of(piece), prepared);
      owned.is_prepared.store(true, std::memory_order_release);
      multiply(piece);
    }
    for (std::int64_t piece = 0; piece < num_pieces; ++piece) {
      if (pieces[static_cast<std::size_t>(piece)].is_prepared.load(std::memory_order_acquire)) multiply(piece);
    }
  };
  run_together(work);
}

void run_rows(const Product& product) {
  const std::int64_t threads = num_threads();
  const std::int64_t owned_rows = rows_per_piece(product.gemm, product.kernel, threads);
  if (threads > 1 && owned_rows >= kMinOwnedRows && product.kernel.prepared_bytes(product.gemm) > 0) {
    run_owned(product, owned_rows);
  } else {
    run_shared(product, rows_per_piece(product.gemm, product.kernel, 1));
  }
}

void run(const Gemm& gemm, const GemmKernel& kernel, bool is_gated) {
  const std::int64_t x_row_bytes = gemm.x_stride * static_cast<std::int64_t>(size_of(gemm.dtype));
  const std::int64_t out_row_bytes = gemm.out_stride * static_cast<std::int64_t>(size_of(gemm.out_dtype));
  for (std::int64_t row = 0; row < gemm.num_rows; row += kMaxRows) {
    Gemm part = gemm;
    part.num_rows = std::min(kMaxRows, gemm.num_rows - row);
    part.x += row * x_row_bytes;
    part.out += row * out_row_bytes;
    run_rows(Product(part, kernel, is_gated));
  }
}

}  // namespace

// Every kernel keeps one chain per output for any number of rows, and each reads the weights of a single row as fast as
// memory gives them: there is nothing to choose by the number of rows, and invariance costs nothing.
const GemmKernel& choose_gemm(DType dtype, std::int64_t /*num_rows*/, bool /*batch_invariant*/) {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (dtype == DType::kBFloat16 && isa >= Isa::kAmx) return gemm_amx();
  if (dtype == DType::kBFloat16 && isa >= Isa::kAvx512Bf16) return gemm_avx512_bf16();
  if (isa >= Isa::kAvx512) return gemm_avx512(dtype);
  if (isa >= Isa::kAvx2) return gemm_avx2(dtype);
#endif
  return gemm_portable(dtype);
}

void run_gemm(const Gemm& gemm, const GemmKernel& kernel) { run(gemm, kernel, false); }

void run_gated_gemm(const Gemm& gemm, const GemmKernel& kernel) { run(gemm, kernel, true); }

}  // namespace folovllm
