#include "common/check.h"

#include <cstdio>
#include <cstdlib>

namespace reducer {

void checkFailed(const char* file, int line, const char* expression) {
  std::fprintf(stderr, "reducer: internal error at %s:%d: %s does not hold. Please report this.\n",
               file, line, expression);
  std::fflush(stderr);
  std::abort();
}

}  // namespace reducer
