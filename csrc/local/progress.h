// Waiting for other processes: words in shared memory that grow, and how to wait for them.
//
// Everything here lies in a Segment and is valid when zeroed. A publisher wakes only if somebody
// sleeps, and a counter that several ranks advance wakes all at once, when the last of them came.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "common/clock.h"
#include "common/status.h"
#include "local/futex.h"

namespace reducer::local {

inline constexpr std::size_t kLine = 64;

/// Longest sleep without a look at what may have gone wrong.
inline constexpr Duration kSlice = std::chrono::milliseconds(20);

/// What may end a wait before its time. Called by the waiting thread, before it sleeps and after
/// every slice of sleep.
class Watch {
 public:
  virtual ~Watch() = default;
  /// Non-ok ends the wait with it. `slept`: a whole slice has passed without a sign; the time for
  /// questions that cost more (do the others live?).
  virtual Status look(TimePoint now, bool slept) = 0;
  /// When look() wants to be called next at the latest.
  virtual TimePoint deadline() const = 0;
};

/// How a rank waits. One that has a core to itself spins first, as long as that is likely to help;
/// one that has to share yields its core to those it waits for. Then it sleeps. Thread safety: one
/// thread at a time.
class Waiter {
 public:
  /// `crowded`: more ranks on this host than cores that this process may use.
  explicit Waiter(bool crowded) : crowded_(crowded) {}

  /// Until ready() is true. `word`: changes before ready() can become true, and whoever changes it
  /// calls wake() with the same `sleepers`.
  template <class Ready>
  Status until(const Ready& ready, const std::atomic<std::uint32_t>& word,
               std::atomic<std::uint32_t>& sleepers, Watch& watch) {
    if (ready()) return {};
    if (crowded_ ? yieldUntil(ready) : spinUntil(ready)) return {};
    return sleepUntil(ready, word, sleepers, watch);
  }

  /// Cores that this process may run on.
  static std::size_t cores() noexcept;

 private:
  static constexpr Duration kSpinMost = std::chrono::microseconds(50);
  static constexpr Duration kSpinLeast = std::chrono::microseconds(2);
  static constexpr Duration kYieldMost = std::chrono::microseconds(100);
  static constexpr int kPausesPerLook = 32;

  static void pause() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  static void yield() noexcept;

  template <class Ready>
  bool spinUntil(const Ready& ready) {
    const TimePoint end = Clock::now() + spin_;
    do {
      for (int i = 0; i < kPausesPerLook; ++i) {
        pause();
        if (ready()) {
          spin_ = std::min(kSpinMost, 2 * spin_);
          return true;
        }
      }
    } while (Clock::now() < end);
    spin_ = std::max(kSpinLeast, spin_ / 2);
    return false;
  }

  template <class Ready>
  bool yieldUntil(const Ready& ready) {
    const TimePoint end = Clock::now() + kYieldMost;
    do {
      yield();
      if (ready()) return true;
    } while (Clock::now() < end);
    return false;
  }

  template <class Ready>
  Status sleepUntil(const Ready& ready, const std::atomic<std::uint32_t>& word,
                    std::atomic<std::uint32_t>& sleepers, Watch& watch) {
    bool slept = false;
    while (true) {
      const TimePoint now = Clock::now();
      if (Status status = watch.look(now, slept); !status.ok()) {
        // A rank that has left, or died, may have done its part just before.
        if (ready()) return {};
        return status;
      }
      // Announced before the last look at the word, as the publisher changes the word before it
      // looks for sleepers: one of the two sees the other.
      sleepers.fetch_add(1);
      const std::uint32_t seen = word.load();
      const bool done = ready();
      const Duration most = std::min(kSlice, watch.deadline() - now);
      if (!done) futexWait(word, seen, most);
      sleepers.fetch_sub(1);
      if (done || ready()) return {};
      slept = Clock::now() - now >= kSlice;
    }
  }

  const bool crowded_;
  Duration spin_ = kSpinMost;
};

/// For who has changed `word`.
inline void wake(const std::atomic<std::uint32_t>& word,
                 const std::atomic<std::uint32_t>& sleepers) noexcept {
  if (sleepers.load() != 0) futexWakeAll(word);
}

/// A number that one or several ranks advance, never back (modulo 2^32).
struct alignas(kLine) Counter {
  std::atomic<std::uint32_t> value;
  std::atomic<std::uint32_t> sleepers;

