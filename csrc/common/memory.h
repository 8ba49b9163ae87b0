// What a reducer holds for its workers, by group, and the limit of it all.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "common/payload.h"

namespace reducer {

/// Of a process: what is promised to groups, and what groups hold beyond that, are together at most
/// the limit. Thread safe.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::uint64_t nbytes) : limit_(nbytes) {}

  /// False, and nothing taken, if there is less.
  bool take(std::uint64_t nbytes) noexcept;
  /// Also where there is less.
  void force(std::uint64_t nbytes) noexcept { taken_ += nbytes; }
  void giveBack(std::uint64_t nbytes) noexcept { taken_ -= nbytes; }

  std::uint64_t limit() const noexcept { return limit_; }
  std::uint64_t taken() const noexcept { return taken_; }

  /// Of all accounts: held now, and the most so far.
  std::uint64_t held() const noexcept { return held_; }
  std::uint64_t heldMax() const noexcept { return held_max_; }

 private:
  friend class MemoryAccount;
  void holds(std::uint64_t more) noexcept;

  const std::uint64_t limit_;
  std::atomic<std::uint64_t> taken_{0};
  std::atomic<std::uint64_t> held_{0};
  std::atomic<std::uint64_t> held_max_{0};
};

/// Of a group: what it holds. Up to its promise that is always possible, beyond it as long as the
/// process has memory that nobody else was promised. Thread safe.
class MemoryAccount {
 public:
  /// Null if there is no room for the promise.
  static std::shared_ptr<MemoryAccount> open(std::shared_ptr<MemoryLimit> limit,
                                             std::uint64_t promise);

  /// False, and nothing taken, if that is more than there is.
  bool take(std::uint64_t nbytes) noexcept;
  /// Also where there is less: for what takes the place of something that is about to go.
  void force(std::uint64_t nbytes) noexcept;
  void giveBack(std::uint64_t nbytes) noexcept;

  /// The group is gone, and its promise: what is still held of it (results on their way out) counts
  /// as what it is. Once.
  void close() noexcept;

  std::uint64_t promise() const noexcept { return promise_; }

 private:
  MemoryAccount(std::shared_ptr<MemoryLimit> limit, std::uint64_t promise)
      : limit_(std::move(limit)), promise_(promise) {}
  std::uint64_t beyond(std::uint64_t held) const noexcept {
    return held > promise_ ? held - promise_ : 0;
  }

  const std::shared_ptr<MemoryLimit> limit_;
  const std::uint64_t promise_;
  std::atomic<std::uint64_t> held_{0};
};

/// Bytes on an account, until it is destroyed. Null accounts count nothing.
class Charge {
 public:
  Charge() = default;
  Charge(std::shared_ptr<MemoryAccount> account, std::uint64_t nbytes) noexcept
      : account_(std::move(account)), nbytes_(nbytes) {
    if (account_) account_->force(nbytes_);
  }
  /// Empty if the account does not have them; `ok` tells.
  static Charge ifPossible(const std::shared_ptr<MemoryAccount>& account, std::uint64_t nbytes,
                           bool* ok) noexcept;
  ~Charge() {
    if (account_) account_->giveBack(nbytes_);
  }
  Charge(Charge&& other) noexcept
      : account_(std::move(other.account_)), nbytes_(std::exchange(other.nbytes_, 0)) {}
  Charge& operator=(Charge&& other) noexcept {
    std::swap(account_, other.account_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }

 private:
  std::shared_ptr<MemoryAccount> account_;
  std::uint64_t nbytes_ = 0;
};

/// The same bytes, with `charge` held as long as anybody refers to them. Up to `copied` of them are
/// copied, for payloads that hold a much larger buffer.
Payload charged(const Payload& payload, Charge charge, std::size_t copied = 0);

}  // namespace reducer
