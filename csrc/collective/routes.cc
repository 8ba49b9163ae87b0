#include "collective/routes.h"

#include <algorithm>
#include <iterator>

#include "common/check.h"

namespace reducer::collective {
namespace {

/// What the settings say, or `auto` for every size.
std::vector<SizeRange> given(const Settings& settings) {
  if (!settings.ranges.empty()) return settings.ranges;
  return {{.algorithm = settings.algorithm}};
}

/// A way within a range that the settings give.
SizeRange within(const SizeRange& range, SizeRange way, const Settings& settings) {
  way.begin = std::max(way.begin, range.begin);
  way.end = std::min(way.end, range.end);
  if (range.chunk_bytes != 0) way.chunk_bytes = range.chunk_bytes;
  if (range.window_bytes != 0) way.window_bytes = range.window_bytes;
  if (way.chunk_bytes == 0) way.chunk_bytes = settings.chunk_bytes;
  if (way.window_bytes == 0) way.window_bytes = settings.window_bytes;
  return way;
}

/// The ranges of the settings, with what `auto` stands for.
std::vector<SizeRange> resolved(const Settings& settings, const Nics& nics) {
  std::vector<SizeRange> ranges;
  for (const SizeRange& range : given(settings)) {
    std::vector<SizeRange> parts{{.algorithm = range.algorithm}};
    if (range.algorithm == Algorithm::kAuto) {
      if (settings.samples.empty()) {
        const auto k = static_cast<std::uint32_t>(nics.servers.size());
        parts[0].algorithm = ShardMap::resolve(Algorithm::kAuto, k);
      } else {
        parts = CostModel(settings, nics).ranges();
      }
    }
    for (const SizeRange& part : parts) {
      const SizeRange way = within(range, part, settings);
      if (way.begin < way.end) ranges.push_back(way);
    }
  }
  return ranges;
}

}  // namespace

Routes::Routes(const Settings& settings, const Nics& nics) : settings_(settings), nics_(nics) {
  for (const SizeRange& range : resolved(settings_, nics_)) routes_.push_back(routeOf(range));
  coordinators_ = maps_[routes_.front().map].owners();
  if (settings_.measures) {
    for (const SizeRange& range : given(settings_)) {
      if (range.algorithm != Algorithm::kAuto) continue;
      for (const SizeRange& way : autoWays(nics_))
        more_.push_back(routeOf(within(range, way, settings_)));
    }
  }
  for (const ShardMap& map : maps_) {
    std::vector<OwnerIndex> all;
    std::set_union(owners_.begin(), owners_.end(), map.owners().begin(), map.owners().end(),
                   std::back_inserter(all));
    owners_.swap(all);
  }
  chooseCoordinators();
}

// Those of the smallest calls, to which an empty chunk more would cost most, and of them the ones
// that all ways have, if there are such.
void Routes::chooseCoordinators() {
  coordinators_ = maps_[routes_.front().map].owners();
  std::vector<OwnerIndex> common = coordinators_;
  for (const Route& route : routes_) {
    std::erase_if(common, [&](OwnerIndex owner) { return !maps_[route.map].owns(owner); });
  }
  if (!common.empty()) coordinators_.swap(common);
}

Routes::Route Routes::routeOf(const SizeRange& range) {
  const std::vector<std::uint64_t> weights = ownerWeights(range.algorithm, nics_);
  for (std::size_t map = 0; map < maps_.size(); ++map) {
    const SizeRange& known = map_ways_[map];
    if (known.chunk_bytes == range.chunk_bytes && known.window_bytes == range.window_bytes &&
        ownerWeights(known.algorithm, nics_) == weights) {
      return {range, map};
    }
  }
  maps_.emplace_back(weights, range.chunk_bytes, range.window_bytes);
  map_ways_.push_back(range);
  return {range, maps_.size() - 1};
}

void Routes::adopt(const std::vector<Sample>& samples) {
  REDUCER_CHECK(settings_.measures);
  settings_.samples = samples;
  const std::size_t maps = maps_.size();
  routes_.clear();
  for (const SizeRange& range : resolved(settings_, nics_)) routes_.push_back(routeOf(range));
  REDUCER_CHECK(maps_.size() == maps);  // transfers and links know these maps
  chooseCoordinators();
}

const Routes::Route& Routes::by(Algorithm algorithm) const {
  for (const auto* all : {&more_, &routes_}) {
    for (const Route& route : *all) {
      if (route.range.algorithm == algorithm) return route;
    }
  }
  return routes_.back();
}

std::vector<Algorithm> Routes::choices() const {
  std::vector<Algorithm> all;
  for (const Route& route : more_) {
    if (std::find(all.begin(), all.end(), route.range.algorithm) == all.end())
      all.push_back(route.range.algorithm);
  }
  return all;
}

std::vector<Estimate> Routes::explain(std::uint64_t nbytes) const {
  if (settings_.samples.empty()) return {};
  const SizeRange& chosen = at(nbytes).range;
  std::vector<Estimate> all = CostModel(settings_, nics_).estimates(nbytes);
  for (Estimate& one : all) {
    one.chosen = one.way.algorithm == chosen.algorithm &&
                 (one.way.chunk_bytes == 0 || one.way.chunk_bytes == chosen.chunk_bytes) &&
                 (one.way.window_bytes == 0 || one.way.window_bytes == chosen.window_bytes);
  }
  return all;
}

const Routes::Route& Routes::at(std::uint64_t nbytes) const {
  std::size_t i = 0;
  while (i + 1 < routes_.size() && nbytes >= routes_[i].range.end) ++i;
  return routes_[i];
}

std::vector<SizeRange> Routes::ranges() const {
  std::vector<SizeRange> ranges;
  for (const Route& route : routes_) ranges.push_back(route.range);
  return ranges;
}

Algorithm Routes::algorithm() const {
  const Algorithm first = routes_.front().range.algorithm;
  const bool same = std::all_of(routes_.begin(), routes_.end(),
                                [&](const Route& route) { return route.range.algorithm == first; });
  return same ? first : Algorithm::kAuto;
}

std::size_t Routes::windowBytes(OwnerIndex owner) const {
  const bool owned = std::binary_search(owners_.begin(), owners_.end(), owner);
  std::size_t largest = 0;
  for (const ShardMap& map : maps_) {
    if (owned && !map.owns(owner)) continue;
    largest = std::max(largest, map.windowBytes(owner));
  }
  return largest;
}

std::size_t Routes::chunkBytesMax() const {
  std::size_t largest = 0;
  for (const ShardMap& map : maps_) largest = std::max(largest, map.chunkBytes());
  return largest;
}

std::size_t Routes::windowBytesTotal() const {
  std::size_t total = 0;
  for (const OwnerIndex owner : owners_) total += windowBytes(owner);
  return total;
}

}  // namespace reducer::collective
