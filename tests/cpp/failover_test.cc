// Standalone reducers that are lost in the middle of everything: docs/protocol.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <future>
#include <random>
#include <thread>

#include "engine/engine.h"
#include "failover_job.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;

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

// ------------------------------------------------------------------ returns, in virtual time

std::size_t countOf(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

/// One all-reduce of known numbers on every rank; they end where they should.
void allReduceTogether(SimCluster& cluster) {
  const auto n = static_cast<std::size_t>(cluster.workers());
  std::vector<std::vector<float>> data(n, std::vector<float>(20'000, 2.0f));
  std::vector<Outcome> outcomes(n);
  for (Rank r = 0; r < cluster.workers(); ++r) {
    cluster.group(r).allReduce(data[r].data(), data[r].data(), data[r].size(), DataType::kFloat32,
                               ReduceOp::kSum, within(std::chrono::seconds(10)),
                               outcomes[r].callback());
  }
  ASSERT_TRUE(cluster.finish(outcomes));
  for (std::size_t r = 0; r < n; ++r) {
    EXPECT_TRUE(outcomes[r].status.ok()) << outcomes[r].status.message();
    EXPECT_EQ(data[r], std::vector<float>(20'000, 2.0f * static_cast<float>(n)));
  }
}

bool takePart(SimCluster& cluster, std::uint64_t servers, Duration limit) {
  return cluster.network().runUntil([&] { return cluster.group(0).counters().servers == servers; },
                                    limit);
}

// A firewall between one worker and one reducer, say.
TEST(Returns, AReducerThatOneWorkerCannotReachIsToldOfOnceAndTriedLessAndLess) {
  ClusterOptions options = clusterOf(Algorithm::kServer, 3, 2, 1);
  options.settings.heartbeat = std::chrono::milliseconds(400);
  SimCluster cluster(options);
  allReduceTogether(cluster);
  ::testing::internal::CaptureStderr();
  cluster.network().cut("worker2", "server1");
  EXPECT_TRUE(takePart(cluster, 1, std::chrono::seconds(2)));
  std::vector<TimePoint> attempts;  // a connection where none was
  std::uint64_t connections = 1;
  EXPECT_FALSE(cluster.network().runUntil(
      [&] {
        const std::uint64_t before = connections;
        connections = cluster.reducers()[1]->stats().connections;
        if (before == 0 && connections > 0) attempts.push_back(cluster.network().now());
        return cluster.group(0).counters().servers == 2;
      },
      std::chrono::seconds(240)));
  allReduceTogether(cluster);
  const std::string warnings = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(countOf(warnings, "reducer: warning:"), 2U) << warnings;  // the loss, and this
  EXPECT_EQ(countOf(warnings,
                    "the reducer at server1:7000 is there again, and 3 attempts in a row to take "
                    "it in have failed (rank 2 (worker2:1) says: server1:7000 did not answer"),
            1U)
      << warnings;
  ASSERT_GE(attempts.size(), 5U);
  EXPECT_LE(attempts.size(), 11U);
  EXPECT_LE(attempts[1] - attempts[0], std::chrono::seconds(12));
  for (std::size_t i = 1; i < attempts.size(); ++i) {
    EXPECT_LE(attempts[i] - attempts[i - 1], std::chrono::seconds(42)) << i;
  }
  EXPECT_GE(attempts.back() - attempts[attempts.size() - 2], std::chrono::seconds(30));

  cluster.network().mend("worker2", "server1");
  ::testing::internal::CaptureStderr();
  EXPECT_TRUE(takePart(cluster, 2, std::chrono::seconds(42)));
  allReduceTogether(cluster);
  // All is forgotten: the next loss is mended at once.
  cluster.network().sever("worker1", "server1");
  EXPECT_TRUE(takePart(cluster, 1, std::chrono::seconds(1)));
  EXPECT_TRUE(takePart(cluster, 2, std::chrono::seconds(6)));
  allReduceTogether(cluster);
  const std::string after = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(countOf(after, "the reducer at server1:7000 is back"), 2U) << after;
  EXPECT_EQ(countOf(after, "attempts in a row"), 0U) << after;
}

TEST(Returns, AllWorkersThatCannotReachItAreNamed) {
  ClusterOptions options = clusterOf(Algorithm::kServer, 4, 2, 1);
  options.settings.heartbeat = std::chrono::milliseconds(400);
  SimCluster cluster(options);
  allReduceTogether(cluster);
  ::testing::internal::CaptureStderr();
  cluster.network().cut("worker1", "server0");
  cluster.network().cut("worker3", "server0");
  cluster.network().runUntil([] { return false; }, std::chrono::seconds(60));
  allReduceTogether(cluster);
  const std::string warnings = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(countOf(warnings, "attempts in a row"), 1U) << warnings;
  const std::string line = warnings.substr(warnings.find("attempts in a row"));
  for (const char* rank : {"rank 1 (worker1:1)", "rank 3 (worker3:1)"}) {
    EXPECT_EQ(countOf(line, rank), 1U) << line;
  }
  for (const char* rank : {"rank 0 (", "rank 2 ("}) EXPECT_EQ(countOf(line, rank), 0U) << line;
}

ClusterOptions namedCluster() {
  ClusterOptions options = clusterOf(Algorithm::kServer, 3, 2, 1);
  options.settings.heartbeat = std::chrono::milliseconds(400);
  options.names = true;
  return options;
}

// A pod that is made anew keeps its name and has another address.
TEST(Returns, AReducerIsLookedForWhereItsNamePointsNow) {
  SimCluster cluster(namedCluster());
  allReduceTogether(cluster);
  cluster.network().kill("server1");
  allReduceTogether(cluster);
  ASSERT_TRUE(takePart(cluster, 1, std::chrono::seconds(2)));
  EXPECT_FALSE(takePart(cluster, 2, std::chrono::seconds(5)));
  cluster.network().name("reducer-1", "elsewhere");
  cluster.restart(1, "elsewhere");
  EXPECT_TRUE(takePart(cluster, 2, std::chrono::seconds(15)));
  const std::uint64_t before = cluster.reducers()[1]->stats().slots_done;
  allReduceTogether(cluster);
  EXPECT_GT(cluster.reducers()[1]->stats().slots_done, before);
}

// Where names are of no use, the address is.
TEST(Returns, AReducerIsLookedForAtItsAddressToo) {
  SimCluster cluster(namedCluster());
  allReduceTogether(cluster);
  cluster.network().kill("server1");
  cluster.network().name("reducer-1", "nowhere");
  allReduceTogether(cluster);
  ASSERT_TRUE(takePart(cluster, 1, std::chrono::seconds(2)));
  cluster.restart(1);
  EXPECT_TRUE(takePart(cluster, 2, std::chrono::seconds(15)));
  allReduceTogether(cluster);
}

// Half a group at one reducer and half at another would wait for each other for ever.
TEST(Returns, AllWorkersHaveToReachTheSameReducer) {
  SimCluster cluster(namedCluster());
  allReduceTogether(cluster);
  ASSERT_TRUE(takePart(cluster, 2, std::chrono::seconds(1)));
  cluster.network().kill("server1");
  ASSERT_TRUE(takePart(cluster, 1, std::chrono::seconds(2)));
  const auto other = cluster.network().addHost("other");
  server::ServerOptions options;
  options.host = "other:1";
  options.standalone = true;
  server::ReducerServer stranger(*other, options);
  ASSERT_TRUE(stranger.listen("other:7000").ok());
  cluster.network().name("reducer-1", "other");
  ASSERT_TRUE(cluster.network().runUntil([&] { return stranger.stats().connections == 1; },
                                         std::chrono::seconds(15)));
  // Rank 0 is there. The others find that the name has moved on.
  cluster.network().name("reducer-1", "elsewhere");
  cluster.restart(1, "elsewhere");
  ASSERT_TRUE(cluster.network().runUntil(
      [&] { return cluster.reducers()[1]->stats().connections > 0; }, std::chrono::seconds(1)));
  EXPECT_FALSE(takePart(cluster, 2, std::chrono::seconds(2)));
  allReduceTogether(cluster);
  EXPECT_TRUE(takePart(cluster, 2, std::chrono::seconds(25)));
  EXPECT_EQ(stranger.stats().connections, 0U);
  allReduceTogether(cluster);
}

// ------------------------------------------------------------------ real threads, real time

/// One rank's calls, one after the other, until it is told to stop; sums of known numbers.
class Caller {
 public:
  Caller(collective::Group& group, std::size_t count) : group_(group), count_(count) {}

  void run(std::size_t calls, Duration pace = {}) {
    const auto n = static_cast<float>(group_.worldSize());
    for (std::size_t i = 0; i < calls && failure_.empty(); ++i) {
      if (pace > Duration::zero()) std::this_thread::sleep_for(pace);
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
      std::vector<std::promise<Status>> met(static_cast<std::size_t>(workers));
      std::vector<std::vector<float>> first(static_cast<std::size_t>(workers),
                                            std::vector<float>(60'000));
      for (Rank r = 0; r < workers; ++r) {
        cluster.group(r).allReduce(first[r].data(), first[r].data(), first[r].size(),
                                   DataType::kFloat32, ReduceOp::kSum,
                                   within(std::chrono::seconds(20)),
                                   [&met, r](const Status& status) { met[r].set_value(status); });
      }
      for (auto& each : met) ASSERT_TRUE(each.get_future().get().ok());
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

TEST(FailoverThreads, ReducersGoAndComeBackWhileRanksCall) {
  std::mt19937 random(5);
  ClusterOptions options = clusterOf(Algorithm::kServer, 3, 3, 1);
  options.sim.threads = 3;
  options.settings.heartbeat = std::chrono::milliseconds(500);
  options.settings.connect_timeout = std::chrono::seconds(20);
  SimCluster cluster(options);
  std::vector<std::unique_ptr<Caller>> callers;
  std::vector<std::thread> threads;
  for (Rank r = 0; r < 3; ++r) {
    callers.push_back(std::make_unique<Caller>(cluster.group(r), 20'000));
    threads.emplace_back(
        [caller = callers.back().get()] { caller->run(800, std::chrono::milliseconds(4)); });
  }
  const auto pause = [&](std::uint32_t milliseconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % milliseconds));
  };
  for (int round = 0; round < 6; ++round) {
    const int server = round % 3;
    pause(150);
    cluster.network().kill("server" + std::to_string(server));
    pause(300);
    cluster.restart(server);
    pause(900);
    cluster.network().sever("worker" + std::to_string(random() % 3),
                            "server" + std::to_string(random() % 3));
  }
  for (std::thread& thread : threads) thread.join();
  for (Rank r = 0; r < 3; ++r) EXPECT_EQ(callers[r]->failure(), "") << "rank " << r;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (cluster.group(0).counters().servers < 3 && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_EQ(cluster.group(0).counters().servers, 3U);
}

}  // namespace
}  // namespace reducer::testing
