// A reader-writer lock under which a steady stream of readers cannot keep a writer waiting forever, as the platform's
// own may: whoever comes after a waiting writer queues behind it.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace kvrouter {

class FairSharedMutex {
 public:
  void lock() {
    const std::lock_guard gate(gate_);
    mutex_.lock();
  }
  void unlock() { mutex_.unlock(); }
  void lock_shared() {
    const std::lock_guard gate(gate_);
    mutex_.lock_shared();
  }
  void unlock_shared() { mutex_.unlock_shared(); }

 private:
  std::mutex gate_;
  std::shared_mutex mutex_;
};

}  // namespace kvrouter
