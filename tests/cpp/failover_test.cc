// Standalone reducers that are lost in the middle of everything: docs/protocol.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <future>
#include <random>
#include <thread>

#include "engine/engine.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;

using Memory = std::vector<std::byte>;

CallOptions within(std::chrono::milliseconds timeout) {
  CallOptions options;
  options.timeout = timeout;
  return options;
}

ClusterOptions clusterOf(Algorithm algorithm, std::int32_t workers, std::int32_t servers,
                         std::uint64_t seed) {
  ClusterOptions options;
  options.workers = workers;
  options.servers = servers;
  options.settings.algorithm = algorithm;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.seed = seed;
  return options;
}

std::vector<Memory> anyInputs(Rank ranks, std::size_t nbytes, std::mt19937& random) {
  std::vector<Memory> inputs(static_cast<std::size_t>(ranks), Memory(nbytes));
  for (Memory& input : inputs) {
    for (std::size_t i = 0; i + 4 <= nbytes; i += 4) {
      const float value = static_cast<float>(static_cast<int>(random() % 20001) - 10000) *
                          static_cast<float>(1 << random() % 20);
      std::memcpy(input.data() + i, &value, sizeof value);
    }
  }
  return inputs;
}

Memory sumOf(const std::vector<Memory>& inputs) {
  std::vector<Payload> payloads;
  for (const Memory& input : inputs) payloads.emplace_back(Bytes(input), nullptr);
  Memory sum(inputs[0].size());
  engine::sumByHost(Placement(static_cast<Rank>(inputs.size())), DataType::kFloat32, ReduceOp::kSum,
                    payloads, sum.data());
  return sum;
}

