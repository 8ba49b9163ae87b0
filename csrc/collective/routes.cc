#include "collective/routes.h"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace reducer::collective {
namespace {

/// The ranges of the settings, with what `auto` stands for.
std::vector<SizeRange> resolved(const Settings& settings, std::uint32_t k) {
  std::vector<SizeRange> ranges = settings.ranges;
  if (ranges.empty()) ranges.push_back({.algorithm = settings.algorithm});
  for (SizeRange& range : ranges) {
    range.algorithm = ShardMap::resolve(range.algorithm, k);
    if (range.chunk_bytes == 0) range.chunk_bytes = settings.chunk_bytes;
    if (range.window_bytes == 0) range.window_bytes = settings.window_bytes;
  }
  return ranges;
}

}  // namespace

Routes::Routes(const Settings& settings, const Nics& nics) {
  const auto k = static_cast<std::uint32_t>(nics.servers.size());
  using Key = std::tuple<std::vector<std::uint64_t>, std::size_t, std::size_t>;
  std::vector<Key> keys;
  for (const SizeRange& range : resolved(settings, k)) {
    Key key{ownerWeights(range.algorithm, nics), range.chunk_bytes, range.window_bytes};
    const std::size_t map = std::find(keys.begin(), keys.end(), key) - keys.begin();
    if (map == keys.size()) {
      maps_.emplace_back(std::get<0>(key), range.chunk_bytes, range.window_bytes);
      keys.push_back(std::move(key));
    }
    routes_.push_back({range, map});
  }
  coordinators_ = maps_[routes_.front().map].owners();
  std::vector<OwnerIndex> common = coordinators_;
  for (const ShardMap& map : maps_) {
    std::vector<OwnerIndex> all;
    std::set_union(owners_.begin(), owners_.end(), map.owners().begin(), map.owners().end(),
                   std::back_inserter(all));
    owners_.swap(all);
    std::erase_if(common, [&](OwnerIndex owner) { return !map.owns(owner); });
  }
  if (!common.empty()) coordinators_.swap(common);
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

std::size_t Routes::windowBytesTotal() const {
  std::size_t total = 0;
  for (const OwnerIndex owner : owners_) total += windowBytes(owner);
  return total;
}

}  // namespace reducer::collective
