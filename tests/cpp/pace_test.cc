#include "collective/pace.h"

#include <gtest/gtest.h>

#include <vector>

namespace reducer::collective {
namespace {

using namespace std::chrono_literals;

const TimePoint kStart = TimePoint() + 1h;

Plan planOf(std::size_t owners, std::uint64_t rounds, std::uint64_t window_rounds = 0) {
  Plan plan;
  for (std::size_t i = 0; i < owners; ++i) plan.owners.push_back(static_cast<OwnerIndex>(i));
  plan.rounds = rounds;
  plan.window_rounds = window_rounds;
  return plan;
}

TEST(Pace, RoundsOpenWhenAllOwnersHaveAnsweredThoseBefore) {
  const Plan plan = planOf(2, 100);
  Pace pace(plan, std::make_shared<Depth>());
  EXPECT_TRUE(pace.open(Depth::kLeast - 1));
  EXPECT_FALSE(pace.open(Depth::kLeast));
  EXPECT_FALSE(pace.answered(0, kStart));
  EXPECT_FALSE(pace.answered(1, kStart)) << "one owner is ahead";
  EXPECT_FALSE(pace.answered(2, kStart));
  EXPECT_FALSE(pace.open(Depth::kLeast));
  EXPECT_TRUE(pace.answered(0, kStart)) << "the other one comes";
  EXPECT_TRUE(pace.open(Depth::kLeast));
  EXPECT_FALSE(pace.open(Depth::kLeast + 1));
  EXPECT_FALSE(pace.answered(2, kStart)) << "round 2 is complete, round 1 is not";
  EXPECT_TRUE(pace.answered(1, kStart));
  EXPECT_TRUE(pace.open(Depth::kLeast + 2));
}

TEST(Pace, ASetNumberOfRoundsHolds) {
  const Plan plan = planOf(1, 100, 5);
  Pace pace(plan, std::make_shared<Depth>());
  for (std::uint64_t round = 0; round < 100; ++round) {
    EXPECT_TRUE(pace.open(round + 4));
    EXPECT_FALSE(pace.open(round + 5));
    EXPECT_TRUE(pace.answered(round, kStart));
  }
}

/// Rounds go through a pipe that takes `spacing` for each and returns it `delay` later.
std::uint64_t depthAfter(Duration spacing, Duration delay, std::shared_ptr<Depth> depth,
                         int transfers = 4, std::uint64_t rounds = 400) {
  for (int transfer = 0; transfer < transfers; ++transfer) {
    const Plan plan = planOf(1, rounds);
    Pace pace(plan, depth);
    TimePoint now = kStart;
    TimePoint free = kStart;
    std::uint64_t sent = 0;
    std::vector<TimePoint> back(rounds);
    for (std::uint64_t done = 0; done < rounds; ++done) {
      while (sent < rounds && pace.open(sent)) {
        pace.begun(sent, now);
        free = std::max(free, now) + spacing;
        back[sent++] = free + delay;
      }
      now = back[done];
      pace.answered(done, now);
    }
  }
  return depth->rounds();
}

TEST(Depth, IsTheLeastWhereTheDelayIsShort) {
  EXPECT_EQ(depthAfter(4ms, 100us, std::make_shared<Depth>()), Depth::kLeast);
}

TEST(Depth, FollowsBandwidthTimesDelay) {
  const auto depth = std::make_shared<Depth>();
  const std::uint64_t far = depthAfter(100us, 1ms, depth);
  EXPECT_GE(far, 12u) << "11 are on their way";
  EXPECT_LE(far, 15u);
  // The same way with less bandwidth.
  EXPECT_LE(depthAfter(1ms, 1ms, depth), 5u);
}

TEST(Depth, IsBounded) {
  EXPECT_EQ(depthAfter(1us, 10ms, std::make_shared<Depth>(), 20), Depth::kMost);
  const auto depth = std::make_shared<Depth>();
  for (int i = 0; i < 100; ++i) {
    depth->answered(0ns);
    depth->spaced(0ns);
  }
  EXPECT_EQ(depth->rounds(), Depth::kLeast);
}

}  // namespace
}  // namespace reducer::collective
