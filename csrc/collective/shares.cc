#include "collective/shares.h"

#include <algorithm>
#include <numeric>

#include "common/check.h"

namespace reducer::collective {
namespace {

using Wide = __int128;

// Bounds that keep all products below 2^127: of bandwidths, and of common multiples.
constexpr std::uint64_t kBandwidthMax = 65'535;
constexpr std::uint64_t kMultipleMax = 65'536;
// Of the weights that come out: sums and products with a tensor's size fit Plan's arithmetic.
constexpr std::uint64_t kWeightMax = std::uint64_t{1} << 40;

/// A host of workers: with the share Y of all bytes it carries `fixed + slope * Y`.
struct Host {
  Wide bandwidth = 1;
  Wide fixed = 0;
  Wide slope = 0;
  std::uint64_t ranks = 0;
};

Wide gcd(Wide a, Wide b) {
  while (b != 0) {
    const Wide rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

std::uint64_t commonMultiple(std::uint64_t a, std::uint64_t b) {
  return std::min(std::lcm(a, b), kMultipleMax);
}

/// The same ratios in numbers up to kBandwidthMax.
void scaleDown(std::vector<std::uint64_t>& hosts, std::vector<std::uint64_t>& servers) {
  std::uint64_t divisor = 0;
  std::uint64_t largest = 0;
  const auto each = [&](const auto& change) {
    for (std::vector<std::uint64_t>* all : {&hosts, &servers}) {
      for (std::uint64_t& bandwidth : *all) change(bandwidth);
    }
  };
  each([&](std::uint64_t& bandwidth) {
    REDUCER_CHECK(bandwidth > 0);
    divisor = std::gcd(divisor, bandwidth);
  });
  each([&](std::uint64_t& bandwidth) { largest = std::max(largest, bandwidth /= divisor); });
  if (largest <= kBandwidthMax) return;
  each([&](std::uint64_t& bandwidth) {
    const Wide scaled = static_cast<Wide>(bandwidth) * kBandwidthMax / largest;
    bandwidth = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(scaled));
  });
}

/// What is minimised, and its solution in integers: shares with a common denominator.
class Problem {
 public:
  Problem(std::vector<Host> hosts, std::vector<Wide> servers, Wide server_load)
      : hosts_(std::move(hosts)), servers_(std::move(servers)), server_load_(server_load) {
    std::uint64_t multiple = 1;
    for (const Host& host : hosts_) {
      if (host.slope != 0) {
        multiple = commonMultiple(
            multiple, static_cast<std::uint64_t>(host.slope < 0 ? -host.slope : host.slope));
      }
    }
    multiple_ = multiple;
    for (const Wide bandwidth : servers_) server_total_ += bandwidth;
  }

  /// Shares of the hosts, then of the standalone reducers.
  std::vector<Wide> solve() const {
    // No time is shorter than the one in which every host's own bytes get through.
    Wide least = 0;
    Wide least_over = 1;
    bool rises = true;
    for (const Host& host : hosts_) {
      const Wide bytes = std::min(host.fixed, host.fixed + host.slope);
      if (bytes * least_over > least * host.bandwidth) {
        least = bytes;
        least_over = host.bandwidth;
      }
      rises = rises && host.slope > 0;
    }
    if (rises) {
      // The time at which all that the hosts and reducers can take is the whole tensor:
      // sum of (T b - fixed) / slope + sum of T B / load = 1.
      Wide time = multiple_;
      Wide over = multiple_ * server_total_;
      for (const Host& host : hosts_) {
        time += host.fixed * (multiple_ / host.slope);
        over += server_load_ * host.bandwidth * (multiple_ / host.slope);
      }
      time *= server_load_;
      if (time * least_over >= least * over) return tight(time, over);
    }
    return slack(least, least_over);
  }

 private:
  /// Every host and reducer takes all that it can in the time: there is one solution.
  std::vector<Wide> tight(Wide time, Wide over) const {
    const Wide common = gcd(time, over);
    time /= common;
    over /= common;
    std::vector<Wide> shares;
    for (const Host& host : hosts_) {
      shares.push_back(server_load_ * (multiple_ / host.slope) *
                       (time * host.bandwidth - host.fixed * over));
    }
    for (const Wide bandwidth : servers_) shares.push_back(multiple_ * time * bandwidth);
    return shares;
  }

  /// There is room: first to the standalone reducers, then to the hosts by what they can take.
  std::vector<Wide> slack(Wide time, Wide over) const {
    const Wide unit = over * multiple_;  // the denominator of `must` and `room`
    std::vector<Wide> must;
    std::vector<Wide> room;
    Wide must_total = 0;
    Wide room_total = 0;
    for (const Host& host : hosts_) {
      const Wide spare = time * host.bandwidth - host.fixed * over;
      // A host with most of the ranks carries less the more it owns.
      const bool falls = host.slope < 0 && spare < 0;
      must.push_back(falls ? spare * (multiple_ / host.slope) : 0);
      room.push_back(host.slope > 0 ? spare * (multiple_ / host.slope) : unit - must.back());
      must_total += must.back();
      room_total += room.back();
    }
    const Wide open = server_load_ * (unit - must_total);
    const Wide servers_take = multiple_ * time * server_total_;
    const bool enough = servers_take >= open;
    const Wide denominator = enough ? std::max<Wide>(1, server_total_) : room_total;
    std::vector<Wide> shares;
    for (std::size_t h = 0; h < hosts_.size(); ++h) {
      const Wide taken = enough ? 0 : (open - servers_take) * room[h];
      shares.push_back(server_load_ * must[h] * denominator + taken);
    }
    for (const Wide bandwidth : servers_) {
      shares.push_back(enough ? open * bandwidth : multiple_ * time * bandwidth * denominator);
    }
    return shares;
  }

  const std::vector<Host> hosts_;
  const std::vector<Wide> servers_;
  const Wide server_load_;
  Wide server_total_ = 0;
  Wide multiple_ = 1;
};

std::vector<std::uint64_t> reduced(std::vector<Wide> weights) {
  Wide divisor = 0;
  Wide largest = 0;
  for (const Wide weight : weights) {
    divisor = gcd(divisor, weight);
    largest = std::max(largest, weight);
  }
  if (divisor == 0) divisor = 1;
  int shift = 0;
  while ((largest / divisor >> shift) > static_cast<Wide>(kWeightMax)) ++shift;
  std::vector<std::uint64_t> all;
  for (const Wide weight : weights)
    all.push_back(static_cast<std::uint64_t>((weight / divisor) >> shift));
  return all;
}

std::vector<std::uint64_t> mixedWeights(const Nics& nics, Senders senders) {
  const std::size_t n = nics.host_of_rank.size();
  std::vector<Host> hosts(nics.hosts.size());
  for (const std::uint32_t host : nics.host_of_rank) ++hosts[host].ranks;
  const bool by_host = senders == Senders::kHosts;
  const auto senders_count = static_cast<Wide>(by_host ? hosts.size() : n);
  std::uint64_t ranks_multiple = 1;
  for (std::size_t h = 0; h < hosts.size(); ++h) {
    Host& host = hosts[h];
    host.bandwidth = static_cast<Wide>(nics.hosts[h]);
    host.fixed = by_host ? 1 : static_cast<Wide>(host.ranks);
    host.slope = senders_count - 2 * host.fixed;
    ranks_multiple = commonMultiple(ranks_multiple, host.ranks);
  }
  const std::vector<Wide> servers(nics.servers.begin(), nics.servers.end());
  const std::vector<Wide> shares = Problem(hosts, servers, senders_count).solve();
  std::vector<Wide> weights;
  // What a host owns, its ranks share equally.
  for (const std::uint32_t host : nics.host_of_rank)
    weights.push_back(shares[host] * (ranks_multiple / hosts[host].ranks));
  for (std::size_t s = 0; s < servers.size(); ++s)
    weights.push_back(shares[hosts.size() + s] * ranks_multiple);
  return reduced(std::move(weights));
}

}  // namespace

Nics Nics::equal(std::uint32_t n, std::uint32_t k) {
  Nics nics;
  nics.host_of_rank.resize(n);
  std::iota(nics.host_of_rank.begin(), nics.host_of_rank.end(), 0);
  nics.hosts.assign(n, 1);
  nics.servers.assign(k, 1);
  return nics;
}

std::vector<std::uint64_t> ownerWeights(Algorithm algorithm, const Nics& nics, Senders senders) {
  const std::size_t n = nics.host_of_rank.size();
  const std::size_t k = nics.servers.size();
  REDUCER_CHECK(n > 0 && (algorithm != Algorithm::kServer || k > 0));
  Nics scaled = nics;
  if (nics.hosts.size() == 1) {
    scaled = Nics::equal(static_cast<std::uint32_t>(n), static_cast<std::uint32_t>(k));
    scaled.hosts.assign(n, nics.hosts[0]);
    scaled.servers = nics.servers;
  }
  if (algorithm == Algorithm::kServer) {
    std::vector<std::uint64_t> none;
    scaleDown(none, scaled.servers);
    std::vector<std::uint64_t> weights(n, 0);
    weights.insert(weights.end(), scaled.servers.begin(), scaled.servers.end());
    return weights;
  }
  if (algorithm != Algorithm::kMixed) scaled.servers.clear();
  scaleDown(scaled.hosts, scaled.servers);
  std::vector<std::uint64_t> weights = mixedWeights(scaled, senders);
  weights.resize(n + k, 0);
  return weights;
}

}  // namespace reducer::collective
