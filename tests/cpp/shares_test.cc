#include "collective/shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace reducer::collective {
namespace {

/// The busiest NIC's bytes over its bandwidth for a tensor of one byte, counted message by message.
double timeOf(const Nics& nics, const std::vector<double>& shares, bool by_host) {
  const std::size_t n = nics.host_of_rank.size();
  const std::size_t h = nics.hosts.size();
  std::vector<double> out(h + nics.servers.size(), 0);
  // One sender for each rank or each host, and the owners at their places.
  std::vector<std::size_t> senders;
  if (by_host) {
    for (std::size_t host = 0; host < h; ++host) senders.push_back(host);
  } else {
    senders.assign(nics.host_of_rank.begin(), nics.host_of_rank.end());
  }
  for (std::size_t owner = 0; owner < shares.size(); ++owner) {
    const std::size_t place = owner < n ? nics.host_of_rank[owner] : h + owner - n;
    for (const std::size_t sender : senders) {
      if (sender == place) continue;
      out[sender] += shares[owner];  // a push
      out[place] += shares[owner];   // and its result; what goes in is the same turned round
    }
  }
  double time = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double bandwidth = static_cast<double>(i < h ? nics.hosts[i] : nics.servers[i - h]);
    time = std::max(time, out[i] / bandwidth);
  }
  return time;
}

std::vector<double> normal(const std::vector<std::uint64_t>& weights) {
  const double total =
      static_cast<double>(std::accumulate(weights.begin(), weights.end(), std::uint64_t{0}));
  std::vector<double> shares;
  for (const std::uint64_t weight : weights) shares.push_back(static_cast<double>(weight) / total);
  return shares;
}

/// The least time over a grid of shares, equal for the ranks of a host.
double leastTime(const Nics& nics, bool by_host, int steps) {
  const std::size_t h = nics.hosts.size();
  const std::size_t parts = h + nics.servers.size();
  std::vector<int> counts(nics.hosts.size(), 0);
  for (const std::uint32_t host : nics.host_of_rank) ++counts[host];
  std::vector<int> split(parts, 0);
  double least = 1e9;
  const auto visit = [&](auto&& self, std::size_t part, int left) -> void {
    if (part + 1 == parts) {
      split[part] = left;
      std::vector<double> shares;
      for (const std::uint32_t host : nics.host_of_rank)
        shares.push_back(1.0 * split[host] / steps / counts[host]);
      for (std::size_t s = h; s < parts; ++s) shares.push_back(1.0 * split[s] / steps);
      least = std::min(least, timeOf(nics, shares, by_host));
      return;
    }
    for (int take = 0; take <= left; ++take) {
      split[part] = take;
      self(self, part + 1, left - take);
    }
  };
  visit(visit, 0, steps);
  return least;
}

TEST(Shares, EqualNicsGiveTheSharesOfTheFormula) {
  for (std::uint64_t n = 2; n <= 64; ++n) {
    for (std::uint64_t k = 0; k <= n + 2; ++k) {
      const auto weights = ownerWeights(Algorithm::kMixed, Nics::equal(n, k));
      ASSERT_EQ(weights.size(), n + k);
      const std::uint64_t worker = k < n ? n - k : 0;
      for (std::uint64_t owner = 0; owner < n + k; ++owner) {
        const std::uint64_t expected = owner < n ? worker : 2 * (n - 1);
        const std::uint64_t other = k > 0 ? 2 * (n - 1) : worker;
        ASSERT_EQ(weights[owner] * other, expected * weights.back()) << n << " " << k;
      }
    }
  }
}

TEST(Shares, DirectAndServerOfEqualNicsAreEqual) {
  EXPECT_EQ(ownerWeights(Algorithm::kDirect, Nics::equal(3, 2)),
            (std::vector<std::uint64_t>{1, 1, 1, 0, 0}));
  EXPECT_EQ(ownerWeights(Algorithm::kRing, Nics::equal(2, 1)),
            (std::vector<std::uint64_t>{1, 1, 0}));
  EXPECT_EQ(ownerWeights(Algorithm::kServer, Nics::equal(3, 2)),
            (std::vector<std::uint64_t>{0, 0, 0, 1, 1}));
  EXPECT_EQ(ownerWeights(Algorithm::kMixed, Nics::equal(1, 2)),
            (std::vector<std::uint64_t>{1, 0, 0}));
  EXPECT_EQ(ownerWeights(Algorithm::kDirect, Nics::equal(1, 0)), std::vector<std::uint64_t>{1});
}