  /// By the one rank that advances it.
  void publish(std::uint32_t reached) {
    value.store(reached);
    wake(value, sleepers);
  }
  /// By one of several ranks that are all waited for; wakes when the sum has reached `all`.
  void arrive(std::uint32_t all) {
    if (value.fetch_add(1) + 1 == all) wake(value, sleepers);
  }
  bool reached(std::uint32_t wanted) const {
    return static_cast<std::int32_t>(value.load(std::memory_order_acquire) - wanted) >= 0;
  }
  Status wait(std::uint32_t wanted, Waiter& waiter, Watch& watch) {
    return waiter.until([&] { return reached(wanted); }, value, sleepers, watch);
  }
  /// Wakes those who sleep, for another reason than the number.
  void stir() { wake(value, sleepers); }
};
static_assert(sizeof(Counter) == kLine);

/// Where the ranks of a team meet at the start of every operation. An operation is either complete,
/// when all ranks have arrived, or failed, when one gave it up before that; which of the two is
/// decided once, for all, by one compare-and-swap, and then the next operation's turn begins. So a
/// rank that gives up while the last one arrives never disagrees with the others.
struct alignas(kLine) Gate {
  /// The operation whose turn it is (32 bits), how many were given up since the last complete one
  /// (20), and how many ranks have arrived (12).
  std::atomic<std::uint64_t> word;
  std::atomic<std::uint32_t> sleepers;

  enum class Turn { kComplete, kWaiting, kFailed };

  /// This rank's arrival at operation `number`, the next one after the one it arrived at before.
  /// Calls `last` if it is the last to arrive, before anybody is let through. kFailed: it has been
  /// given up by another rank.
  template <class Last>
  Turn arrive(std::uint32_t number, std::uint32_t ranks, const Last& last) {
    std::uint64_t seen = word.load();
    while (true) {
      if (numberOf(seen) != number) return Turn::kFailed;
      const bool all = arrivedOf(seen) + 1 == ranks;
      if (all) last();
      if (word.compare_exchange_weak(seen, all ? pack(number + 1, 0, 0) : seen + 1)) {
        if (!all) return Turn::kWaiting;
        wake(numberWord(), sleepers);
        return Turn::kComplete;
      }
    }
  }

  /// What has become of an operation that this rank has arrived at.
  Turn turnOf(std::uint32_t number) const {
    const std::uint64_t seen = word.load(std::memory_order_acquire);
    if (numberOf(seen) == number) return Turn::kWaiting;
    const std::uint32_t last_complete = numberOf(seen) - 1 - givenUpOf(seen);
    return static_cast<std::int32_t>(last_complete - number) >= 0 ? Turn::kComplete : Turn::kFailed;
  }

  /// Gives operation `number` up, unless it is over. True if that was this call.
  bool giveUp(std::uint32_t number) {
    std::uint64_t seen = word.load();
    while (numberOf(seen) == number) {
      const std::uint32_t given_up = std::min<std::uint32_t>(givenUpOf(seen) + 1, kGivenUpMost);
      if (word.compare_exchange_weak(seen, pack(number + 1, given_up, 0))) {
        wake(numberWord(), sleepers);
        return true;
      }
    }
    return false;
  }

  std::uint32_t number() const { return numberOf(word.load(std::memory_order_acquire)); }
  std::uint32_t arrived() const { return arrivedOf(word.load(std::memory_order_acquire)); }

  /// Until operation `number`, at which this rank has arrived, is over.
  Status wait(std::uint32_t number, Waiter& waiter, Watch& watch) {
    return waiter.until([&] { return this->number() != number; }, numberWord(), sleepers, watch);
  }
  void stir() { wake(numberWord(), sleepers); }

 private:
  static constexpr int kArrivedBits = 12;
  static constexpr int kGivenUpBits = 20;
  static constexpr std::uint32_t kGivenUpMost = (1u << kGivenUpBits) - 1;

  static std::uint32_t numberOf(std::uint64_t seen) {
    return static_cast<std::uint32_t>(seen >> (kArrivedBits + kGivenUpBits));
  }
  static std::uint32_t givenUpOf(std::uint64_t seen) {
    return static_cast<std::uint32_t>(seen >> kArrivedBits) & kGivenUpMost;
  }
  static std::uint32_t arrivedOf(std::uint64_t seen) {
    return static_cast<std::uint32_t>(seen) & ((1u << kArrivedBits) - 1);
  }
  static std::uint64_t pack(std::uint32_t number, std::uint32_t given_up, std::uint32_t arrived) {
    return std::uint64_t{number} << (kArrivedBits + kGivenUpBits) |
           std::uint64_t{given_up} << kArrivedBits | arrived;
  }
  /// The half of the word that changes when an operation is over: what waiters sleep on.
  const std::atomic<std::uint32_t>& numberWord() const {
    constexpr std::size_t kUpper = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 1 : 0;
    return reinterpret_cast<const std::atomic<std::uint32_t>*>(&word)[kUpper];
  }
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(Gate) == kLine);

}  // namespace reducer::local
