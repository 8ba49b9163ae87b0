#include "collective/shard_map.h"

#include <gtest/gtest.h>

#include <map>

namespace reducer::collective {
namespace {

struct Case {
  Algorithm algorithm;
  std::uint32_t n;
  std::uint32_t k;
};

class EveryMap : public testing::TestWithParam<Case> {};

TEST_P(EveryMap, PlansCoverEveryByteOnceInWholeElements) {
  for (const std::size_t chunk : {std::size_t{0}, std::size_t{4096}, std::size_t{1} << 20}) {
    const ShardMap map(GetParam().algorithm, GetParam().n, GetParam().k, chunk, 0);
    for (const std::uint64_t nbytes :
         {0ull, 1ull, 4ull, 63ull, 4096ull, 8191ull, 16384ull, 100'000ull, 1'000'003ull,
          (64ull << 20) + 12, (3ull << 30) + 8}) {
      for (const std::uint64_t seq : {0ull, 1ull, 5ull}) {
        const Plan plan = map.plan(nbytes, seq);
        std::uint64_t at = 0;
        const std::uint64_t step = std::max<std::uint64_t>(1, plan.rounds / 1000);
        for (std::uint64_t round = 0; round < plan.rounds; round += step) {
          at = plan.span(round, 0).offset;
          for (std::size_t position = 0; position < plan.owners.size(); ++position) {
            const Span span = plan.span(round, position);
            ASSERT_EQ(span.offset, at);
            ASSERT_LE(span.length, map.chunkBytes() + 64);
            ASSERT_EQ(span.offset % 16, 0u);
            at += span.length;
          }
          if (round + 1 < plan.rounds) {
            ASSERT_EQ(plan.span(round + 1, 0).offset, at);
          }
        }
        const Span last = plan.span(plan.rounds - 1, plan.owners.size() - 1);
        ASSERT_EQ(last.offset + last.length, nbytes);
        ASSERT_EQ(plan.owners[0], map.coordinator(seq)) << "calls are compared in chunk 0";
      }
    }
  }
}

TEST_P(EveryMap, WindowsHoldTwoChunks) {
  const ShardMap map(GetParam().algorithm, GetParam().n, GetParam().k, 0, 0);
  for (const OwnerIndex owner : map.owners()) {
    EXPECT_GE(map.windowBytes(owner), 2 * map.chunkBytes());
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, EveryMap,
    testing::Values(Case{Algorithm::kDirect, 1, 0}, Case{Algorithm::kDirect, 3, 0},
                    Case{Algorithm::kDirect, 8, 2}, Case{Algorithm::kServer, 4, 1},
                    Case{Algorithm::kServer, 2, 3}, Case{Algorithm::kMixed, 8, 4},
                    Case{Algorithm::kMixed, 8, 8}, Case{Algorithm::kMixed, 3, 1},
                    Case{Algorithm::kMixed, 1, 2}, Case{Algorithm::kMixed, 2, 5},
                    Case{Algorithm::kRing, 5, 0}));

TEST(ShardMap, MixedSharesAreThoseOfTheFormula) {
  // n = 8, k = 4: D = n^2 + kn - 2k = 88; a standalone reducer owns 2(n-1)/D, a worker's (n-k)/D.
  const ShardMap map(Algorithm::kMixed, 8, 4, 0, 0);
  const std::uint64_t nbytes = 88 * 64 * 1000;
  const Plan plan = map.plan(nbytes, 0);
  std::map<OwnerIndex, std::uint64_t> owned;
  for (std::uint64_t round = 0; round < plan.rounds; ++round) {
    for (std::size_t position = 0; position < plan.owners.size(); ++position) {
      owned[plan.owners[position]] += plan.span(round, position).length;
    }
  }
  ASSERT_EQ(owned.size(), 12u);
  for (const auto& [owner, bytes] : owned) {
    const double expected = static_cast<double>(nbytes) * (owner < 8 ? 4 : 14) / 88;
    EXPECT_NEAR(static_cast<double>(bytes), expected, 64.0 * static_cast<double>(plan.rounds))
        << owner;
  }
}

TEST(ShardMap, WithAsManyReducersAsWorkersNoWorkerOwnsAnything) {
  const ShardMap map(Algorithm::kMixed, 4, 4, 0, 0);
  EXPECT_EQ(map.owners(), (std::vector<OwnerIndex>{4, 5, 6, 7}));
}

TEST(ShardMap, SmallMessagesHaveOneOwnerThatTurns) {
  const ShardMap map(Algorithm::kDirect, 4, 0, 0, 0);
  EXPECT_EQ(map.plan(4, 0).owners, std::vector<OwnerIndex>{0});
  EXPECT_EQ(map.plan(4, 5).owners, std::vector<OwnerIndex>{1});
}

TEST(ShardMap, AutoIsMixedWithReducersAndDirectWithout) {
  EXPECT_EQ(ShardMap::resolve(Algorithm::kAuto, 0), Algorithm::kDirect);
  EXPECT_EQ(ShardMap::resolve(Algorithm::kAuto, 1), Algorithm::kMixed);
  EXPECT_EQ(ShardMap::resolve(Algorithm::kRing, 1), Algorithm::kRing);
}

}  // namespace
}  // namespace reducer::collective
