// Which ranks share a host, and what follows from it: the order of a sum, and who carries what out
// of a host.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/types.h"

namespace reducer {

/// The ranks of a group on their hosts. Hosts are numbered by their lowest rank: the host of rank 0
/// is 0, that of the lowest rank elsewhere 1, and so on, so that equal placements have equal
/// numbers.
///
/// The order of every sum follows from it. With levels(): the ranks of each host are summed in rank
/// order, and the host's sum is rounded as a result is; then the hosts' sums are summed in the
/// order of the hosts. Without: all ranks in rank order.
///
/// Immutable; thread safe.
class Placement {
 public:
  /// Every rank has a host of its own.
  explicit Placement(Rank world_size = 1);
  /// `host_of[r]`: the host of rank r; validHosts() must hold.
  explicit Placement(std::vector<std::uint32_t> host_of);
  /// Ranks with equal texts share a host. No texts: every rank has a host of its own.
  static Placement fromPlaces(std::span<const std::string> places, Rank world_size);

  /// True if the hosts are numbered by their lowest rank.
  static bool validHosts(std::span<const std::uint32_t> host_of);

  Rank worldSize() const { return static_cast<Rank>(host_of_.size()); }
  Rank hosts() const { return static_cast<Rank>(ranks_of_.size()); }
  Rank hostOf(Rank rank) const { return static_cast<Rank>(host_of_[rank]); }
  /// By rank, as given to the constructor.
  const std::vector<std::uint32_t>& hostOfRanks() const { return host_of_; }
  /// The ranks of a host, ascending.
  std::span<const Rank> ranksOf(Rank host) const { return ranks_of_[host]; }

  /// Most ranks on one host: the number of shares that a tensor is cut into on its way between
  /// hosts.
  Rank widest() const { return widest_; }
  /// The rank that carries a share on a host. A host with fewer ranks than shares has each of them
  /// carry several.
  Rank carrier(Rank host, Rank share) const {
    const std::vector<Rank>& ranks = ranks_of_[host];
    return ranks[static_cast<std::size_t>(share) % ranks.size()];
  }
  bool carries(Rank rank, Rank share) const { return carrier(hostOf(rank), share) == rank; }

  /// Several hosts, and one of them with several ranks.
  bool levels() const { return hosts() > 1 && widest_ > 1; }

  bool operator==(const Placement& other) const { return host_of_ == other.host_of_; }

 private:
  void index();

  std::vector<std::uint32_t> host_of_;
  std::vector<std::vector<Rank>> ranks_of_;
  Rank widest_ = 1;
};

/// "0 0 1 1": the host of every rank, for messages; "one for each rank" for an empty one.
std::string describeHosts(std::span<const std::uint32_t> host_of);

}  // namespace reducer
