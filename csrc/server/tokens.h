// The secrets by which a reducer knows the workers of its jobs. They are in no log, no counter and
// no error's text.
#pragma once

#include <sys/stat.h>

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace reducer::server {

/// Whether both are the same, in a time that depends on neither.
bool sameSecret(std::string_view one, std::string_view other) noexcept;

/// What a stranger is told: one text, whatever was wrong.
Status notAdmitted();

/// A file with one token a line, read again when it has changed. Thread safety: every method, from
/// any thread.
class TokenFile {
 public:
  /// kInvalidArgument says what is wrong with the file; it does not quote from it.
  static Result<std::shared_ptr<TokenFile>> open(const std::string& path);

  /// True if `token` is one of the file's; it is compared with all of them.
  bool admits(std::string_view token);

  std::size_t count();

  /// One of them: for who asks a reducer.
  std::string any();

  /// The token of a worker's file, which has one. kInvalidArgument if it has more.
  Result<std::string> only();

 private:
  explicit TokenFile(std::string path) : path_(std::move(path)) {}
  Status read();
  /// Reads the file again if it is another one. What cannot be read leaves the tokens as they were,
  /// with a warning.
  void refresh();

  const std::string path_;
  std::mutex mutex_;
  struct stat seen_ {};
  std::vector<std::string> tokens_;
};

}  // namespace reducer::server
