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

// Each change of held_ is an interval of its own, so what the changes take from the limit adds up
// exactly, in whichever order they come.

bool MemoryAccount::take(std::uint64_t nbytes) noexcept {
  const std::uint64_t before = held_.fetch_add(nbytes);
  const std::uint64_t more = beyond(before + nbytes) - beyond(before);
  if (more > 0 && !limit_->take(more)) {
    // Meanwhile others may have counted on these bytes being there: theirs and this interval
    // change places, which is why what is given back is computed anew.
    const std::uint64_t now = held_.fetch_sub(nbytes);
    const std::uint64_t less = beyond(now) - beyond(now - nbytes);
    limit_->force(more);
    limit_->giveBack(less);
    return false;
  }
  limit_->holds(nbytes);
  return true;
}

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
