#include "server/tokens.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

#include "common/limits.h"

namespace reducer::server {
namespace {

bool sameFile(const struct stat& one, const struct stat& other) {
  return one.st_ino == other.st_ino && one.st_dev == other.st_dev && one.st_size == other.st_size &&
         one.st_mtim.tv_sec == other.st_mtim.tv_sec && one.st_mtim.tv_nsec == other.st_mtim.tv_nsec;
}

bool printable(char c) { return c > ' ' && c <= '~'; }

}  // namespace

bool sameSecret(std::string_view one, std::string_view other) noexcept {
  // The lengths may show in the time, as they do on the wire; the bytes do not.
  volatile unsigned char difference = one.size() == other.size() ? 0 : 1;
  for (std::size_t i = 0; i < other.size(); ++i) {
    const char held = one.empty() ? '\0' : one[i % one.size()];
    difference = difference | static_cast<unsigned char>(held ^ other[i]);
  }
  return difference == 0;
}

Status notAdmitted() {
  return Status(Code::kInvalidArgument,
                "this reducer does not let this worker in; all workers and reducers of a job need "
                "the same token (REDUCER_TOKEN_FILE, `reducer serve --token-file`)");
}

Result<std::shared_ptr<TokenFile>> TokenFile::open(const std::string& path) {
  std::shared_ptr<TokenFile> file(new TokenFile(path));
  const std::lock_guard lock(file->mutex_);
  if (Status status = file->read(); !status.ok()) return status;
  return file;
}

Status TokenFile::read() {
  const auto wrong = [this](const std::string& why) {
    return Status(Code::kInvalidArgument, "the token file '" + path_ + "' " + why);
  };
  struct stat now {};
  std::ifstream file(path_);
  if (::stat(path_.c_str(), &now) != 0 || !file) {
    return wrong(std::string("cannot be read: ") + std::strerror(errno));
  }
  std::vector<std::string> tokens;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty()) continue;
    const std::string where = "has in line " + std::to_string(number) + " ";
    if (line.size() < kMinTokenBytes || line.size() > kMaxTokenBytes) {
      return wrong(where + "a token of " + std::to_string(line.size()) + " characters; it takes " +
                   std::to_string(kMinTokenBytes) + " to " + std::to_string(kMaxTokenBytes) +
                   ", as `openssl rand -hex 32` makes");
    }
    if (!std::all_of(line.begin(), line.end(), printable)) {
      return wrong(where + "a token with spaces or with characters that are not ASCII");
    }
    tokens.push_back(line);
  }
  if (tokens.empty()) return wrong("is empty; write a token, as `openssl rand -hex 32` makes");
  tokens_ = std::move(tokens);
  seen_ = now;
  return {};
}

void TokenFile::refresh() {
  struct stat now {};
  if (::stat(path_.c_str(), &now) == 0 && sameFile(now, seen_)) return;
  const bool known = now.st_ino == 0 && seen_.st_ino == 0;  // it is still away: said already
  seen_ = now;
  if (known) return;
  if (Status status = read(); !status.ok()) {
    std::fprintf(stderr, "reducer: %s; the tokens that were read before stay in force\n",
                 status.message().c_str());
  }
}

bool TokenFile::admits(std::string_view token) {
  const std::lock_guard lock(mutex_);
  refresh();
  unsigned found = 0;
  for (const std::string& known : tokens_) found |= sameSecret(known, token) ? 1U : 0U;
  return found != 0;
}

std::size_t TokenFile::count() {
  const std::lock_guard lock(mutex_);
  refresh();
  return tokens_.size();
}

std::string TokenFile::any() {
  const std::lock_guard lock(mutex_);
  refresh();
  return tokens_.front();
}

Result<std::string> TokenFile::only() {
  const std::lock_guard lock(mutex_);
  refresh();
  if (tokens_.size() == 1) return tokens_.front();
  return Status(Code::kInvalidArgument,
                "the token file '" + path_ + "' has " + std::to_string(tokens_.size()) +
                    " tokens; a worker's has one line, and only that of `reducer serve` more");
}

}  // namespace reducer::server
