// The ranks of one host, and the memory that they share.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "common/types.h"
#include "local/progress.h"
#include "local/rendezvous.h"
#include "local/segment.h"

namespace reducer::local {

/// Counters of each rank that operations may use as they like.
inline constexpr std::size_t kCounters = 16;

/// This rank's membership among the ranks of its host. A rank's place is its position in the list
/// of ranks, which is the same on all of them.
///
/// Thread safety: giveUp(), leave() and the const methods, from any thread once attach() was
/// successful; everything else, one thread at a time. Lifetime: areas and counters are valid while
/// the Team lives. In a forked child nothing may be called but the destructor.
class Team {
 public:
  struct Config {
    std::string name;               ///< equal on all ranks of the team, on no other
    std::vector<Rank> ranks;        ///< of the group, ascending; 1 to 4096 of them
    std::uint32_t place = 0;        ///< of this rank in `ranks`
    std::string host;               ///< "hostname:pid" of this rank, for messages
    std::size_t area_bytes = 4096;  ///< that each rank has of its own; equal on all
  };

  explicit Team(Config config);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  /// Waits for the others. Non-ok: what `watch` said; then it can be called again. After success
  /// either attached(), or all ranks of the team have the same refusal().
  Status attach(Watch& watch);
  bool attached() const { return attached_.load(std::memory_order_acquire); }
  const Status& refusal() const { return rendezvous_.refusal(); }

  std::uint32_t size() const { return static_cast<std::uint32_t>(config_.ranks.size()); }
  std::uint32_t place() const { return config_.place; }
  Rank rankAt(std::uint32_t place) const { return config_.ranks[place]; }
  /// "rank 3 (host:pid)"; "rank 3 (has not connected)" before attach().
  std::string name(std::uint32_t place) const;
  /// Before attach(): who has not come, as far as this rank can know.
  std::vector<std::uint32_t> missing() const { return rendezvous_.missing(); }
  /// And what keeps this rank from meeting them, if it is more than that.
  std::string trouble() const { return rendezvous_.trouble(); }

  std::byte* area(std::uint32_t place) const { return areas_ + place * area_bytes_; }
  std::size_t areaBytes() const { return area_bytes_; }
  Counter& counter(std::uint32_t place, std::size_t index) const {
    return members_[place].counters[index];
  }
  Gate& gate() const { return head_->gate; }
  /// Advanced by all ranks in the steps of an operation; 0 when an operation begins.
  Counter& rounds() const { return head_->rounds; }
  Waiter& waiter() { return waiter_; }

  /// This rank's arrival at operation `number`, which is the next one of this rank. Operations that
  /// it has given up before it was attached are given up here.
  Gate::Turn arrive(std::uint32_t number);
  /// Ends an operation for all ranks that are not through with it: they get `why`. Whether one is
  /// through is decided at the gate or, behind it, at its own next wait.
  void giveUp(std::uint32_t number, const Status& why);
  /// The same, but of one that the gate has completed it ends nothing.
  void giveUpMeeting(std::uint32_t number, const Status& why);
  /// Ok: nobody has given up operation `number`, as far as this rank still knows.
  Status givenUp(std::uint32_t number) const;
  /// True if an operation behind the gate was given up: then givenUp() says why.
  bool broken(std::uint32_t number) const {
    return head_->given_up.load(std::memory_order_acquire) == std::uint64_t{number} + 1;
  }

  /// Says goodbye: others that wait for this rank are told. Idempotent.
  void leave();
  /// A place whose rank has left or died, if there is one; `text`: what became of it.
  struct Gone {
    std::uint32_t place = 0;
    bool died = false;
    std::string text;
  };
  std::optional<Gone> gone() const;

 private:
  static constexpr std::size_t kTold = 4;
  static constexpr std::size_t kTextWords = 126;

  /// Why a rank gave an operation up. Every word is atomic: it may be overwritten while it is read,
  /// which the tag shows.
  struct Told {
    std::atomic<std::uint64_t> tag;  // number of the operation + 1
    std::atomic<std::uint64_t> code;
    std::array<std::atomic<std::uint64_t>, kTextWords> text;
  };
  enum State : std::uint32_t { kAbsent, kHere, kLeft };
  struct alignas(4096) Member {
    std::atomic<std::uint32_t> state;
    std::array<char, 252> host;  // constant after attach()
    std::array<Told, kTold> told;
    std::array<Counter, kCounters> counters;
  };
  struct alignas(4096) Head {
    Gate gate;
    Counter rounds;
    std::atomic<std::uint64_t> given_up;  // the last operation behind the gate that was, + 1
  };

  static std::size_t segmentBytes(const Config& config);
  void tell(std::uint32_t number, const Status& why);

  const Config config_;
  const int pid_;
  const std::size_t area_bytes_;
  Rendezvous rendezvous_;
  std::unique_ptr<Segment> segment_;
  Head* head_ = nullptr;
  Member* members_ = nullptr;
  std::byte* areas_ = nullptr;
  Waiter waiter_;
  std::atomic<bool> attached_{false};

  std::mutex told_mutex_;
  std::uint32_t told_next_ = 0;
  Status missed_;  // why operations before attach() were given up
};

}  // namespace reducer::local
