// Receives that wait to learn who sends: from any rank, and those that were asked for after one.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "common/types.h"

namespace reducer::collective {

/// Matches sends that have arrived with receives, both in their order, as MPI does: the first
/// receive that a send fits gets it. Not thread safe: the owner serialises the calls.
class Receives {
 public:
  struct Request {
    Rank from = kAllRanks;  ///< kAllRanks: any rank
    TimePoint deadline;
    TimePoint late_at;  ///< when `late` is to be called, long before; once
    std::function<void(TimePoint now)> late;
    std::function<void(Rank from, std::uint64_t seq)> start;
    std::function<void(const Status&)> fail;
    std::uint64_t id = 0;
  };
  struct Match {
    Request request;
    Rank from = 0;
    std::uint64_t seq = 0;
  };

  /// True if a receive of this tag must queue up here, even if it knows its sender.
  bool waiting(std::uint32_t tag) const { return requests_.contains(tag); }
  /// Its number, for remove().
  std::uint64_t add(std::uint32_t tag, Request request);
  /// Takes one out, if it still waits.
  std::vector<Request> remove(std::uint64_t id);
  /// Takes out those that wait for this rank, or if it was the last there is, for any.
  std::vector<Request> left(Rank rank, bool was_last);

  /// A send that no receive was there for.
  void arrived(std::uint32_t tag, Rank from, std::uint64_t seq) {
    arrivals_[tag].push_back({from, seq});
  }
  /// A receive has taken this number in another way than by match().
  void taken(std::uint32_t tag, Rank from, std::uint64_t seq);

  /// Takes out what fits together. `take` says whether a send has the number that is its sender's
  /// turn (notices may overtake each other), and if so takes that number.
  std::vector<Match> match(std::uint32_t tag,
                           const std::function<bool(Rank from, std::uint64_t seq)>& take);

  /// Takes out what has waited too long.
  std::vector<Request> expired(TimePoint now);
  /// Takes the words out of what has waited for long.
  std::vector<std::function<void(TimePoint now)>> late(TimePoint now);
  std::vector<Request> clear();

 private:
  struct Arrival {
    Rank from;
    std::uint64_t seq;
  };
  template <class Choose>
  std::vector<Request> takeOut(Choose choose);

  std::uint64_t last_id_ = 0;
  std::map<std::uint32_t, std::list<Request>> requests_;  // by tag; no empty lists
  std::map<std::uint32_t, std::deque<Arrival>> arrivals_;
};

}  // namespace reducer::collective
