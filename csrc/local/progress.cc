#include "local/progress.h"

#include <sched.h>

namespace reducer::local {

std::size_t Waiter::cores() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

void Waiter::yield() noexcept { sched_yield(); }

}  // namespace reducer::local
