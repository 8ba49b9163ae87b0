// REDUCER_CHECK(condition): for a programmer's error only, and it stays on in release builds.
// Nothing that a peer sends, or that a user passes, may trip one.
#pragma once

namespace reducer {
[[noreturn]] void checkFailed(const char* file, int line, const char* expression);
}  // namespace reducer

#define REDUCER_CHECK(condition) \
  ((condition) ? (void)0 : ::reducer::checkFailed(__FILE__, __LINE__, #condition))