/// A job in which every rank makes the same calls, each when its turn comes, in place; what is done
/// is checked and then spoilt, as a user may do.
class Job {
 public:
  Job(SimCluster& cluster, std::size_t calls, std::mt19937& random) : cluster_(cluster) {
    const Rank n = cluster.workers();
    const std::size_t counts[] = {0, 1, 300, 2'000, 9'000, 40'000};
    for (std::size_t i = 0; i < calls; ++i) {
      Call call;
      call.kind = static_cast<int>(random() % 8);
      call.count = counts[random() % 6];
      call.root = static_cast<Rank>(random() % n);
      call.inputs = anyInputs(n, call.count * 4, random);
      if (call.count > 0) call.sum = sumOf(call.inputs);
      call.data = call.inputs;
      call.ended.assign(static_cast<std::size_t>(n), 0);
      calls_.push_back(std::move(call));
    }
    next_.assign(static_cast<std::size_t>(n), 0);
    open_.assign(static_cast<std::size_t>(n), 0);
  }

  /// Makes a rank's next calls, so that it has up to `depth` of them under way.
  void feed(Rank rank, std::size_t depth) {
    while (next_[rank] < calls_.size() && open_[rank] < depth) start(rank, next_[rank]++);
  }
  bool done() const {
    return std::all_of(calls_.begin(), calls_.end(), [](const Call& call) {
      return std::all_of(call.ended.begin(), call.ended.end(), [](char e) { return e != 0; });
    });
  }

 private:
  struct Call {
    int kind = 0;
    std::size_t count = 0;
    Rank root = 0;
    std::vector<Memory> inputs;
    std::vector<Memory> data;
    Memory sum;
    std::vector<char> ended;
  };

  void start(Rank rank, std::size_t index) {
    Call& call = calls_[index];
    ++open_[rank];
    void* const at = call.data[rank].data();
    const auto done = [this, rank, index](const Status& status) { end(rank, index, status); };
    collective::Group& group = cluster_.group(rank);
    const CallOptions options = within(std::chrono::seconds(30));
    if (call.kind == 0) {
      group.reduce(at, at, call.count, DataType::kFloat32, ReduceOp::kSum, call.root, options,
                   done);
    } else if (call.kind == 1) {
      group.broadcast(at, call.count, DataType::kFloat32, call.root, options, done);
    } else if (call.kind == 2) {
      group.barrier(options, done);
    } else {
      group.allReduce(at, at, call.count, DataType::kFloat32, ReduceOp::kSum, options, done);
    }
  }

  void end(Rank rank, std::size_t index, const Status& status) {
    Call& call = calls_[index];
    ASSERT_FALSE(call.ended[rank]) << "a call ended twice";
    call.ended[rank] = 1;
    --open_[rank];
    ASSERT_TRUE(status.ok()) << "rank " << rank << ", call " << index << ": " << status.message();
    const Memory* expected = &call.sum;
    if (call.kind == 0 && rank != call.root) expected = &call.inputs[rank];
    if (call.kind == 1) expected = &call.inputs[call.root];
    if (call.kind == 2) expected = &call.inputs[rank];
    if (call.count > 0) {
      ASSERT_TRUE(call.data[rank] == *expected)
          << "rank " << rank << ", call " << index << " of kind " << call.kind << ", " << call.count
          << " elements";
    }
    std::fill(call.data[rank].begin(), call.data[rank].end(), std::byte{0xEE});
  }

  SimCluster& cluster_;
  std::deque<Call> calls_;
  std::vector<std::size_t> next_;
  std::vector<std::size_t> open_;
};

TEST(Failover, NothingIsLostWhateverDiesAndWheneverOnEverySeed) {
  for (std::uint64_t seed = 0; seed < 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(static_cast<std::uint32_t>(seed));
    const auto workers = static_cast<std::int32_t>(2 + random() % 4);
    const auto servers = static_cast<std::int32_t>(1 + random() % 3);
    const Algorithm algorithm = random() % 2 == 0 ? Algorithm::kServer : Algorithm::kMixed;
    SimCluster cluster(clusterOf(algorithm, workers, servers, seed));
    // Everybody is connected first: who cannot be reached at the start is a mistake, not a loss.
    std::vector<Outcome> met(static_cast<std::size_t>(workers));
    for (Rank r = 0; r < workers; ++r) {
      cluster.group(r).barrier(within(std::chrono::seconds(10)), met[r].callback());
    }
    ASSERT_TRUE(cluster.finish(met));
    Job job(cluster, 4 + random() % 12, random);
    std::size_t alive = static_cast<std::size_t>(servers);
    const std::size_t deaths = 1 + random() % alive;
    std::vector<int> order(static_cast<std::size_t>(servers));
    for (int k = 0; k < servers; ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::uint64_t> when;
    for (std::size_t i = 0; i < deaths; ++i) when.push_back(random() % 3000);
    std::sort(when.begin(), when.end());
    const std::size_t depth = 1 + random() % 5;
    std::uint64_t steps = 0;
    std::size_t killed = 0;
    const bool ended = cluster.network().runUntil(
        [&] {
          for (Rank r = 0; r < workers; ++r) {
            if (random() % 4 == 0) job.feed(r, depth);
          }
          while (killed < deaths && steps >= when[killed]) {
            cluster.network().kill("server" + std::to_string(order[killed++]));
          }
          ++steps;
          return job.done() || ::testing::Test::HasFatalFailure();
        },
        std::chrono::seconds(60));
    ASSERT_TRUE(ended) << "a rank hangs";
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Nobody moves anything to a worker while a standalone reducer is left: it says at once who has
// left.
TEST(Failover, ARankThatLeavesAfterALossIsNamedAtOnce) {
  SimCluster cluster(clusterOf(Algorithm::kMixed, 3, 2, 1));
  const auto together = [&] {
    std::vector<std::vector<float>> data(3, std::vector<float>(20'000, 1.0f));
    std::vector<Outcome> outcomes(3);
    for (Rank r = 0; r < 3; ++r) {
      cluster.group(r).allReduce(data[r].data(), data[r].data(), data[r].size(), DataType::kFloat32,
                                 ReduceOp::kSum, within(std::chrono::seconds(10)),
                                 outcomes[r].callback());
    }
    ASSERT_TRUE(cluster.finish(outcomes));
    for (Rank r = 0; r < 3; ++r) {
      EXPECT_TRUE(outcomes[r].status.ok()) << outcomes[r].status.message();
      EXPECT_EQ(data[r], std::vector<float>(20'000, 3.0f));
    }
  };
  together();
  cluster.network().kill("server0");
  together();
  std::vector<Outcome> received(1);
  float value = 0;
  cluster.group(2).recv(&value, 1, DataType::kFloat32, 1, 0, within(std::chrono::seconds(30)),
                        received[0].callback());
  cluster.group(1).close();
  ASSERT_TRUE(cluster.finish(received, std::chrono::seconds(5))) << "it waits for its timeout";
  EXPECT_EQ(received[0].status.code(), Code::kUnavailable);
  EXPECT_NE(received[0].status.message().find("rank 1"), std::string::npos)
      << received[0].status.message();
}

TEST(Failover, AWorkersDeathIsToldToThoseWhoHaveNoConnectionToIt) {
  SimCluster cluster(clusterOf(Algorithm::kServer, 4, 2, 1));
  std::vector<Outcome> met(4);
  for (Rank r = 0; r < 4; ++r) {
    cluster.group(r).barrier(within(std::chrono::seconds(10)), met[r].callback());
  }
  ASSERT_TRUE(cluster.finish(met));
  std::vector<Outcome> outcomes(3);
  const Rank rest[] = {0, 1, 3};
  for (std::size_t i = 0; i < 3; ++i) {
    cluster.group(rest[i]).barrier(within(std::chrono::seconds(60)), outcomes[i].callback());
  }
  cluster.network().kill("worker2");
  ASSERT_TRUE(cluster.finish(outcomes, std::chrono::seconds(3)));
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.status.code(), Code::kUnavailable);
    EXPECT_NE(outcome.status.message().find("rank 2 (worker2:1) of group 'default' was lost"),
              std::string::npos)
        << outcome.status.message();
  }
}

// ------------------------------------------------------------------ real threads, real time

/// One rank's calls, one after the other, until it is told to stop; sums of known numbers.
class Caller {
 public:
  Caller(collective::Group& group, std::size_t count) : group_(group), count_(count) {}

  void run(std::size_t calls) {
    const auto n = static_cast<float>(group_.worldSize());
    for (std::size_t i = 0; i < calls && failure_.empty(); ++i) {
      const auto data = std::make_shared<std::vector<float>>(
          i % 3 == 0 ? 10 : count_, static_cast<float>(group_.rank() + static_cast<Rank>(i)));
      std::promise<Status> ended;
      CallOptions options = within(std::chrono::seconds(20));
      options.keepalive = data;
      group_.allReduce(data->data(), data->data(), data->size(), DataType::kFloat32, ReduceOp::kSum,
                       options, [&](const Status& status) { ended.set_value(status); });
      const Status status = ended.get_future().get();
      const float expected = n * (n - 1) / 2 + n * static_cast<float>(i);
      if (!status.ok()) {
        failure_ = "call " + std::to_string(i) + ": " + status.message();
      } else if (std::count(data->begin(), data->end(), expected) !=
                 static_cast<std::ptrdiff_t>(data->size())) {
        failure_ = "call " + std::to_string(i) + " is wrong";
      }
    }
  }
  const std::string& failure() const { return failure_; }

 private:
  collective::Group& group_;
  const std::size_t count_;
  std::string failure_;
};

TEST(FailoverThreads, WithRanksThatShareHostsAndWithout) {
  std::mt19937 random(3);
  for (const auto& places : {std::vector<std::string>{"a", "a", "b", "b"},
                             std::vector<std::string>{"a", "a", "b"}, std::vector<std::string>{}}) {
    for (const Algorithm algorithm : {Algorithm::kServer, Algorithm::kMixed}) {
      SCOPED_TRACE(std::to_string(places.size()) + " places");
      const std::int32_t workers = places.empty() ? 3 : static_cast<std::int32_t>(places.size());
      ClusterOptions options = clusterOf(algorithm, workers, 3, 1);
      options.places = places;
      options.sim.threads = 3;
      SimCluster cluster(options);
      std::vector<std::unique_ptr<Caller>> callers;
      std::vector<std::thread> threads;
      for (Rank r = 0; r < workers; ++r) {
        callers.push_back(std::make_unique<Caller>(cluster.group(r), 60'000));
        threads.emplace_back([caller = callers.back().get()] { caller->run(40); });
      }
      for (const int server : {1, 0, 2}) {
        std::this_thread::sleep_for(std::chrono::milliseconds(30 + random() % 60));
        cluster.network().kill("server" + std::to_string(server));
      }
      for (std::thread& thread : threads) thread.join();
      for (Rank r = 0; r < workers; ++r) EXPECT_EQ(callers[r]->failure(), "") << "rank " << r;
    }
  }
}

}  // namespace
}  // namespace reducer::testing
