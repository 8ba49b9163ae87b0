#include "common/memory.h"

#include <cstddef>
#include <vector>

namespace reducer {

bool MemoryLimit::take(std::uint64_t nbytes) noexcept {
  std::uint64_t taken = taken_;
  do {
    if (taken > limit_ || nbytes > limit_ - taken) return false;
  } while (!taken_.compare_exchange_weak(taken, taken + nbytes));
  return true;
}

void MemoryLimit::holds(std::uint64_t more) noexcept {
  const std::uint64_t held = held_ += more;
  std::uint64_t max = held_max_.load(std::memory_order_relaxed);
  while (held > max && !held_max_.compare_exchange_weak(max, held, std::memory_order_relaxed)) {
  }
}

std::shared_ptr<MemoryAccount> MemoryAccount::open(std::shared_ptr<MemoryLimit> limit,
                                                   std::uint64_t promise) {
  if (!limit->take(promise)) return nullptr;
  return std::shared_ptr<MemoryAccount>(new MemoryAccount(std::move(limit), promise));
}

// The limit is asked first, so that what is taken of it is never below what is held.
bool MemoryAccount::take(std::uint64_t nbytes) noexcept {
  std::uint64_t held = held_;
  while (true) {
    const std::uint64_t more = beyond(held + nbytes) - beyond(held);
    if (more > 0 && !limit_->take(more)) {
      const std::uint64_t now = held_;
      if (now == held) return false;
      held = now;
      continue;
    }
    if (held_.compare_exchange_weak(held, held + nbytes)) break;
    limit_->giveBack(more);
  }
  limit_->holds(nbytes);
  return true;
}

// Each change of held_ by these is an interval of its own, so what they take from the limit and
// give back adds up exactly, in whichever order they come.

void MemoryAccount::force(std::uint64_t nbytes) noexcept {
  const std::uint64_t before = held_.fetch_add(nbytes);
  limit_->force(beyond(before + nbytes) - beyond(before));
  limit_->holds(nbytes);
}

void MemoryAccount::giveBack(std::uint64_t nbytes) noexcept {
  const std::uint64_t before = held_.fetch_sub(nbytes);
  limit_->giveBack(beyond(before) - beyond(before - nbytes));
  limit_->held_ -= nbytes;
}

// From here on nothing is below the promise, and all that is given back goes back to the limit.
void MemoryAccount::close() noexcept {
  const std::uint64_t before = held_.fetch_add(promise_);
  limit_->force(beyond(before + promise_) - beyond(before));
  limit_->giveBack(promise_);
}

Charge Charge::ifPossible(const std::shared_ptr<MemoryAccount>& account, std::uint64_t nbytes,
                          bool* ok) noexcept {
  *ok = account == nullptr || account->take(nbytes);
  Charge charge;
  if (account == nullptr || !*ok) return charge;
  charge.account_ = account;
  charge.nbytes_ = nbytes;
  return charge;
}

Payload charged(const Payload& payload, Charge charge, std::size_t copied) {
  struct Held {
    Charge charge;
    std::shared_ptr<const void> owner;
    std::vector<std::byte> copy;
  };
  auto held = std::make_shared<Held>();
  held->charge = std::move(charge);
  const std::size_t nbytes = payload.nbytes();
  if (nbytes <= copied) {
    held->copy.resize(nbytes);
    payload.copyTo(held->copy.data());
    const Bytes bytes(held->copy);
    return Payload(bytes, std::move(held));
  }
  held->owner = payload.owner();
  const std::span<const Bytes> pieces = payload.pieces();
  if (pieces.empty()) return Payload(Bytes(), std::move(held));
  if (pieces.size() == 1) return Payload(pieces[0], std::move(held));
  return Payload(std::vector<Bytes>(pieces.begin(), pieces.end()), std::move(held));
}

}  // namespace reducer
