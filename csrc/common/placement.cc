#include "common/placement.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <string_view>
#include <utility>

#include "common/check.h"

namespace reducer {

Placement::Placement(Rank world_size) : host_of_(static_cast<std::size_t>(world_size)) {
  std::iota(host_of_.begin(), host_of_.end(), 0U);
  index();
}

Placement::Placement(std::vector<std::uint32_t> host_of) : host_of_(std::move(host_of)) {
  REDUCER_CHECK(validHosts(host_of_));
  index();
}

Placement Placement::fromPlaces(std::span<const std::string> places, Rank world_size) {
  if (places.empty()) return Placement(world_size);
  REDUCER_CHECK(places.size() == static_cast<std::size_t>(world_size));
  std::map<std::string_view, std::uint32_t> numbers;
  std::vector<std::uint32_t> host_of;
  for (const std::string& place : places) {
    host_of.push_back(numbers.emplace(place, numbers.size()).first->second);
  }
  return Placement(std::move(host_of));
}

bool Placement::validHosts(std::span<const std::uint32_t> host_of) {
  std::uint32_t next = 0;
  for (const std::uint32_t host : host_of) {
    if (host > next) return false;
    if (host == next) ++next;
  }
  return !host_of.empty();
}

void Placement::index() {
  for (Rank rank = 0; rank < worldSize(); ++rank) {
    const std::uint32_t host = host_of_[rank];
    if (host == ranks_of_.size()) ranks_of_.emplace_back();
    ranks_of_[host].push_back(rank);
    widest_ = std::max(widest_, static_cast<Rank>(ranks_of_[host].size()));
  }
}

std::string describeHosts(std::span<const std::uint32_t> host_of) {
  constexpr std::size_t kShown = 64;
  if (host_of.empty()) return "one for each rank";
  std::string text;
  for (std::size_t rank = 0; rank < std::min(host_of.size(), kShown); ++rank) {
    text += (rank ? " " : "") + std::to_string(host_of[rank]);
  }
  return host_of.size() > kShown ? text + " ..." : text;
}

}  // namespace reducer
