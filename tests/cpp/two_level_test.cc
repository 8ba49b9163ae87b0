// Collectives in two levels: ranks as threads' groups in one process, real shared memory, the
// simulated network in real time.
#include "collective/two_level.h"

#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>

#include "engine/engine.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;
using collective::Carrier;

constexpr auto kPatience = std::chrono::seconds(30);

const std::vector<std::vector<std::string>> kPlaces = {
    {"a", "a", "b", "b"},
    {"a", "b", "a", "b"},
    {"a", "a", "a", "b", "b", "c"},
    {"a", "b", "c", "b", "c", "b", "b"},
};

ClusterOptions clusterOf(const std::vector<std::string>& places, const Topology& topology) {
  ClusterOptions options;
  options.workers = static_cast<std::int32_t>(places.size());
  options.servers = topology.servers;
  options.places = places;
  options.settings.algorithm = topology.algorithm;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.threads = 3;
  options.sim.latency_min = std::chrono::microseconds(0);
  options.sim.latency_max = std::chrono::microseconds(200);
  return options;
}

/// The ends of several ranks' operations.
class Ends {
 public:
  explicit Ends(std::size_t count) : statuses_(count), done_(count) {}

  collective::Done of(std::size_t index) {
    return [this, index](const Status& status) {
      const std::lock_guard lock(mutex_);
      EXPECT_FALSE(done_[index]) << "an operation ended twice";
      done_[index] = true;
      statuses_[index] = status;
      changed_.notify_all();
    };
  }
  bool wait(std::chrono::milliseconds patience = kPatience) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, patience, [&] {
      return std::find(done_.begin(), done_.end(), false) == done_.end();
    });
  }
  bool ended(std::size_t index) {
    const std::lock_guard lock(mutex_);
    return done_[index];
  }
  Status status(std::size_t index) {
    const std::lock_guard lock(mutex_);
    return statuses_[index];
  }
  void expectOk() {
    for (std::size_t i = 0; i < statuses_.size(); ++i) {
      EXPECT_TRUE(status(i).ok()) << i << ": " << status(i).message();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Status> statuses_;
  std::vector<bool> done_;
};

CallOptions within(std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
  CallOptions options;
  options.timeout = timeout;
  return options;
}

using Memory = std::vector<std::byte>;

std::vector<Memory> anyInputs(std::size_t ranks, DataType dtype, std::size_t count,
                              std::mt19937& random) {
  std::vector<Memory> inputs(ranks, Memory(count * sizeOf(dtype)));
  std::normal_distribution<float> normal;
  for (Memory& input : inputs) {
    if (dtype == DataType::kFloat32) {
      for (std::size_t i = 0; i < count; ++i) {
        const float value = normal(random) * std::pow(10.0f, static_cast<float>(random() % 7));
        std::memcpy(input.data() + i * sizeof value, &value, sizeof value);
      }
    } else {
      for (std::byte& byte : input) byte = static_cast<std::byte>(random() & 0x3F);
    }
  }
  return inputs;
}

Memory sumOf(const std::vector<std::string>& places, const std::vector<Memory>& inputs,
             DataType dtype, ReduceOp op) {
  std::vector<Payload> payloads;
  for (const Memory& input : inputs) payloads.emplace_back(Bytes(input), nullptr);
  Memory sum(inputs[0].size());
  engine::sumByHost(Placement::fromPlaces(places, static_cast<Rank>(places.size())), dtype, op,
                    payloads, sum.data());
  return sum;
}

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

using Floats = std::shared_ptr<std::vector<std::vector<float>>>;

Floats floats(std::size_t ranks, std::size_t count, float value) {
  return std::make_shared<std::vector<std::vector<float>>>(ranks, std::vector<float>(count, value));
}

/// What failed may still be read a little later.
CallOptions kept(const Floats& data, std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
  CallOptions options = within(timeout);
  options.keepalive = data;
  return options;
}

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
