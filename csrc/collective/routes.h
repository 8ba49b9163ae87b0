// Which way a call goes: the algorithm and the shard map for its size.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/settings.h"
#include "collective/shard_map.h"
#include "collective/shares.h"

namespace reducer::collective {

/// The ways of a group's calls. Equal on all ranks, whose settings and NICs are. Immutable after
/// construction; thread safe.
///
/// Ranks that disagree must meet, whatever way each one's call would go. So the coordinator of an
/// operation, where calls are compared, depends on its number alone: it is an owner of every map if
/// there is one, else of the map of the smallest calls, which an empty chunk beside their data
/// would cost most.
class Routes {
 public:
  struct Route {
    SizeRange range;  ///< its algorithm is not kAuto
    std::size_t map = 0;
  };

  Routes(const Settings& settings, const Nics& nics);

  /// The way of a call of so many bytes.
  const Route& at(std::uint64_t nbytes) const;
  const ShardMap& mapOf(const Route& route) const { return maps_[route.map]; }
  /// That of the largest calls, and of transfers that one owner has to itself.
  const ShardMap& map() const { return maps_[routes_.back().map]; }
  const std::vector<Route>& all() const { return routes_; }
  std::vector<SizeRange> ranges() const;
  /// kAuto: it depends on the size.
  Algorithm algorithm() const;
  bool several() const { return maps_.size() > 1; }

  /// Owner of chunk 0 of operation `seq`.
  OwnerIndex coordinator(std::uint64_t seq) const {
    return coordinators_[seq % coordinators_.size()];
  }
  /// Of all maps, rising.
  const std::vector<OwnerIndex>& owners() const { return owners_; }
  /// Most chunk bytes that one worker has outstanding at this owner: what the largest of the maps
  /// asks for.
  std::size_t windowBytes(OwnerIndex owner) const;
  std::size_t windowBytesTotal() const;

 private:
  std::vector<Route> routes_;
  std::vector<ShardMap> maps_;
  std::vector<OwnerIndex> owners_;
  std::vector<OwnerIndex> coordinators_;
};

}  // namespace reducer::collective
