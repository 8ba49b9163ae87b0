// How long a call would take each way: what `auto` chooses by.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "collective/settings.h"
#include "collective/shard_map.h"
#include "collective/shares.h"

namespace reducer::collective {

/// The parts of a call that cost time, at the host that has most of each.
struct Parts {
  double messages = 0;    ///< hops, one after another
  double frames = 0;      ///< sent and received
  double wire_bytes = 0;  ///< through a NIC, one direction, as if it were the group's fastest NIC
  double work_bytes = 0;  ///< sent, received, summed and copied
};

/// The parts of an all-reduce of `nbytes` over the owners of `map` (kRing: round the ranks).
///
/// A direction of a NIC is busy with all its bytes, and at least until the last round has gone up
/// whole and come down: with R rounds of up to U bytes each way per NIC, U + U / R.
Parts partsOf(Algorithm algorithm, const ShardMap& map, const Nics& nics, std::uint64_t nbytes);

/// Seconds for each part of a call: for one of each, or for all that a call has.
struct Costs {
  double message_s = 0;
  double frame_s = 0;
  double wire_s = 0;
  double work_s = 0;

  Costs times(const Parts& parts) const {
    return {message_s * parts.messages, frame_s * parts.frames, wire_s * parts.wire_bytes,
            work_s * parts.work_bytes};
  }
  double sum() const { return message_s + frame_s + wire_s + work_s; }
};

/// A way to go, and what is expected of it.
struct Estimate {
  SizeRange way;          ///< begin and end do not matter
  Costs terms;            ///< seconds for all of each part; their sum is what the model says
  double correction = 1;  ///< what was measured near this size, over what the model says there
  double seconds = 0;     ///< the sum of the terms * correction
  bool chosen = false;
};

/// The ways among which `auto` chooses without measurements of others: `direct` (but among many
/// ranks with as many standalone reducers), and with standalone reducers `mixed` and `server`. A
/// ring's bits depend on the size, so it is not among them.
std::vector<SizeRange> autoWays(const Nics& nics);

/// A Sample as Python has it: algorithm, chunk and window, ranks, hosts, servers, bytes,
/// nanoseconds.
using SampleTuple = std::tuple<std::string, std::size_t, std::size_t, std::uint32_t, std::uint32_t,
                               std::uint32_t, std::uint64_t, std::uint64_t>;
Result<std::vector<Sample>> samplesOf(const std::vector<SampleTuple>& tuples);
std::vector<SampleTuple> tuplesOf(const std::vector<Sample>& samples);

/// Predicts all-reduces from measured ones (`settings.samples`, not empty), wherever these are
/// from: the costs of the parts are fitted to all of them (least squares of relative errors, none
/// negative), and where a way of this very group was measured, its times are what the model says
/// times the ratio of measured to said, interpolated between the sizes. Deterministic, so that all
/// ranks get the same from the same samples. Immutable; thread safe.
class CostModel {
 public:
  CostModel(const Settings& settings, const Nics& nics);

  const Costs& costs() const { return costs_; }
  /// Of a call of so many bytes, in the order of autoWays(). If ways of this group were measured,
  /// of those only.
  std::vector<Estimate> estimates(std::uint64_t nbytes) const;
  /// The best way for every size; a change is made for 5% and more.
  std::vector<SizeRange> ranges() const;

 private:
  struct Way {
    SizeRange range;
    ShardMap map;
    std::vector<std::pair<double, double>> corrections;  // log2 of the bytes, ratio; rising
  };

  static double correctionAt(const Way& way, std::uint64_t nbytes);

  const Nics nics_;
  std::vector<Way> ways_;
  Costs costs_;
};

}  // namespace reducer::collective
