#include "fused_ops.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "fused_table.h"
#include "thread_pool.h"

namespace folovllm {
namespace {

// Elements below which the caller works alone: 10 to 20 us of work, as a worker that sleeps takes that long to wake. A
// piece for a thread is half of that.
constexpr std::int64_t kElementsAlone = 32768;
constexpr std::int64_t kElementsOfPiece = 16384;

const FusedKernels& kernels(DType dtype) {
  const auto index = static_cast<std::size_t>(dtype);
#if defined(__x86_64__)
  if (current_isa() >= Isa::kAvx512) return kFusedAvx512.of[index];
  if (current_isa() >= Isa::kAvx2) return kFusedAvx2.of[index];
#endif
  return kFusedPortable.of[index];
}

template <typename F>
void for_rows(std::int64_t num_rows, std::int64_t row_elements, F&& body) {
  if (num_rows <= 0 || row_elements <= 0) return;
  if (num_rows * row_elements <= kElementsAlone) return body(std::int64_t{0}, num_rows);
  parallel_for(num_rows, std::max<std::int64_t>(1, kElementsOfPiece / row_elements), body);
}

}  // namespace

void rms_norm(const RmsNorm& op, DType dtype) {
  const auto kernel = kernels(dtype).rms_norm;
  for_rows(op.num_rows, op.size, [&](std::int64_t begin, std::int64_t end) { kernel(op, begin, end); });
}

void add_rms_norm(const AddRmsNorm& op, DType dtype) {
  const auto kernel = kernels(dtype).add_rms_norm;
  for_rows(op.num_rows, op.size, [&](std::int64_t begin, std::int64_t end) { kernel(op, begin, end); });
}

void silu_mul(const SiluMul& op, DType dtype) {
  const auto kernel = kernels(dtype).silu_mul;
  for_rows(op.num_rows, op.size, [&](std::int64_t begin, std::int64_t end) { kernel(op, begin, end); });
}

void silu_mul_alone(const SiluMul& op, DType dtype) { kernels(dtype).silu_mul(op, 0, op.num_rows); }

void embed(const Embed& op, DType table_dtype, DType dtype) {
  const auto kernel = kernels(dtype).embed[static_cast<std::size_t>(table_dtype)];
  for_rows(op.num_rows, op.size, [&](std::int64_t begin, std::int64_t end) { kernel(op, begin, end); });
}

void QKVLayout::check() const {
  const auto refuse = [](const char* name, std::int64_t value, const char* allowed) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + " is not allowed; it must be " +
                                allowed);
  };
  if (num_heads < 1) refuse("num_heads", num_heads, "at least 1");
  if (num_kv_heads < 1) refuse("num_kv_heads", num_kv_heads, "at least 1");
  if (block_size < 1) refuse("block_size", block_size, "at least 1");
  if (head_size < 2 || head_size % 2 != 0) refuse("head_size", head_size, "even and at least 2");
  if (cos_sin == nullptr) throw std::invalid_argument("cos_sin is missing");
}

void rotate_and_write(const QKVLayout& layout, const RotateAndWrite& op) {
  const auto kernel = kernels(layout.dtype).rotate_and_write;
  const std::int64_t elements = (layout.num_heads + 2 * layout.num_kv_heads) * layout.head_size;
  for_rows(op.num_tokens, elements, [&](std::int64_t begin, std::int64_t end) { kernel(layout, op, begin, end); });
}

}  // namespace folovllm
