// Descriptors that a forked child must not keep.
#pragma once

namespace reducer::local {

/// Owns a descriptor, and has it closed in forked children: the lock that shows that a process
/// lives would be held on by a DataLoader's worker after the process itself has died. Thread
/// safety: none.
class OwnFd {
 public:
  OwnFd() = default;
  explicit OwnFd(int fd);
  ~OwnFd() { reset(); }
  OwnFd(OwnFd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  OwnFd& operator=(OwnFd&& other) noexcept;
  OwnFd(const OwnFd&) = delete;
  OwnFd& operator=(const OwnFd&) = delete;

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

}  // namespace reducer::local
