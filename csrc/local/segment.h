// Memory that the processes of one host share, and that vanishes with the last of them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "common/status.h"
#include "local/fork.h"

namespace reducer::local {

/// An anonymous file in memory (memfd): no name that could be left behind, no limit of /dev/shm, no
/// other user who could open it. All of its pages exist when it is made, so that a shortage of
/// memory is an error here and not a SIGBUS later; its size is sealed.
///
/// A process shows that it lives by a lock on one byte of the file (its place), which the kernel
/// drops when the process ends, however it ends. The lock belongs to this object's own open file
/// description.
///
/// Thread safety: const methods, from any thread. Lifetime: memory is mapped as long as a Segment
/// that was made from it exists.
class Segment {
 public:
  /// New, zeroed. kResourceExhausted or kUnavailable with the reason.
  static Result<std::unique_ptr<Segment>> create(std::size_t nbytes);
  /// One that another process made, by a descriptor of it, which stays the caller's.
  static Result<std::unique_ptr<Segment>> open(int fd, std::size_t nbytes);

  std::byte* data() const { return data_.get(); }
  std::size_t nbytes() const { return nbytes_; }
  /// To be handed to others, by the one that made it.
  int fd() const { return shared_.get(); }

  /// Shows that `place` lives. False if another has it.
  bool occupy(std::size_t place) const;
  /// True if somebody else shows that `place` lives.
  bool occupied(std::size_t place) const;

 private:
  static Result<std::unique_ptr<Segment>> map(int fd, std::size_t nbytes);

  OwnFd lock_;
  OwnFd shared_;
  std::shared_ptr<std::byte> data_;
  std::size_t nbytes_ = 0;
};

}  // namespace reducer::local
