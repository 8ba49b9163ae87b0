// The other collectives that go in two levels.
#include <gtest/gtest.h>

#include <numeric>

#include "two_level.h"

namespace reducer::testing {
namespace {

/// One collective on all ranks; what rank r has is in(r), what it gets in out(r).
struct Case {
  SimCluster& cluster;
  DataType dtype;
  ReduceOp op;
  std::vector<std::size_t> counts;  // of the parts, by rank
  Rank root;

  std::size_t total() const { return std::accumulate(counts.begin(), counts.end(), 0UL); }
  std::size_t bytes(std::size_t count) const { return count * sizeOf(dtype); }
  std::size_t before(Rank rank) const {
    return bytes(std::accumulate(counts.begin(), counts.begin() + rank, 0UL));
  }
  Memory part(const Memory& whole, Rank rank) const {
    const auto from = whole.begin() + static_cast<std::ptrdiff_t>(before(rank));
    return {from, from + static_cast<std::ptrdiff_t>(bytes(counts[rank]))};
  }

  void reduce(const std::vector<Memory>& inputs, const Memory& sum) {
    auto data = inputs;
    run([&](Rank r, Ends& ends) {
      cluster.group(r).reduce(data[r].data(), data[r].data(), total(), dtype, op, root, within(),
                              ends.of(r));
    });
    for (Rank r = 0; r < cluster.workers(); ++r) {
      ASSERT_TRUE(data[r] == (r == root ? sum : inputs[r])) << "reduce, rank " << r;
    }
  }
  void broadcast(const std::vector<Memory>& inputs) {
    auto data = inputs;
    run([&](Rank r, Ends& ends) {
      cluster.group(r).broadcast(data[r].data(), total(), dtype, root, within(), ends.of(r));
    });
    for (const Memory& one : data) ASSERT_TRUE(one == inputs[root]) << "broadcast";
  }
  void allGather(const std::vector<Memory>& inputs) {
    std::vector<Memory> outs(inputs.size(), Memory(bytes(total())));
    Memory expected;
    for (Rank r = 0; r < cluster.workers(); ++r) {
      const Memory own = part(inputs[r], r);
      expected.insert(expected.end(), own.begin(), own.end());
    }
    run([&](Rank r, Ends& ends) {
      std::vector<void*> parts;
      for (Rank p = 0; p < cluster.workers(); ++p) parts.push_back(outs[r].data() + before(p));
      cluster.group(r).allGather(inputs[r].data() + before(r), parts, counts, dtype, within(),
                                 ends.of(r));
    });
    for (const Memory& out : outs) ASSERT_TRUE(out == expected) << "all_gather";
  }
  void reduceScatter(const std::vector<Memory>& inputs, const Memory& sum) {
    std::vector<Memory> outs;
    for (const std::size_t count : counts) outs.emplace_back(bytes(count));
    run([&](Rank r, Ends& ends) {
      std::vector<const void*> parts;
      for (Rank p = 0; p < cluster.workers(); ++p) parts.push_back(inputs[r].data() + before(p));
      cluster.group(r).reduceScatter(parts, outs[r].data(), counts, dtype, op, within(),
                                     ends.of(r));
    });
    for (Rank r = 0; r < cluster.workers(); ++r) {
      ASSERT_TRUE(outs[r] == part(sum, r)) << "reduce_scatter, rank " << r;
    }
  }
  template <class Call>
  void run(const Call& call) {
    Ends ends(static_cast<std::size_t>(cluster.workers()));
    for (Rank r = 0; r < cluster.workers(); ++r) call(r, ends);
    ASSERT_TRUE(ends.wait()) << "a rank hangs";
    ends.expectOk();
  }
};

TEST(TwoLevel, EveryCollectiveThatHasTwoLevelsGivesWhatItGivesInOne) {
  std::mt19937 random(5);
  for (const auto& places : kPlaces) {
    const auto n = static_cast<Rank>(places.size());
    for (const Topology& topology : kTopologies) {
      SCOPED_TRACE(std::string(topology.name) + " on " + std::to_string(n));
      ClusterOptions options = clusterOf(places, topology);
      for (const Carrier carrier : {Carrier::kAuto, Carrier::kGrpc}) {
        options.settings.carrier = carrier;
        SimCluster cluster(options);
        for (const auto& [dtype, op] : {std::pair(DataType::kFloat32, ReduceOp::kSum),
                                        std::pair(DataType::kBFloat16, ReduceOp::kAvg),
                                        std::pair(DataType::kInt8, ReduceOp::kMax)}) {
          Case one{cluster, dtype, op, {}, static_cast<Rank>(random() % n)};
          // Of very different lengths, some empty.
          for (Rank r = 0; r < n; ++r) {
            one.counts.push_back(r == 1 ? 0 : random() % (r == 2 ? 200 : 30'000));
          }
          const auto inputs = anyInputs(places.size(), dtype, one.total(), random);
          const Memory sum = sumOf(places, inputs, dtype, op);
          one.reduce(inputs, sum);
          one.broadcast(inputs);
          one.allGather(inputs);
          one.reduceScatter(inputs, sum);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// A host's ranks have what they push and pull in common: what one of two would send alone.
TEST(TwoLevel, EveryByteCrossesBetweenHostsOnce) {
  const std::vector<std::string>& places = kPlaces[0];  // two hosts of two ranks
  constexpr std::size_t kCount = 100'000;
  for (const auto& [carrier, times] :
       {std::pair(Carrier::kAuto, 1), std::pair(Carrier::kGrpc, 2)}) {
    ClusterOptions options = clusterOf(places, kTopologies[0]);
    options.settings.carrier = carrier;
    SimCluster cluster(options);
    std::mt19937 random(6);
    Case one{cluster, DataType::kFloat32, ReduceOp::kSum, std::vector<std::size_t>(4, kCount), 0};
    const auto inputs = anyInputs(4, DataType::kFloat32, 4 * kCount, random);
    const auto pushed = [&] {
      std::uint64_t total = 0;
      for (Rank r = 0; r < 4; ++r) total += cluster.group(r).counters().pushed_bytes;
      return total;
    };
    one.reduceScatter(inputs, sumOf(places, inputs, DataType::kFloat32, ReduceOp::kSum));
    // Each host's sum of all parts, own parts to itself included; flat: each rank's.
    EXPECT_EQ(pushed(), 2 * times * one.bytes(one.total()));
    const std::uint64_t before = pushed();
    one.broadcast(inputs);
    one.allGather(inputs);
    EXPECT_EQ(pushed() - before, 2 * one.bytes(one.total()));
    std::uint64_t pulled = 0;
    for (Rank r = 0; r < 4; ++r) pulled += cluster.group(r).counters().pulled_bytes;
    // Reduce-scatter: every part once. Broadcast: the other host, or three ranks. All-gather: each
    // host the other's two parts, or each rank three.
    const std::size_t whole = one.bytes(one.total());
    EXPECT_EQ(pulled,
              carrier == Carrier::kAuto ? whole + whole + whole : whole + 3 * whole + 3 * whole);
  }
}

// A slice of one part may be longer than the window of the rank that owns it.
TEST(TwoLevel, PartsOfVeryDifferentLengthsKeepToTheWindows) {
  std::vector<std::string> places(16, "a");
  std::fill(places.begin() + 8, places.end(), "b");
  ClusterOptions options = clusterOf(places, kTopologies[0]);
  options.settings.chunk_bytes = 0;
  options.settings.window_bytes = 1 << 20;
  SimCluster cluster(options);
  std::mt19937 random(7);
  Case one{cluster, DataType::kFloat32, ReduceOp::kSum, std::vector<std::size_t>(16, 1), 0};
  one.counts[0] = 1 << 20;
  one.counts[9] = 70'000;
  const auto inputs = anyInputs(16, DataType::kFloat32, one.total(), random);
  one.allGather(inputs);
  one.reduceScatter(inputs, sumOf(places, inputs, DataType::kFloat32, ReduceOp::kSum));
  std::uint64_t slots = 0;
  for (Rank r = 0; r < 16; ++r) {
    if (r != 0 && r != 9) slots += cluster.locals()[r]->stats().slots_done;
  }
  EXPECT_LE(slots, 2 * (14u + 1)) << "tiny parts go once, beside the empty chunks";
}

// The strips have equal sizes and equal rails, and other owners.
TEST(TwoLevel, CountsThatDifferBetweenRanksAreNoticed) {
  SimCluster cluster(clusterOf(kPlaces[0], kTopologies[0]));
  constexpr std::size_t kCount = 50'000;
  const std::size_t counts[2][4] = {{kCount, 0, 0, 2 * kCount}, {kCount, 2 * kCount, 0, 0}};
  auto data = floats(4, 3 * kCount, -1.0f);
  const auto in = floats(4, 2 * kCount, 1.0f);
  Ends ends(4);
  for (Rank r = 0; r < 4; ++r) {
    const std::size_t* const own = counts[r == 0 ? 1 : 0];
    std::vector<void*> outs;
    std::size_t at = 0;
    for (Rank p = 0; p < 4; ++p) {
      outs.push_back((*data)[r].data() + at);
      at += own[p];
    }
    CallOptions options = kept(data, std::chrono::seconds(2));
    cluster.group(r).allGather((*in)[r].data(), outs, std::span(own, 4), DataType::kFloat32,
                               options, ends.of(r));
  }
  ASSERT_TRUE(ends.wait()) << "a rank hangs";
  EXPECT_FALSE(ends.status(0).ok()) << "its counts are not those of the others";
  EXPECT_NE(ends.status(0).code(), Code::kInternal) << ends.status(0).message();
}

}  // namespace
}  // namespace reducer::testing
