// Which way a call goes: the algorithm and the shard map for its size.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/cost_model.h"
#include "collective/settings.h"
#include "collective/shard_map.h"
#include "collective/shares.h"

namespace reducer::collective {

/// The ways of a group's calls. Equal on all ranks, whose settings and NICs are. Thread safe, but
/// for adopt(), during which nothing else may be called.
///
/// Ranks that disagree must meet, whatever way each one's call would go. So the coordinator of an
/// operation, where calls are compared, depends on its number alone: it is an owner of every map in
/// use if there is one, else of the map of the smallest calls, which an empty chunk beside their
/// data would cost most.
class Routes {
 public:
  struct Route {
    SizeRange range;  ///< its algorithm is not kAuto
    std::size_t map = 0;
  };

  Routes(const Settings& settings, const Nics& nics);

  /// Goes by these samples from now on. In a group made with Settings::measures, which has the
  /// maps.
  void adopt(const std::vector<Sample>& samples);

  /// The way of a call of so many bytes.
  const Route& at(std::uint64_t nbytes) const;
  const ShardMap& mapOf(const Route& route) const { return maps_[route.map]; }
  /// That of the largest calls, and of transfers that one owner has to itself.
  const ShardMap& map() const { return maps_[routes_.back().map]; }
  /// What each map was made for, by Route::map.
  const std::vector<SizeRange>& mapWays() const { return map_ways_; }
  /// The way of an algorithm that is in use or that `auto` may choose; of others that of the
  /// largest calls.
  const Route& by(Algorithm algorithm) const;
  std::vector<Algorithm> choices() const;  ///< Group::choices()
  /// Group::explain().
  std::vector<Estimate> explain(std::uint64_t nbytes) const;
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
  /// Of any map.
  std::size_t chunkBytesMax() const;

 private:
  /// The route of a range; its map is made if there is none like it.
  Route routeOf(const SizeRange& range);
  void chooseCoordinators();

  Settings settings_;
  const Nics nics_;
  std::vector<Route> routes_;
  std::vector<Route> more_;  // that `auto` may choose, once it has measured
  std::vector<ShardMap> maps_;
  std::vector<SizeRange> map_ways_;  // beside maps_
  std::vector<OwnerIndex> owners_;
  std::vector<OwnerIndex> coordinators_;
};

}  // namespace reducer::collective
