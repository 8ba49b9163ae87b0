// Which standalone reducers groups of this process have lost, and none has again.
#pragma once

#include <mutex>
#include <set>
#include <string>

namespace reducer::server {

/// So that another group of the process, which has still to connect, does not wait for what is not
/// there; also after the group that lost it has ended, while the process has another.
/// Thread safety: every method, from any thread.
class Absentees {
 public:
  void add(const std::string& address) {
    const std::lock_guard lock(mutex_);
    addresses_.insert(address);
  }
  /// A group has it again.
  void remove(const std::string& address) {
    const std::lock_guard lock(mutex_);
    addresses_.erase(address);
  }
  bool contains(const std::string& address) {
    const std::lock_guard lock(mutex_);
    return addresses_.contains(address);
  }

 private:
  std::mutex mutex_;
  std::set<std::string> addresses_;
};

}  // namespace reducer::server
