#include "ssd_file_set.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>

#include "transfer_ssd_plan.h"

namespace flexkv {
namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Some file systems accept O_DIRECT and refuse the first read. Returns 0 or an errno.
int try_direct_read(int fd) {
  const std::unique_ptr<void, decltype(&std::free)> page(std::aligned_alloc(kSectorBytes, kSectorBytes), &std::free);
  return pread(fd, page.get(), kSectorBytes, 0) < 0 ? errno : 0;
}

}  // namespace

SsdFileSet::SsdFileSet(const std::vector<std::string>& paths, const std::vector<std::uint64_t>& min_bytes, bool direct)
    : paths_(paths) {
  try {
    for (std::size_t i = 0; i < paths.size(); ++i) open_file(paths[i], min_bytes[i], direct);
  } catch (...) {
    close_all();
    throw;
  }
}

SsdFileSet::~SsdFileSet() { close_all(); }

void SsdFileSet::close_all() {
  for (const int fd : fds_) close(fd);
}

void SsdFileSet::open_file(const std::string& path, std::uint64_t min_bytes, bool direct) {
  int fd = direct ? open(path.c_str(), O_RDWR | O_CLOEXEC | O_DIRECT) : -1;
  int refused = direct && fd < 0 ? errno : 0;
  if (fd >= 0 && (refused = try_direct_read(fd)) == EINVAL) close(fd);
  if (!direct || refused == EINVAL) {
    fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (direct) refusals_.push_back("no O_DIRECT for " + path + ": its file system goes through the page cache");
    refused = fd < 0 ? errno : 0;
  }
  if (fd >= 0) fds_.push_back(fd);
  if (refused != 0) fail(refused, "cannot open " + path);
  struct stat status {};
  if (fstat(fd, &status) != 0) fail(errno, "cannot look at " + path);
  if (static_cast<std::uint64_t>(status.st_size) < min_bytes) {
    fail(EINVAL, path + " has " + std::to_string(status.st_size) + " bytes, its slots need " +
                     std::to_string(min_bytes));
  }
}

void SsdFileSet::sync() const {
  for (std::size_t i = 0; i < fds_.size(); ++i) {
    while (fdatasync(fds_[i]) != 0) {
      if (errno != EINTR) fail(errno, "cannot sync " + paths_[i]);
    }
  }
}

}  // namespace flexkv