TEST(Shares, ServersOwnByTheirBandwidth) {
  Nics nics = Nics::equal(4, 2);
  nics.servers = {10'000'000'000, 25'000'000'000};
  EXPECT_EQ(ownerWeights(Algorithm::kServer, nics), (std::vector<std::uint64_t>{0, 0, 0, 0, 2, 5}));
}

TEST(Shares, RanksOfOneHostCountAsOne) {
  // 4 hosts x 2 ranks + 4 reducers: as 4 workers + 4 reducers; + 2: as 4 workers + 2.
  Nics nics{{0, 0, 1, 1, 2, 2, 3, 3}, {1, 1, 1, 1}, {1, 1}};
  for (const Senders senders : {Senders::kRanks, Senders::kHosts}) {
    // n = 4, k = 2: a reducer 2(n-1) = 6, a host n-k = 2, in two halves.
    EXPECT_EQ(ownerWeights(Algorithm::kMixed, nics, senders),
              (std::vector<std::uint64_t>{1, 1, 1, 1, 1, 1, 1, 1, 6, 6}));
  }
}

TEST(Shares, NoGridOfSharesIsBetter) {
  std::mt19937 random(7);
  for (int round = 0; round < 400; ++round) {
    Nics nics;
    const std::size_t hosts = 1 + random() % 3;
    const std::size_t n = hosts + random() % 4;
    for (std::size_t rank = 0; rank < n; ++rank)
      nics.host_of_rank.push_back(rank < hosts ? rank : random() % hosts);
    const bool equal = random() % 4 == 0;
    for (std::size_t i = 0; i < hosts; ++i) nics.hosts.push_back(equal ? 1 : 1 + random() % 40);
    for (std::size_t i = random() % 3; i > 0; --i)
      nics.servers.push_back(equal ? 1 : 1 + random() % 40);
    if (hosts == 1 && n > 1) continue;  // no NIC carries anything
    for (const Senders senders : {Senders::kRanks, Senders::kHosts}) {
      const bool by_host = senders == Senders::kHosts;
      for (const Algorithm algorithm : {Algorithm::kMixed, Algorithm::kDirect}) {
        Nics used = nics;
        if (algorithm == Algorithm::kDirect) used.servers.clear();
        const auto weights = ownerWeights(algorithm, nics, senders);
        ASSERT_EQ(weights.size(), n + nics.servers.size());
        std::vector<std::uint64_t> owners(
            weights.begin(),
            weights.begin() + static_cast<std::ptrdiff_t>(n + used.servers.size()));
        const double time = timeOf(used, normal(owners), by_host);
        ASSERT_LE(time, leastTime(used, by_host, 24) * (1 + 1e-9)) << "round " << round;
      }
    }
  }
}

TEST(Shares, TheWholeTensorIsGivenOutWhateverTheSizes) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 300; ++round) {
    Nics nics;
    const std::size_t hosts = 2 + random() % 60;
    for (std::size_t host = 0; host < hosts; ++host) {
      nics.hosts.push_back(1 + random() % 400'000'000'000);
      for (std::size_t rank = 1 + random() % 12; rank > 0; --rank)
        nics.host_of_rank.push_back(host);
    }
    for (std::size_t i = random() % 60; i > 0; --i)
      nics.servers.push_back(1 + random() % 400'000'000'000);
    const auto weights = ownerWeights(Algorithm::kMixed, nics);
    std::uint64_t total = 0;
    for (const std::uint64_t weight : weights) {
      ASSERT_LE(weight, std::uint64_t{1} << 41);
      total += weight;
    }
    ASSERT_GT(total, 0u);
    // Rounded bandwidths and multiples: near the exact optimum, and never nonsense.
    const double time = timeOf(nics, normal(weights), false);
    const auto direct = ownerWeights(Algorithm::kDirect, nics);
    ASSERT_LE(time, timeOf(nics, normal(direct), false) * 1.01);
  }
}

TEST(Shares, TheLargestWorldsStayWithinTheArithmetic) {
  Nics nics;
  for (std::uint32_t host = 0; host < 2000; ++host) {
    nics.hosts.push_back(host % 7 == 0 ? 400'000'000'000 : 999'999'937);
    for (std::uint32_t rank = 0; rank < 1 + host % 3; ++rank) nics.host_of_rank.push_back(host);
  }
  nics.servers.assign(1000, 123'456'789'011);
  const auto weights = ownerWeights(Algorithm::kMixed, nics);
  const double time = timeOf(nics, normal(weights), false);
  const double direct = timeOf(nics, normal(ownerWeights(Algorithm::kDirect, nics)), false);
  EXPECT_LT(time, direct);
}

}  // namespace
}  // namespace reducer::collective
