#include "local/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace reducer::local {
namespace {

Status failed(const char* what, int error) {
  const Code code =
      error == ENOMEM || error == ENOSPC || error == EMFILE || error == ENFILE || error == EFBIG
          ? Code::kResourceExhausted
          : Code::kUnavailable;
  return Status(code, std::string(what) + " failed: " + std::strerror(error));
}

/// One mapping of a file for all ranks of a process (tests have them as threads): they then see
/// each other's memory at one address, and so does ThreadSanitizer.
Result<std::shared_ptr<std::byte>> mapOnce(int fd, std::size_t nbytes) {
  struct stat file {};
  if (fstat(fd, &file) != 0) return failed("fstat", errno);
  if (static_cast<std::size_t>(file.st_size) != nbytes) {
    return Status(Code::kInvalidArgument, "the shared memory has " + std::to_string(file.st_size) +
                                              " bytes instead of " + std::to_string(nbytes));
  }
  static std::mutex& mutex = *new std::mutex;
  static auto& mapped = *new std::map<std::pair<dev_t, ino_t>, std::weak_ptr<std::byte>>;
  const std::lock_guard lock(mutex);
  std::weak_ptr<std::byte>& known = mapped[{file.st_dev, file.st_ino}];
  if (auto data = known.lock()) return data;
  std::erase_if(mapped, [](const auto& entry) { return entry.second.expired(); });
  void* const data =
      mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (data == MAP_FAILED) return failed("mmap of shared memory", errno);
  std::shared_ptr<std::byte> memory(static_cast<std::byte*>(data),
                                    [nbytes](std::byte* bytes) { munmap(bytes, nbytes); });
  mapped[{file.st_dev, file.st_ino}] = memory;
  return memory;
}

bool lockPlace(int fd, int command, std::size_t place, struct flock& lock) {
  lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(place);
  lock.l_len = 1;
  return fcntl(fd, command, &lock) == 0;
}

}  // namespace

Result<std::unique_ptr<Segment>> Segment::create(std::size_t nbytes) {
  OwnFd fd(memfd_create("reducer", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return failed("memfd_create", errno);
  if (fchmod(fd.get(), S_IRUSR | S_IWUSR) != 0) return failed("fchmod of shared memory", errno);
  if (ftruncate(fd.get(), static_cast<off_t>(nbytes)) != 0) {
    return failed("ftruncate of shared memory", errno);
  }
  if (fallocate(fd.get(), 0, 0, static_cast<off_t>(nbytes)) != 0) {
    return failed(("allocating " + std::to_string(nbytes) + " bytes of shared memory").c_str(),
                  errno);
  }
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return failed("sealing shared memory", errno);
  }
  auto segment = map(fd.get(), nbytes);
  if (segment.ok()) segment.value()->shared_ = std::move(fd);
  return segment;
}

Result<std::unique_ptr<Segment>> Segment::open(int fd, std::size_t nbytes) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Status(Code::kInvalidArgument, "what was offered as shared memory is not sealed");
  }
  return map(fd, nbytes);
}

Result<std::unique_ptr<Segment>> Segment::map(int fd, std::size_t nbytes) {
  std::unique_ptr<Segment> segment(new Segment);
  // A description of this object's own, since locks belong to descriptions. Not the one that is
  // mapped or handed over, which others (a forked child's mapping, too) may hold on to.
  segment->lock_ =
      OwnFd(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR | O_CLOEXEC));
  if (!segment->lock_) return failed("opening shared memory again through /proc/self/fd", errno);
  auto data = mapOnce(fd, nbytes);
  if (!data.ok()) return data.status();
  segment->data_ = std::move(data).value();
  segment->nbytes_ = nbytes;
  return segment;
}

bool Segment::occupy(std::size_t place) const {
  struct flock lock;
  return lockPlace(lock_.get(), F_OFD_SETLK, place, lock);
}

bool Segment::occupied(std::size_t place) const {
  struct flock lock;
  // If the kernel cannot say, nobody is declared dead.
  return !lockPlace(lock_.get(), F_OFD_GETLK, place, lock) || lock.l_type != F_UNLCK;
}

}  // namespace reducer::local
