// Success, or what went wrong, in words for the person who has to mend it.
// Exceptions exist only at the Python and torch borders.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "common/check.h"

namespace reducer {

/// Kinds of failure. The numbers are on the wire.
enum class Code : int {
  kOk = 0,
  kInvalidArgument = 1,  ///< the caller's (or a peer's) input is wrong
  kMismatch = 2,         ///< ranks made different calls
  kTimeout = 3,          ///< a deadline passed
  kUnavailable = 4,      ///< a peer cannot be reached, or went away
  kResourceExhausted = 5,
  kAborted = 6,  ///< the group was aborted or destroyed
  kVersion = 7,  ///< the peer speaks another protocol version
  kInternal = 8,
};

std::string_view nameOf(Code code) noexcept;

class [[nodiscard]] Status {
 public:
  Status() = default;  ///< success
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const noexcept { return code_ == Code::kOk; }
  Code code() const noexcept { return code_; }
  const std::string& message() const noexcept { return message_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

/// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {  // NOLINT(google-explicit-constructor)
    REDUCER_CHECK(!status_.ok());
  }
  bool ok() const noexcept { return value_.has_value(); }
  const Status& status() const noexcept { return status_; }
  T& value() & {
    REDUCER_CHECK(value_.has_value());
    return *value_;
  }
  T&& value() && {
    REDUCER_CHECK(value_.has_value());
    return std::move(*value_);
  }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace reducer
