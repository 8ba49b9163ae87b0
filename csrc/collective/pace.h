// How many rounds of a transfer are under way at a time.
//
// Windows bound what is in flight at each owner, but by themselves they let an owner that answers
// faster than others get ever further ahead, until it has nothing left to do and the slow ones are
// late: the plan's rounds have work for all NICs only as long as all owners are in about the same
// one. And what is in flight beyond what the network holds only fills queues.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "collective/shard_map.h"
#include "common/clock.h"

namespace reducer::collective {

/// How many rounds under way are right for transfers of a kind, as it turns out: at first kLeast,
/// which is enough where the delay is short beside the time that a round takes on the wire.
///
/// Where a round is answered R0 after it went out if nothing waits in queues, and the slowest NIC
/// or processor takes T for a round, R0 / T rounds are on their way and all others wait in queues:
/// about two of those keep it busy (as in TCP Vegas, Brakmo and Peterson 1995). While there are
/// too few, rounds are answered every R0 / rounds() instead of T, and the number rises.
///
/// Thread safety: every method, from any thread.
class Depth {
 public:
  /// One on its way to the owners, one there, one on its way back.
  static constexpr std::uint64_t kLeast = 3;
  static constexpr std::uint64_t kMost = 64;

  std::uint64_t rounds() const { return rounds_.load(std::memory_order_relaxed); }
  /// A round was answered so long after it went out.
  void answered(Duration response);
  /// The next one was so long after it.
  void spaced(Duration spacing);

 private:
  std::atomic<std::uint64_t> rounds_{kLeast};
  std::mutex mutex_;
  Duration least_ = Duration::max();      // R0
  Duration spacings_ = Duration::zero();  // their sum since rounds_ was looked at
  std::uint64_t spaced_ = 0;              // their number
};

/// The rounds of one transfer, whose plan outlives it. Thread safety: every method, from any
/// thread.
class Pace {
 public:
  /// The number of rounds under way is the plan's `window_rounds`; if it has none, it is the
  /// depth's, which learns from it.
  Pace(const Plan& plan, std::shared_ptr<Depth> depth);

  bool open(std::uint64_t round) const {
    return round < first_.load(std::memory_order_acquire) + rounds();
  }
  /// A piece of this round, which is open, may go out now.
  void begun(std::uint64_t round, TimePoint now);
  /// An owner has answered. True if further rounds are open now.
  bool answered(std::uint64_t round, TimePoint now);

 private:
  struct Round {
    std::size_t answers = 0;
    TimePoint begun = TimePoint::max();
  };

  std::uint64_t rounds() const { return fixed_ > 0 ? fixed_ : depth_->rounds(); }

  const Plan& plan_;
  const std::shared_ptr<Depth> depth_;
  const std::uint64_t fixed_;
  std::atomic<std::uint64_t> first_{0};  // with answers missing
  std::mutex mutex_;
  std::vector<Round> open_;            // by round modulo their number
  TimePoint last_ = TimePoint::max();  // when the round before first_ was answered
};

}  // namespace reducer::collective
