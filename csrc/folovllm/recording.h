// A forward pass remembered as the kernels it called, so that later passes need no Python between them.
//
//   record: Python runs the model; each binding computes, and adds its call --> [embed, norm, linear, ...]
//   run:    the calls one after the other, with the sizes of the new step in place of those of the recorded one
//
// It holds for every step whose tensors lie at the same addresses: weights, the caches, persistent inputs and workspaces.
// Who records answers for that, and for keeping them alive.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace folovllm {

// What differs from step to step; all else is in the tensors.
struct StepSizes {
  std::int64_t num_tokens;
  std::int64_t num_reqs;
  std::int64_t block_table_stride;
};

// Used by one thread.
class Recording {
 public:
  using Call = std::function<void(const StepSizes&)>;

  ~Recording();

  // From here on the calls of this thread are added, until `end`. Starts anew. Throws std::logic_error if this thread
  // records already.
  void begin(const StepSizes& sizes);

  // Stop adding. Returns whether the calls stand for the whole pass; else there are none afterwards.
  bool end();

  // The recording of this thread, or null.
  static Recording* current();

  void add(Call call) { calls_.push_back(std::move(call)); }
  // The pass did what cannot be repeated.
  void spoil() { is_whole_ = false; }

  // REQUIRES: `end` returned true.
  void run(const StepSizes& sizes) const;

  const StepSizes& recorded() const { return sizes_; }
  std::int64_t num_calls() const { return static_cast<std::int64_t>(calls_.size()); }

 private:
  StepSizes sizes_{};
  bool is_whole_ = false;
  std::vector<Call> calls_;
};

// Compute `call(num_rows)`, an operation on the rows of the step's tokens, and add it to the recording, if there is one.
template <typename F>
void perform_on_tokens(std::int64_t num_rows, F&& call) {
  call(num_rows);
  Recording* const recording = Recording::current();
  if (recording == nullptr) return;
  if (num_rows != recording->recorded().num_tokens) return recording->spoil();
  recording->add([call = std::forward<F>(call)](const StepSizes& sizes) { call(sizes.num_tokens); });
}

}  // namespace folovllm
