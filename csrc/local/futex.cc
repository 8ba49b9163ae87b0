#include "local/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

namespace reducer::local {

void futexWait(const std::atomic<std::uint32_t>& word, std::uint32_t seen, Duration most) noexcept {
  const auto ns =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::max(most, Duration::zero()));
  timespec time{};
  time.tv_sec = ns.count() / 1'000'000'000;
  time.tv_nsec = ns.count() % 1'000'000'000;
  // Not FUTEX_PRIVATE_FLAG: the same page has another address in every process.
  ::syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
}

void futexWakeAll(const std::atomic<std::uint32_t>& word) noexcept {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

}  // namespace reducer::local
