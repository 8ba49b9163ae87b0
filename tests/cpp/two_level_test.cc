// All-reduce in two levels, and what goes wrong.
#include "collective/two_level.h"

#include <gtest/gtest.h>

#include <map>

#include "two_level.h"

namespace reducer::testing {
namespace {

TEST(TwoLevel, HasTheBitsOfTheFlatSumOnEveryPlacementAndTopology) {
  std::mt19937 random(1);
  for (const auto& places : kPlaces) {
    for (const Topology& topology : kTopologies) {
      SCOPED_TRACE(std::string(topology.name) + " on " + std::to_string(places.size()));
      ClusterOptions options = clusterOf(places, topology);
      for (const Carrier carrier : {Carrier::kAuto, Carrier::kGrpc}) {
        options.settings.carrier = carrier;
        SimCluster cluster(options);
        for (const auto& [dtype, op, count] :
             {std::tuple(DataType::kFloat32, ReduceOp::kSum, std::size_t{30'001}),
              std::tuple(DataType::kFloat32, ReduceOp::kAvg, std::size_t{100'001}),
              std::tuple(DataType::kBFloat16, ReduceOp::kAvg, std::size_t{77'777}),
              std::tuple(DataType::kInt8, ReduceOp::kMax, std::size_t{40'000}),
              std::tuple(DataType::kFloat32, ReduceOp::kSum, std::size_t{3})}) {
          const auto inputs = anyInputs(places.size(), dtype, count, random);
          const Memory expected = sumOf(places, inputs, dtype, op);
          auto data = inputs;
          Ends ends(places.size());
          for (Rank r = 0; r < cluster.workers(); ++r) {
            cluster.group(r).allReduce(data[r].data(), data[r].data(), count, dtype, op, within(),
                                       ends.of(r));
          }
          ASSERT_TRUE(ends.wait()) << "a rank hangs";
          ends.expectOk();
          for (Rank r = 0; r < cluster.workers(); ++r) {
            ASSERT_TRUE(data[r] == expected)
                << "rank " << r << ", " << nameOf(dtype) << " " << nameOf(op) << " " << count;
          }
        }
      }
    }
  }
}

TEST(TwoLevel, ManyCallsOfAllSizesAreUnderWayAtOnce) {
  std::mt19937 random(2);
  const auto& places = kPlaces[2];
  for (const Topology& topology : kTopologies) {
    SCOPED_TRACE(topology.name);
    SimCluster cluster(clusterOf(places, topology));
    constexpr std::size_t kCalls = 12;
    const std::size_t counts[] = {70'000, 5, 20'000, 0, 150'000, 9'000};
    std::vector<std::vector<Memory>> inputs;
    for (std::size_t call = 0; call < kCalls; ++call) {
      inputs.push_back(anyInputs(places.size(), DataType::kFloat32, counts[call % 6], random));
    }
    auto data = inputs;
    Ends ends(kCalls * places.size());
    for (Rank r = 0; r < cluster.workers(); ++r) {
      for (std::size_t call = 0; call < kCalls; ++call) {
        std::byte* const at = data[call][r].data();
        cluster.group(r).allReduce(at, at, counts[call % 6], DataType::kFloat32, ReduceOp::kSum,
                                   within(), ends.of(call * places.size() + r));
      }
    }
    ASSERT_TRUE(ends.wait()) << "a rank hangs";
    ends.expectOk();
    for (std::size_t call = 0; call < kCalls; ++call) {
      if (counts[call % 6] == 0) continue;
      const Memory expected = sumOf(places, inputs[call], DataType::kFloat32, ReduceOp::kSum);
      for (Rank r = 0; r < cluster.workers(); ++r) {
        ASSERT_TRUE(data[call][r] == expected) << "call " << call << " rank " << r;
      }
    }
  }
}

/// Calls of which some differ; every rank of the next call must succeed again.
class TwoLevelMismatch : public ::testing::Test {
 protected:
  static constexpr std::size_t kCount = 60'000;

  void expectGoesOn(SimCluster& cluster) {
    const auto data = floats(cluster.workers(), kCount, 1.0f);
    Ends ends(data->size());
    for (Rank r = 0; r < cluster.workers(); ++r) {
      cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(), kCount, DataType::kFloat32,
                                 ReduceOp::kSum, kept(data), ends.of(r));
    }
    ASSERT_TRUE(ends.wait()) << "a rank hangs after a mismatch";
    ends.expectOk();
    for (const auto& one : *data) {
      ASSERT_EQ(one, std::vector<float>(kCount, static_cast<float>(cluster.workers())));
    }
  }

  /// `odd` ranks call all_reduce of another count.
  void expectNamed(SimCluster& cluster, const std::vector<Rank>& odd, const std::string& text) {
    const auto isOdd = [&](Rank r) { return std::find(odd.begin(), odd.end(), r) != odd.end(); };
    const auto data = floats(cluster.workers(), 2 * kCount, 2.0f);
    Ends ends(data->size());
    for (Rank r = 0; r < cluster.workers(); ++r) {
      cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(),
                                 isOdd(r) ? 2 * kCount : kCount, DataType::kFloat32, ReduceOp::kSum,
                                 kept(data), ends.of(r));
    }
    ASSERT_TRUE(ends.wait()) << "a rank hangs in a mismatch";
    for (Rank r = 0; r < cluster.workers(); ++r) {
      EXPECT_EQ(ends.status(r).code(), Code::kMismatch);
      EXPECT_NE(ends.status(r).message().find(text), std::string::npos) << ends.status(r).message();
      EXPECT_EQ((*data)[r], std::vector<float>(2 * kCount, 2.0f)) << "inputs are as before";
    }
  }
};

TEST_F(TwoLevelMismatch, BetweenAndWithinHostsIsNamedAndTheGroupGoesOn) {
  for (const Topology& topology : kTopologies) {
    SCOPED_TRACE(topology.name);
    SimCluster cluster(clusterOf(kPlaces[0], topology));
    for (int round = 0; round < 3; ++round) {
      expectNamed(cluster, {2, 3}, "rank 2 (worker2:1), rank 3 (worker3:1) called all_reduce(");
      expectGoesOn(cluster);
      expectNamed(cluster, {1}, "; rank 1 (worker1:1) called all_reduce(");
      expectGoesOn(cluster);
    }
  }
}

TEST_F(TwoLevelMismatch, OfACallInTwoLevelsAndABarrier) {
  SimCluster cluster(clusterOf(kPlaces[0], kTopologies[4]));
  for (const Rank odd : {0, 1, 3}) {
    const auto data = floats(4, kCount, 2.0f);
    Ends ends(4);
    for (Rank r = 0; r < 4; ++r) {
      if (r == odd) {
        cluster.group(r).barrier(within(), ends.of(r));
      } else {
        cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(), kCount, DataType::kFloat32,
                                   ReduceOp::kSum, kept(data), ends.of(r));
      }
    }
    ASSERT_TRUE(ends.wait());
    for (Rank r = 0; r < 4; ++r) {
      EXPECT_EQ(ends.status(r).code(), Code::kMismatch);
      EXPECT_NE(ends.status(r).message().find("rank " + std::to_string(odd) + " (worker" +
                                              std::to_string(odd) + ":1) called barrier()"),
                std::string::npos)
          << ends.status(r).message();
    }
    expectGoesOn(cluster);
  }
}

TEST_F(TwoLevelMismatch, ARankThatDoesNotComeIsNamedWhenTheTimeIsOver) {
  SimCluster cluster(clusterOf(kPlaces[0], kTopologies[2]));
  const auto data = floats(4, kCount, 2.0f);
  Ends ends(4);
  for (Rank r = 0; r < 3; ++r) {
    cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(), kCount, DataType::kFloat32,
                               ReduceOp::kSum, kept(data, std::chrono::milliseconds(400)),
                               ends.of(r));
  }
  ASSERT_FALSE(ends.wait(std::chrono::milliseconds(200)));
  while (!ends.ended(0) || !ends.ended(1) || !ends.ended(2)) {
    ends.wait(std::chrono::milliseconds(10));
  }
  for (Rank r = 0; r < 3; ++r) {
    EXPECT_EQ(ends.status(r).code(), Code::kTimeout);
    EXPECT_NE(ends.status(r).message().find("waiting for rank 3 (worker3:1)"), std::string::npos)
        << ends.status(r).message();
  }
  cluster.group(3).allReduce((*data)[3].data(), (*data)[3].data(), kCount, DataType::kFloat32,
                             ReduceOp::kSum, kept(data), ends.of(3));
  ASSERT_TRUE(ends.wait());
  EXPECT_EQ(ends.status(3).code(), Code::kTimeout) << "who comes late gets the same";
  expectGoesOn(cluster);
}

TEST_F(TwoLevelMismatch, CancelOnOneRankEndsTheCallOnAll) {
  SimCluster cluster(clusterOf(kPlaces[1], kTopologies[0]));
  expectGoesOn(cluster);
  for (int round = 0; round < 20; ++round) {
    const auto data = floats(4, kCount, 1.0f);
    Ends ends(4);
    CallOptions options = kept(data);
    options.canceller = std::make_shared<collective::Canceller>();
    const auto canceller = options.canceller;
    // One rank comes when the others have given up.
    for (const Rank r : {1, 2, 3}) {
      cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(), kCount, DataType::kFloat32,
                                 ReduceOp::kSum, r == 2 ? options : kept(data), ends.of(r));
    }
    canceller->cancel(Status(Code::kAborted, "rank 2 has had enough"));
    cluster.group(0).allReduce((*data)[0].data(), (*data)[0].data(), kCount, DataType::kFloat32,
                               ReduceOp::kSum, kept(data), ends.of(0));
    ASSERT_TRUE(ends.wait()) << "a rank hangs";
    for (Rank r = 0; r < 4; ++r) {
      EXPECT_EQ(ends.status(r).message(), "rank 2 has had enough") << r;
    }
    expectGoesOn(cluster);
  }
}

TEST_F(TwoLevelMismatch, AbortAndCloseEndWhatIsUnderWay) {
  for (const bool abort : {true, false}) {
    SimCluster cluster(clusterOf(kPlaces[0], kTopologies[4]));
    expectGoesOn(cluster);
    const auto data = floats(4, kCount, 1.0f);
    Ends ends(4);
    for (const Rank r : {0, 1, 3}) {
      cluster.group(r).allReduce((*data)[r].data(), (*data)[r].data(), kCount, DataType::kFloat32,
                                 ReduceOp::kSum, kept(data), ends.of(r));
    }
    if (abort) {
      cluster.group(1).abort("the test wants it");
    } else {
      cluster.group(1).close();
    }
    cluster.group(2).allReduce((*data)[2].data(), (*data)[2].data(), kCount, DataType::kFloat32,
                               ReduceOp::kSum, kept(data), ends.of(2));
    ASSERT_TRUE(ends.wait()) << "a rank hangs";
    for (Rank r = 0; r < 4; ++r) EXPECT_FALSE(ends.status(r).ok()) << r;
  }
}

TEST(TwoLevelShape, EveryByteGoesOnOneRailOnceInEveryPlacement) {
  std::mt19937 random(9);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> places;
    const auto n = static_cast<Rank>(3 + random() % 6);
    for (Rank r = 0; r < n; ++r) places.push_back(std::to_string(random() % 3));
    const Placement placement = Placement::fromPlaces(places, n);
    if (!placement.levels()) continue;
    const std::uint32_t servers = random() % 3;
    const collective::ShardMap rails(servers > 0 ? Algorithm::kMixed : Algorithm::kDirect,
                                     static_cast<std::uint32_t>(placement.hosts()), servers, 4096,
                                     0);
    const std::size_t nbytes = 4 * (200 + random() % 60'000);
    Memory tensor(nbytes);
    const auto strips = collective::sharedStrips(placement, tensor.data(), tensor.data(), nbytes,
                                                 kAllRanks, kAllRanks);
    // What each rank pushes of every chunk, from where in the tensor: equal on the carriers of a
    // rail.
    std::map<std::pair<std::uint64_t, std::uint32_t>,
             std::vector<std::pair<std::uint64_t, std::uint64_t>>>
        chunks;
    for (Rank rank = 0; rank < n; ++rank) {
      collective::Operation::Info info;
      info.call.dtype = DataType::kFloat32;
      info.seq = 7;
      info.done = [](const Status&) {};
      Memory area(8192);
      const collective::TwoLevel::Shape shape{&placement, rank, &rails, 8192, 1 << 20};
      const auto operation = std::make_shared<collective::TwoLevel>(info, shape, strips);
      for (std::uint64_t segment = 0; segment < operation->segments(); ++segment) {
        std::uint64_t end = 0;
        for (std::size_t strip = 0; strip < strips.size(); ++strip) {
          ASSERT_GE(operation->areaOffset(strip), end) << "slices overlap";
          end = operation->areaOffset(strip) + operation->slice(segment, strip).length;
        }
        ASSERT_LE(end, 8192u);
      }
      const auto cursors = operation->cursors(0);
      for (std::size_t i = 1; i < cursors.size(); ++i) {  // behind the empty chunk
        const collective::Cursor& cursor = cursors[i].second;
        for (std::uint64_t r = 0; r < cursor.end; ++r) {
          // Not on its host alone: the memory of its segment has to be known.
          const std::uint64_t segment = r / (cursor.end / operation->segments());
          if (operation->segmentsSummed() <= segment) {
            operation->summed(segment, area.data(), nullptr);
          }
          const collective::Piece piece = operation->piece(cursor.transfer, 0, r);
          ASSERT_TRUE(isRail(piece.frame.pusher));
          ASSERT_EQ(piece.frame.puller, piece.frame.pusher);
          const Rank share = shareOf(piece.frame.pusher);
          ASSERT_TRUE(placement.carries(rank, share));
          const auto begin = static_cast<std::uint64_t>(strips[share].in - tensor.data());
          chunks[{piece.frame.slot.lane, piece.frame.slot.chunk}].emplace_back(
              begin + piece.frame.offset, piece.frame.length);
        }
      }
    }
    std::vector<char> covered(nbytes);
    for (const auto& [id, spans] : chunks) {
      ASSERT_EQ(spans.size(), static_cast<std::size_t>(placement.hosts()));
      for (const auto& span : spans) ASSERT_EQ(span, spans.front());
      for (std::uint64_t i = 0; i < spans.front().second; ++i) {
        ASSERT_EQ(covered[spans.front().first + i]++, 0);
      }
    }
    ASSERT_EQ(std::count(covered.begin(), covered.end(), 1), static_cast<std::ptrdiff_t>(nbytes));
  }
}

}  // namespace
}  // namespace reducer::testing
