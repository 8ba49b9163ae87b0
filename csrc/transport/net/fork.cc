#include "transport/net/fork.h"

#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <unordered_map>

namespace reducer::transport::net {
namespace {

/// A socket's number is used again after it was closed (by gRPC, which does not tell); the kernel's
/// cookie is not.
std::uint64_t cookieOf(int fd) {
  std::uint64_t cookie = 0;
  socklen_t nbytes = sizeof cookie;
  if (getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &nbytes) != 0) return 0;
  return cookie;
}

struct Registry {
  std::mutex mutex;
  std::unordered_map<int, std::uint64_t>
      cookies;  // by number: never more than the process has open at once
  std::atomic<std::uint64_t> generation{0};
};

// Never destroyed: a child may be forked while the process ends.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

void beforeFork() { registry().mutex.lock(); }

void inParent() { registry().mutex.unlock(); }

void inChild() {
  Registry& all = registry();
  all.generation.fetch_add(1);
  for (const auto& [fd, cookie] : all.cookies) {
    if (cookieOf(fd) == cookie) ::close(fd);
  }
  all.cookies.clear();
  all.mutex.unlock();
}

void install() {
  static const int installed = pthread_atfork(beforeFork, inParent, inChild);
  (void)installed;
}

}  // namespace

std::uint64_t forkGeneration() noexcept {
  install();
  return registry().generation.load(std::memory_order_relaxed);
}

void closeInChildren(int fd) {
  install();
  const std::uint64_t cookie = cookieOf(fd);
  if (cookie == 0) return;
  const std::lock_guard lock(registry().mutex);
  registry().cookies[fd] = cookie;
}

}  // namespace reducer::transport::net
