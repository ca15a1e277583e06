#include "recording.h"

#include <stdexcept>

namespace folovllm {
namespace {

thread_local Recording* current_recording = nullptr;

}  // namespace

Recording* Recording::current() { return current_recording; }

Recording::~Recording() {
  if (current_recording == this) current_recording = nullptr;
}

void Recording::begin(const StepSizes& sizes) {
  if (current_recording != nullptr) throw std::logic_error("this thread is recording already");
  sizes_ = sizes;
  is_whole_ = true;
  calls_.clear();
  current_recording = this;
}

bool Recording::end() {
  if (current_recording == this) current_recording = nullptr;
  if (!is_whole_) calls_.clear();
  calls_.shrink_to_fit();
  return is_whole_;
}

void Recording::run(const StepSizes& sizes) const {
  for (const Call& call : calls_) call(sizes);
}

}  // namespace folovllm
