// Which standalone reducers groups of this process have lost.
#pragma once

#include <map>
#include <mutex>
#include <string>

namespace reducer::server {

/// So that another group of the process, which has still to connect, does not wait for what is not
/// there. Thread safety: every method, from any thread.
class Absentees {
 public:
  void add(const std::string& address) {
    const std::lock_guard lock(mutex_);
    ++groups_[address];
  }
  /// A group that had added it has it again, or has ended.
  void remove(const std::string& address) {
    const std::lock_guard lock(mutex_);
    const auto found = groups_.find(address);
    if (found != groups_.end() && --found->second == 0) groups_.erase(found);
  }
  bool contains(const std::string& address) {
    const std::lock_guard lock(mutex_);
    return groups_.contains(address);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, int> groups_;  // how many have lost it
};

}  // namespace reducer::server
