#include "collective/receives.h"

#include <algorithm>
#include <utility>

namespace reducer::collective {

void Receives::taken(std::uint32_t tag, Rank from, std::uint64_t seq) {
  const auto found = arrivals_.find(tag);
  if (found == arrivals_.end()) return;
  std::erase_if(found->second,
                [&](const Arrival& arrival) { return arrival.from == from && arrival.seq == seq; });
  if (found->second.empty()) arrivals_.erase(found);
}

std::vector<Receives::Match> Receives::match(
    std::uint32_t tag, const std::function<bool(Rank from, std::uint64_t seq)>& take) {
  std::vector<Match> matches;
  const auto requests = requests_.find(tag);
  const auto arrivals = arrivals_.find(tag);
  if (requests == requests_.end() || arrivals == arrivals_.end()) return matches;
  for (auto request = requests->second.begin(); request != requests->second.end();) {
    const auto arrival =
        std::find_if(arrivals->second.begin(), arrivals->second.end(), [&](const Arrival& a) {
          return (request->from == kAllRanks || request->from == a.from) && take(a.from, a.seq);
        });
    if (arrival == arrivals->second.end()) {
      ++request;
      continue;
    }
    matches.push_back({std::move(*request), arrival->from, arrival->seq});
    arrivals->second.erase(arrival);
    request = requests->second.erase(request);
  }
  if (arrivals->second.empty()) arrivals_.erase(arrivals);
  if (requests->second.empty()) requests_.erase(requests);
  return matches;
}

template <class Choose>
std::vector<Receives::Request> Receives::takeOut(Choose choose) {
  std::vector<Request> all;
  for (auto requests = requests_.begin(); requests != requests_.end();) {
    for (auto request = requests->second.begin(); request != requests->second.end();) {
      if (!choose(*request)) {
        ++request;
        continue;
      }
      all.push_back(std::move(*request));
      request = requests->second.erase(request);
    }
    requests = requests->second.empty() ? requests_.erase(requests) : std::next(requests);
  }
  return all;
}

std::uint64_t Receives::add(std::uint32_t tag, Request request) {
  request.id = ++last_id_;
  requests_[tag].push_back(std::move(request));
  return last_id_;
}

std::vector<Receives::Request> Receives::remove(std::uint64_t id) {
  return takeOut([id](const Request& request) { return request.id == id; });
}

std::vector<Receives::Request> Receives::left(Rank rank, bool was_last) {
  return takeOut([&](const Request& request) {
    return request.from == rank || (was_last && request.from == kAllRanks);
  });
}

std::vector<Receives::Request> Receives::expired(TimePoint now) {
  return takeOut([now](const Request& request) { return request.deadline <= now; });
}

std::vector<std::function<void(TimePoint)>> Receives::late(TimePoint now) {
  std::vector<std::function<void(TimePoint)>> words;
  for (auto& [tag, requests] : requests_) {
    for (Request& request : requests) {
      if (request.late_at > now || !request.late) continue;
      words.push_back(std::exchange(request.late, nullptr));
    }
  }
  return words;
}

std::vector<Receives::Request> Receives::clear() {
  return takeOut([](const Request&) { return true; });
}

}  // namespace reducer::collective
