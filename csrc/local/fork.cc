#include "local/fork.h"

#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>
#include <utility>

namespace reducer::local {
namespace {

struct Registry {
  std::mutex mutex;
  std::set<int> fds;
};

// Never destroyed: a child may be forked while the process ends.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

void beforeFork() { registry().mutex.lock(); }
void inParent() { registry().mutex.unlock(); }
void inChild() {
  for (const int fd : registry().fds) ::close(fd);
  registry().fds.clear();
  registry().mutex.unlock();
}

}  // namespace

OwnFd::OwnFd(int fd) : fd_(fd) {
  static const int installed = pthread_atfork(beforeFork, inParent, inChild);
  (void)installed;
  if (fd < 0) return;
  const std::lock_guard lock(registry().mutex);
  registry().fds.insert(fd);
}

OwnFd& OwnFd::operator=(OwnFd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void OwnFd::reset() {
  const int fd = std::exchange(fd_, -1);
  if (fd < 0) return;
  const std::lock_guard lock(registry().mutex);
  // In a forked child it has been closed, and the number may stand for something else.
  if (registry().fds.erase(fd) > 0) ::close(fd);
}

}  // namespace reducer::local
