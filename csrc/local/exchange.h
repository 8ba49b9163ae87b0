// The operations of a team, one after another, through its shared memory.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/status.h"
#include "local/job.h"
#include "local/team.h"

namespace reducer::local {

/// What a rank calls, as words that this layer only compares: calls are equal if all words are.
using CallWords = std::array<std::uint64_t, 5>;

/// Runs jobs on a team. Every operation begins at the gate, where all ranks compare their calls
/// before any result is written.
///
/// Thread safety: run() one thread at a time, all else from any. Lifetime: the team must outlive
/// it, and must be attached when run() is called.
class Exchange {
 public:
  /// Memory that each rank needs in the team's area, for a stage of this size (0: the default, for
  /// a team of `ranks`), and of which operations of up to `slot_bytes` take one hop.
  struct Layout {
    std::size_t slot_bytes = 0;
    std::size_t stage_bytes = 0;
    std::size_t areaBytes() const;
    static Layout of(std::size_t ranks, std::size_t stage_bytes);
  };

  Exchange(Team& team, Layout layout) : team_(team), layout_(layout) {}

  /// Operation `number`; numbers are taken one after another. kMismatch without a text: all ranks
  /// have arrived, their calls() differ, and nothing has been written. Else what `watch` or another
  /// rank gave the operation up with.
  Status run(std::uint32_t number, const CallWords& call, Job& job, Watch& watch);

  /// What a place calls in operation `number`, if it has arrived there; else nothing.
  std::optional<CallWords> callOf(std::uint32_t place, std::uint32_t number) const;

  /// The last operation at which a place has arrived, even if its process has ended since; nothing:
  /// none yet.
  struct Last {
    std::uint32_t number;
    CallWords call;
  };
  std::optional<Last> lastOf(std::uint32_t place) const;

 private:
  struct Record {
    std::atomic<std::uint64_t> tag;   // number of the operation + 1
    std::atomic<std::uint32_t> fits;  // all that this rank contributes lies behind this record
    std::array<std::atomic<std::uint64_t>, 5> call;
  };
  static constexpr std::size_t kRecordBytes = 64;
  static_assert(sizeof(Record) <= kRecordBytes);

  Record& record(std::uint32_t place, std::uint32_t number) const;
  std::byte* slot(std::uint32_t place, std::uint32_t number) const;
  std::byte* stage(std::uint32_t place, std::uint64_t round) const;

  /// What was read in operation `number` may be of a later one.
  bool stale(std::uint32_t number) const;
  void show(std::uint32_t number, const CallWords& call, const Job& job);
  Status meet(std::uint32_t number, Watch& watch);
  Status round(std::uint32_t number, std::uint32_t arrivals, Watch& watch);
  Status runRounds(std::uint32_t number, Job& job, Watch& watch);
  Status endedWith(std::uint32_t number) const;

  Team& team_;
  const Layout layout_;
  std::array<std::vector<const std::byte*>, 2> slots_;   // by parity of the number
  std::array<std::vector<const std::byte*>, 2> stages_;  // by parity of the round
};

}  // namespace reducer::local
