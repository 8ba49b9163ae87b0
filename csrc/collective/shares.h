// How much of a tensor each owner gets, so that the busiest NIC carries as little as possible for
// its speed.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/settings.h"

namespace reducer::collective {

/// The NICs that a group's bytes go through, each with its bandwidth in any unit that all share
/// (only ratios count). Ranks of one host share its NIC.
struct Nics {
  std::vector<std::uint32_t> host_of_rank;  ///< 0 .. hosts.size() - 1
  std::vector<std::uint64_t> hosts;         ///< bandwidth of each host of workers, not 0
  std::vector<std::uint64_t> servers;       ///< bandwidth of each standalone reducer, not 0

  /// n workers, k standalone reducers, each on a host of its own, all as fast.
  static Nics equal(std::uint32_t n, std::uint32_t k);
  bool operator==(const Nics&) const = default;
};

/// What takes part in an exchange: every rank, or one stream for each host, whose ranks have summed
/// among themselves.
enum class Senders { kRanks, kHosts };

/// The weights of a group's owners by OwnerIndex (ranks, then standalone reducers); 0: owns
/// nothing. `algorithm`: kServer: by the reducers' bandwidths; kMixed: the shares that make
///
///     max over hosts of (bytes through the host, the busier direction) / bandwidth
///
/// least; kDirect (and kRing): the same without the standalone reducers. Bytes between ranks of one
/// host go through no NIC. Where several shares are as good, as much as possible goes to the
/// standalone reducers. Exact, in integers, so that all ranks get the same; for more hosts of
/// different sizes than a common multiple of 65,536 can tell apart, and for bandwidths that differ
/// by more than 1 : 65,535, rounded. If all ranks are on one host, as if each had a NIC like it.
///
/// n senders of which one alone has the NIC b and owns the share y push 1 - y and, as an owner,
/// send (n - 1) y; so it carries 1 + (n - 2) y, and a standalone reducer with the share x carries
/// n x (docs/algorithms.md).
std::vector<std::uint64_t> ownerWeights(Algorithm algorithm, const Nics& nics,
                                        Senders senders = Senders::kRanks);

}  // namespace reducer::collective
