#include "common/status.h"

namespace reducer {

std::string_view nameOf(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalidArgument:
      return "invalid argument";
    case Code::kMismatch:
      return "mismatch";
    case Code::kTimeout:
      return "timeout";
    case Code::kUnavailable:
      return "unavailable";
    case Code::kResourceExhausted:
      return "resource exhausted";
    case Code::kAborted:
      return "aborted";
    case Code::kVersion:
      return "version mismatch";
    case Code::kInternal:
      return "internal error";
  }
  return "?";
}

}  // namespace reducer
