// The open files of an SSD tier.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flexkv {

class SsdFileSet {
 public:
  // Opens existing files for reading and writing, past the page cache where each file's system agrees and `direct` asks
  // for it. Throws std::system_error, naming the file, when one cannot be opened or has fewer than its `min_bytes`.
  SsdFileSet(const std::vector<std::string>& paths, const std::vector<std::uint64_t>& min_bytes, bool direct);
  ~SsdFileSet();
  SsdFileSet(const SsdFileSet&) = delete;
  SsdFileSet& operator=(const SsdFileSet&) = delete;

  const std::vector<int>& fds() const { return fds_; }
  // Files that go through the page cache although direct was asked for, and why.
  const std::vector<std::string>& refusals() const { return refusals_; }

  // Returns when all that was written would survive a loss of power. Throws std::system_error.
  void sync() const;

 private:
  void open_file(const std::string& path, std::uint64_t min_bytes, bool direct);
  void close_all();

  std::vector<int> fds_;
  std::vector<std::string> paths_, refusals_;
};

}  // namespace flexkv
