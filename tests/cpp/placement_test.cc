#include "common/placement.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace reducer {
namespace {

TEST(Placement, HostsAreNumberedByTheirLowestRank) {
  const std::vector<std::string> places{"b", "a", "b", "c", "a"};
  const Placement placement = Placement::fromPlaces(places, 5);
  EXPECT_EQ(placement.hostOfRanks(), (std::vector<std::uint32_t>{0, 1, 0, 2, 1}));
  EXPECT_EQ(placement.hosts(), 3);
  EXPECT_EQ(placement.widest(), 2);
  EXPECT_TRUE(placement.levels());
  EXPECT_EQ(describeHosts(placement.hostOfRanks()), "0 1 0 2 1");
}

TEST(Placement, OneLevelWhereNobodySharesAHostOrAllDo) {
  EXPECT_FALSE(Placement::fromPlaces({}, 4).levels());
  EXPECT_EQ(Placement::fromPlaces({}, 4), Placement(4));
  EXPECT_FALSE(Placement(std::vector<std::uint32_t>{0, 0, 0}).levels());
  EXPECT_FALSE(Placement(1).levels());
}

TEST(Placement, OnlyTheOneNumberingIsValid) {
  using Hosts = std::vector<std::uint32_t>;
  EXPECT_TRUE(Placement::validHosts(Hosts{0, 1, 0, 2}));
  EXPECT_FALSE(Placement::validHosts(Hosts{}));
  EXPECT_FALSE(Placement::validHosts(Hosts{1, 0}));
  EXPECT_FALSE(Placement::validHosts(Hosts{0, 2, 1}));
}

TEST(Placement, EveryShareHasOneCarrierOnEveryHostAndEveryRankCarriesOne) {
  std::mt19937 random(5);
  for (int round = 0; round < 500; ++round) {
    const auto n = static_cast<Rank>(1 + random() % 40);
    std::vector<std::string> places;
    const unsigned hosts = 1 + random() % 8;
    for (Rank rank = 0; rank < n; ++rank) places.push_back(std::to_string(random() % hosts));
    const Placement placement = Placement::fromPlaces(places, n);
    ASSERT_TRUE(Placement::validHosts(placement.hostOfRanks()));
    ASSERT_EQ(Placement(placement.hostOfRanks()), placement);
    Rank ranks = 0;
    Rank lowest = -1;
    for (Rank host = 0; host < placement.hosts(); ++host) {
      ASSERT_GT(placement.ranksOf(host).front(), lowest);
      lowest = placement.ranksOf(host).front();
      std::set<Rank> carriers;
      for (Rank share = 0; share < placement.widest(); ++share) {
        const Rank carrier = placement.carrier(host, share);
        ASSERT_EQ(placement.hostOf(carrier), host);
        ASSERT_TRUE(placement.carries(carrier, share));
        carriers.insert(carrier);
      }
      ASSERT_EQ(carriers.size(), placement.ranksOf(host).size()) << "a rank that carries nothing";
      for (const Rank rank : placement.ranksOf(host)) {
        ASSERT_EQ(places[rank], places[placement.ranksOf(host).front()]);
        ++ranks;
      }
    }
    ASSERT_EQ(ranks, n);
  }
}

}  // namespace
}  // namespace reducer
