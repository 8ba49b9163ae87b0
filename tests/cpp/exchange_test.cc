// The engine and the exchange on the simulated network: every collective, in thousands of runs,
// each with its seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "collective/shard_map.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;

ClusterOptions clusterOf(Algorithm algorithm, std::int32_t workers, std::int32_t servers,
                         std::uint64_t seed) {
  ClusterOptions options;
  options.workers = workers;
  options.servers = servers;
  options.settings.algorithm = algorithm;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.seed = seed;
  options.sim.piece_bytes_max = 1500;
  return options;
}

std::vector<std::vector<float>> randomInputs(std::int32_t workers, std::size_t count,
                                             std::mt19937& random) {
  std::vector<std::vector<float>> inputs(workers, std::vector<float>(count));
  std::normal_distribution<float> normal;
  for (auto& input : inputs) {
    for (float& value : input)
      value = normal(random) * std::pow(10.0f, static_cast<float>(random() % 7));
  }
  return inputs;
}

std::vector<float> rankOrderSum(const std::vector<std::vector<float>>& inputs) {
  std::vector<float> sum = inputs[0];
  for (std::size_t r = 1; r < inputs.size(); ++r) {
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += inputs[r][i];
  }
  return sum;
}

void expectOk(const std::vector<Outcome>& outcomes) {
  for (std::size_t r = 0; r < outcomes.size(); ++r) {
    EXPECT_TRUE(outcomes[r].status.ok()) << "rank " << r << ": " << outcomes[r].status.message();
  }
}

bool sameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Its bits are others, what it promises beside them is the same.
constexpr Topology kRing = {"ring", Algorithm::kRing, 0};

std::vector<Topology> topologiesAndRing() {
  std::vector<Topology> all(std::begin(kTopologies), std::end(kTopologies));
  all.push_back(kRing);
  return all;
}

TEST(Exchange, AllReduceHasTheBitsOfTheRankOrderSumInEveryTopologyOnEverySeed) {
  // 5,000 runs: seeds x topologies, with random worlds and counts, zero included.
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    std::mt19937 random(seed);
    const auto workers = static_cast<std::int32_t>(1 + random() % 5);
    const std::size_t counts[] = {0, 1, 7, 1000, 5000, 20'001};
    const std::size_t count = counts[random() % 6];
    const auto inputs = randomInputs(workers, count, random);
    const std::vector<float> expected = rankOrderSum(inputs);
    for (const Topology& topology : kTopologies) {
      SCOPED_TRACE(std::string(topology.name) + ", seed " + std::to_string(seed));
      SimCluster cluster(clusterOf(topology.algorithm, workers, topology.servers, seed));
      auto data = inputs;
      std::vector<Outcome> outcomes(workers);
      for (Rank r = 0; r < workers; ++r) {
        cluster.group(r).allReduce(data[r].data(), data[r].data(), count, DataType::kFloat32,
                                   ReduceOp::kSum, within(std::chrono::seconds(10)),
                                   outcomes[r].callback());
      }
      ASSERT_TRUE(cluster.finish(outcomes));
      expectOk(outcomes);
      for (Rank r = 0; r < workers; ++r) ASSERT_TRUE(sameBits(data[r], expected)) << "rank " << r;
      cluster.expectNothingHeld();
    }
  }
}

TEST(Exchange, RingSumsEveryElementOnceOnEverySeed) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto workers = static_cast<std::int32_t>(1 + random() % 6);
    const std::size_t counts[] = {0, 1, 2, 7, 1000, 20'001};
    const std::size_t count = counts[random() % 6];
    SimCluster cluster(clusterOf(Algorithm::kRing, workers, 0, seed));
    std::vector<std::vector<std::int64_t>> data(workers, std::vector<std::int64_t>(count));
    std::vector<std::int64_t> expected(count);
    for (auto& one : data) {
      for (std::size_t i = 0; i < count; ++i)
        expected[i] += one[i] = static_cast<std::int64_t>(random());
    }
    std::vector<Outcome> outcomes(workers);
    for (Rank r = 0; r < workers; ++r) {
      cluster.group(r).allReduce(data[r].data(), data[r].data(), count, DataType::kInt64,
                                 ReduceOp::kSum, within(std::chrono::seconds(10)),
                                 outcomes[r].callback());
    }
    ASSERT_TRUE(cluster.finish(outcomes));
    expectOk(outcomes);
    for (Rank r = 0; r < workers; ++r) ASSERT_EQ(data[r], expected) << "rank " << r;
    cluster.expectNothingHeld();
  }
}

// Every collective once, in order, all outstanding at the same time, on one group.
void runEveryCollective(SimCluster& cluster) {
  const std::int32_t n = cluster.workers();
  const std::size_t count = 3001;
  const auto value = [](Rank rank, std::size_t part, std::size_t i) {
    return static_cast<std::int32_t>(rank * 1'000'000 + part * 10'000 + i);
  };
  struct Buffers {
    std::vector<std::int32_t> reduced, broadcast, scattered, received;
    std::vector<std::vector<std::int32_t>> gathered, all_gathered, to_all_in, to_all_out,
        to_scatter;
    std::vector<std::int32_t> own, reduce_scattered;
  };
  std::vector<Buffers> buffers(n);
  std::vector<Outcome> outcomes(n * 10);
  std::vector<std::size_t> counts(n);
  for (Rank r = 0; r < n; ++r) counts[r] = count + 7 * r;
  const Rank root = n - 1;
  const auto pointers = [](auto& vectors) {
    std::vector<void*> all;
    for (auto& one : vectors) all.push_back(one.data());
    return all;
  };
  for (Rank r = 0; r < n; ++r) {
    Buffers& b = buffers[r];
    collective::Group& group = cluster.group(r);
    Outcome* outcome = &outcomes[r * 10];
    const CallOptions options = within(std::chrono::seconds(20));
    const auto fill = [&](std::size_t size, std::size_t part) {
      std::vector<std::int32_t> data(size);
      for (std::size_t i = 0; i < size; ++i) data[i] = value(r, part, i);
      return data;
    };
    b.own = fill(counts[r], 0);
    b.reduced.resize(count);
    b.broadcast = fill(count, 0);
    b.scattered.resize(counts[r]);
    b.reduce_scattered.resize(counts[r]);
    b.received.resize(count);
    for (Rank p = 0; p < n; ++p) {
      b.gathered.emplace_back(counts[p]);
      b.all_gathered.emplace_back(counts[p]);
      b.to_scatter.push_back(fill(counts[p], p));
      b.to_all_in.push_back(fill(count + 3 * p + 5 * r, p));
      b.to_all_out.emplace_back(count + 3 * r + 5 * p);
    }
    const auto ins = pointers(b.to_scatter);
    const std::vector<const void*> const_ins(ins.begin(), ins.end());
    const auto a2a = pointers(b.to_all_in);
    const std::vector<const void*> const_a2a(a2a.begin(), a2a.end());
    std::vector<std::size_t> in_counts;
    std::vector<std::size_t> out_counts;
    for (Rank p = 0; p < n; ++p) {
      in_counts.push_back(b.to_all_in[p].size());
      out_counts.push_back(b.to_all_out[p].size());
    }
    const DataType i32 = DataType::kInt32;
    group.barrier(options, outcome[0].callback());
    group.reduce(b.own.data(), b.reduced.data(), count, i32, ReduceOp::kSum, root, options,
                 outcome[1].callback());
    group.broadcast(b.broadcast.data(), count, i32, 0, options, outcome[2].callback());
    group.allGather(b.own.data(), pointers(b.all_gathered), counts, i32, options,
                    outcome[3].callback());
    group.reduceScatter(const_ins, b.reduce_scattered.data(), counts, i32, ReduceOp::kMax, options,
                        outcome[4].callback());
    group.gather(b.own.data(), pointers(b.gathered), counts, i32, root, options,
                 outcome[5].callback());
    group.scatter(const_ins, b.scattered.data(), counts, i32, root, options, outcome[6].callback());
    group.allToAll(const_a2a, in_counts, pointers(b.to_all_out), out_counts, i32, options,
                   outcome[7].callback());
    if (n == 1) {
      outcome[8].done = outcome[9].done = true;
    } else {
      group.send(b.own.data(), count, i32, (r + 1) % n, 5, options, outcome[8].callback());
      group.recv(b.received.data(), count, i32, (r + n - 1) % n, 5, options, outcome[9].callback());
    }
  }
  ASSERT_TRUE(cluster.finish(outcomes));
  expectOk(outcomes);
  for (Rank r = 0; r < n; ++r) {
    const Buffers& b = buffers[r];
    for (std::size_t i = 0; i < count; ++i) {
      if (r == root) {
        ASSERT_EQ(b.reduced[i], value(0, 0, i) * n + 1'000'000 * n * (n - 1) / 2);
      }
      ASSERT_EQ(b.broadcast[i], value(0, 0, i));
      ASSERT_EQ(b.reduce_scattered[i], value(n - 1, r, i));
      ASSERT_EQ(b.scattered[i], value(root, r, i));
      if (n > 1) {
        ASSERT_EQ(b.received[i], value((r + n - 1) % n, 0, i));
      }
      for (Rank p = 0; p < n; ++p) {
        ASSERT_EQ(b.all_gathered[p][i], value(p, 0, i));
        ASSERT_EQ(b.to_all_out[p][i], value(p, r, i));
        if (r == root) {
          ASSERT_EQ(b.gathered[p][i], value(p, 0, i));
        }
      }
    }
  }
  cluster.expectNothingHeld();
}

TEST(Exchange, EveryCollectiveInEveryTopologyAllAtOnce) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    for (const Topology& topology : kTopologies) {
      SCOPED_TRACE(std::string(topology.name) + ", seed " + std::to_string(seed));
      SimCluster cluster(clusterOf(topology.algorithm, static_cast<std::int32_t>(1 + seed % 5),
                                   topology.servers, seed));
      runEveryCollective(cluster);
    }
  }
}

// Many more pieces than may be under way in a lane, most of them behind the window.
void runManyAllReduces(const Topology& topology, std::uint64_t seed) {
  SCOPED_TRACE(std::string(topology.name) + ", seed " + std::to_string(seed));
  SimCluster cluster(clusterOf(topology.algorithm, 3, topology.servers, seed));
  std::mt19937 random(seed);
  constexpr std::size_t kOperations = 60;
  std::vector<std::vector<std::vector<std::int32_t>>> data(3);
  std::vector<Outcome> outcomes(3 * kOperations);
  std::vector<std::size_t> sizes;
  for (std::size_t i = 0; i < kOperations; ++i) sizes.push_back(random() % 40'000);
  for (Rank r = 0; r < 3; ++r) {
    for (std::size_t i = 0; i < kOperations; ++i) {
      data[r].emplace_back(sizes[i], static_cast<std::int32_t>(i + r));
      cluster.group(r).allReduce(data[r][i].data(), data[r][i].data(), sizes[i], DataType::kInt32,
                                 ReduceOp::kSum, within(std::chrono::seconds(20)),
                                 outcomes[r * kOperations + i].callback());
    }
  }
  ASSERT_TRUE(cluster.finish(outcomes));
  expectOk(outcomes);
  for (Rank r = 0; r < 3; ++r) {
    for (std::size_t i = 0; i < kOperations; ++i) {
      ASSERT_EQ(data[r][i],
                std::vector<std::int32_t>(sizes[i], static_cast<std::int32_t>(3 * i + 3)));
    }
    const auto counters = cluster.group(r).counters();
    EXPECT_GT(counters.outstanding_bytes_max, 0u);
    // Each turn of a ring has a lane and a window of its own.
    if (topology.algorithm != Algorithm::kRing) {
      EXPECT_LE(counters.outstanding_bytes_max, counters.window_bytes);
    }
  }
  cluster.expectNothingHeld();
}

TEST(Exchange, ManyOutstandingAllReducesKeepToTheWindow) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    runManyAllReduces({"mixed2", Algorithm::kMixed, 2}, seed);
  }
}

TEST(Exchange, ManyOutstandingAllReducesOfARingDoNotBlockEachOther) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) runManyAllReduces(kRing, seed);
}

TEST(Exchange, DifferentCallsFailOnEveryRankWithOneMessageAndTheNextCallWorks) {
  for (const Topology& topology : topologiesAndRing()) {
    for (std::uint64_t seed = 0; seed < 60; ++seed) {
      SCOPED_TRACE(std::string(topology.name) + ", seed " + std::to_string(seed));
      SimCluster cluster(clusterOf(topology.algorithm, 3, topology.servers, seed));
      std::vector<std::vector<float>> data(3, std::vector<float>(50'000, 1.0f));
      std::vector<Outcome> outcomes(3);
      const CallOptions options = within(std::chrono::seconds(5));
      for (Rank r = 0; r < 3; ++r) {
        collective::Group& group = cluster.group(r);
        float* x = data[r].data();
        if (r == 1 && seed % 5 == 0) {
          group.allReduce(x, x, 3, DataType::kFloat32, ReduceOp::kSum, options,
                          outcomes[r].callback());
        } else if (r == 1 && seed % 5 == 1) {
          group.allReduce(x, x, 40'000, DataType::kInt32, ReduceOp::kSum, options,
                          outcomes[r].callback());
        } else if (r == 1 && seed % 5 == 2) {
          group.allReduce(x, x, 40'000, DataType::kFloat32, ReduceOp::kMax, options,
                          outcomes[r].callback());
        } else if (r == 1 && seed % 5 == 3) {
          group.broadcast(x, 40'000, DataType::kFloat32, 1, options, outcomes[r].callback());
        } else if (r == 1) {
          const std::vector<void*> outs{x, x + 10, x + 20};
          const std::vector<std::size_t> counts{1, 1, 1};
          group.allGather(x + 30, outs, counts, DataType::kFloat32, options,
                          outcomes[r].callback());
        } else {
          group.allReduce(x, x, 40'000, DataType::kFloat32, ReduceOp::kSum, options,
                          outcomes[r].callback());
        }
      }
      ASSERT_TRUE(cluster.finish(outcomes, std::chrono::seconds(3))) << "the error must come soon";
      for (Rank r = 0; r < 3; ++r) {
        EXPECT_EQ(outcomes[r].status.code(), Code::kMismatch) << outcomes[r].status.message();
        EXPECT_EQ(outcomes[r].status.message(), outcomes[0].status.message());
        EXPECT_NE(outcomes[r].status.message().find(
                      "rank 0 (worker0:1), rank 2 (worker2:1) called all_reduce(sum"),
                  std::string::npos)
            << outcomes[r].status.message();
        EXPECT_TRUE(std::all_of(data[r].begin(), data[r].end(), [](float v) { return v == 1.0f; }))
            << "inputs are lost";
      }
      std::vector<Outcome> next(3);
      for (Rank r = 0; r < 3; ++r) {
        cluster.group(r).allReduce(data[r].data(), data[r].data(), 40'000, DataType::kFloat32,
                                   ReduceOp::kSum, options, next[r].callback());
      }
      ASSERT_TRUE(cluster.finish(next));
      expectOk(next);
      EXPECT_EQ(data[2][39'999], 3.0f);
      EXPECT_EQ(data[2][40'000], 1.0f);
      cluster.expectNothingHeld();
    }
  }
}

TEST(Exchange, ARankThatNeverComesIsNamedWhenTheTimeoutPasses) {
  for (const Topology& topology : kTopologies) {
    SCOPED_TRACE(topology.name);
    SimCluster cluster(clusterOf(topology.algorithm, 3, topology.servers, 1));
    std::vector<float> data(3000, 1.0f);
    std::vector<Outcome> outcomes(2);
    for (const Rank r : {0, 2}) {
      cluster.group(r).allReduce(data.data(), data.data(), 1000, DataType::kFloat32, ReduceOp::kSum,
                                 within(std::chrono::seconds(5)), outcomes[r / 2].callback());
    }
    const TimePoint start = cluster.network().now();
    ASSERT_TRUE(cluster.finish(outcomes));
    EXPECT_LT(cluster.network().now() - start, std::chrono::seconds(6));
    for (const Outcome& outcome : outcomes) {
      EXPECT_EQ(outcome.status.code(), Code::kTimeout);
      EXPECT_NE(outcome.status.message().find("for rank 1 (worker1:1)"), std::string::npos)
          << outcome.status.message();
    }
    // It comes at last, and learns what happened; then all go on.
    std::vector<Outcome> late(1);
    cluster.group(1).allReduce(data.data(), data.data(), 1000, DataType::kFloat32, ReduceOp::kSum,
                               within(std::chrono::seconds(5)), late[0].callback());
    ASSERT_TRUE(cluster.finish(late));
    EXPECT_EQ(late[0].status.code(), Code::kTimeout);
    std::vector<Outcome> next(3);
    for (Rank r = 0; r < 3; ++r)
      cluster.group(r).barrier(within(std::chrono::seconds(5)), next[r].callback());
    ASSERT_TRUE(cluster.finish(next));
    expectOk(next);
    cluster.expectNothingHeld();
  }
}

TEST(Exchange, AWorkerThatDiesInTheMiddleFailsTheOthersSoonAndByName) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    for (const Topology& topology : topologiesAndRing()) {
      SCOPED_TRACE(std::string(topology.name) + ", seed " + std::to_string(seed));
      // Declared first: the dead worker's own calls end with the cluster only.
      std::vector<std::vector<float>> data(4, std::vector<float>(30'000, 1.0f));
      std::vector<Outcome> outcomes(4);
      std::vector<Outcome> second(4);
      SimCluster cluster(clusterOf(topology.algorithm, 4, topology.servers, seed));
      // Until all have met: before that a dead rank is one that has not started yet.
      cluster.network().runUntil([] { return false; }, std::chrono::milliseconds(100));
      for (Rank r = 0; r < 4; ++r) {
        cluster.group(r).allReduce(data[r].data(), data[r].data(), 30'000, DataType::kFloat32,
                                   ReduceOp::kSum, within(std::chrono::minutes(30)),
                                   outcomes[r].callback());
      }
      for (std::uint64_t i = 0; i < 10 + seed * 3; ++i) cluster.network().step();
      cluster.network().kill("worker2");
      // A second call: whoever finished the first one meets the death there.
      for (const Rank r : {0, 1, 3}) {
        cluster.group(r).barrier(within(std::chrono::minutes(30)), second[r].callback());
      }
      const auto all_done = [&] {
        return std::all_of(second.begin(), second.end(),
                           [&](const Outcome& o) { return o.done || &o == &second[2]; }) &&
               std::all_of(outcomes.begin(), outcomes.end(),
                           [&](const Outcome& o) { return o.done || &o == &outcomes[2]; });
      };
      const bool ended = cluster.network().runUntil(all_done, std::chrono::seconds(5));
      for (const Rank r : {0, 1, 3}) {
        EXPECT_TRUE(ended) << "a hang is the worst bug; rank " << r << ": " << outcomes[r].done
                           << " '" << outcomes[r].status.message() << "', " << second[r].done
                           << " '" << second[r].status.message() << "'";
      }
      for (const Rank r : {0, 1, 3}) {
        if (outcomes[r].status.ok()) {
          EXPECT_EQ(data[r], std::vector<float>(30'000, 4.0f)) << "a finished result is whole";
        }
        EXPECT_FALSE(second[r].status.ok());
        EXPECT_NE(second[r].status.message().find("rank 2"), std::string::npos)
            << second[r].status.message();
        const std::string joined = outcomes[r].status.ok()
                                       ? "the last collective it joined was #0, all_reduce(sum, "
                                         "float32, 30000 elements)"
                                       : "it joined";
        EXPECT_NE(second[r].status.message().find(joined), std::string::npos)
            << second[r].status.message();
      }
      cluster.expectNothingHeld(/*dead=*/2);
    }
  }
}

TEST(Exchange, AReducerWithoutMemoryRefusesAndSaysWhatToDo) {
  ClusterOptions options = clusterOf(Algorithm::kServer, 3, 1, 1);
  options.server_memory_bytes = 10'000;
  SimCluster cluster(options);
  std::vector<float> data(1000);
  std::vector<Outcome> outcomes(3);
  for (Rank r = 0; r < 3; ++r) {
    cluster.group(r).allReduce(data.data(), data.data(), 1000, DataType::kFloat32, ReduceOp::kSum,
                               within(std::chrono::seconds(5)), outcomes[r].callback());
  }
  ASSERT_TRUE(cluster.finish(outcomes));
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.status.code(), Code::kResourceExhausted);
    EXPECT_NE(outcome.status.message().find("raise --memory-limit"), std::string::npos)
        << outcome.status.message();
  }
}

TEST(Exchange, TwoGroupsAtOnceDoNotSeeEachOther) {
  SimCluster cluster(clusterOf(Algorithm::kServer, 3, 1, 9));
  std::vector<std::shared_ptr<collective::Group>> first = cluster.groups();
  cluster.makeGroups("ABCDEFGHIJKLMNOP", "second");
  std::vector<std::vector<std::int32_t>> a(3, std::vector<std::int32_t>(5000, 1));
  std::vector<std::vector<std::int32_t>> b(3, std::vector<std::int32_t>(5000, 10));
  std::vector<Outcome> outcomes(6);
  for (Rank r = 0; r < 3; ++r) {
    first[r]->allReduce(a[r].data(), a[r].data(), 5000, DataType::kInt32, ReduceOp::kSum,
                        within(std::chrono::seconds(5)), outcomes[r].callback());
    cluster.group(r).allReduce(b[r].data(), b[r].data(), 4000, DataType::kInt32, ReduceOp::kMax,
                               within(std::chrono::seconds(5)), outcomes[3 + r].callback());
  }
  ASSERT_TRUE(cluster.finish(outcomes));
  expectOk(outcomes);
  EXPECT_EQ(a[1], std::vector<std::int32_t>(5000, 3));
  EXPECT_EQ(b[1], std::vector<std::int32_t>(5000, 10));
  EXPECT_EQ(cluster.reducers()[0]->stats().groups.size(), 2u);
  for (auto& group : first) group->close();
  cluster.network().runUntil([] { return false; }, std::chrono::seconds(1));
  EXPECT_EQ(cluster.reducers()[0]->stats().groups.size(), 1u);
}

TEST(Exchange, AbortEndsWhatIsOutstandingAndANewGroupWorksInTheSameProcess) {
  SimCluster cluster(clusterOf(Algorithm::kDirect, 3, 0, 4));
  std::vector<float> data(1000, 1.0f);
  std::vector<Outcome> outcomes(1);
  cluster.group(0).allReduce(data.data(), data.data(), 1000, DataType::kFloat32, ReduceOp::kSum,
                             within(std::chrono::minutes(30)), outcomes[0].callback());
  for (Rank r = 0; r < 3; ++r) cluster.group(r).abort("the test wants it");
  EXPECT_EQ(outcomes[0].status.code(), Code::kAborted);
  EXPECT_NE(outcomes[0].status.message().find("the test wants it"), std::string::npos);
  std::vector<Outcome> after(1);
  cluster.group(0).barrier(within(std::chrono::seconds(1)), after[0].callback());
  EXPECT_EQ(after[0].status.code(), Code::kAborted);
  cluster.makeGroups("ABCDEFGHIJKLMNOP", "again");
  runEveryCollective(cluster);
}

TEST(Exchange, AWorkerMayEndAsSoonAsItsLastCallIsDone) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(seed);
    SimCluster cluster(clusterOf(Algorithm::kDirect, 3, 0, seed));
    std::vector<std::vector<float>> data(3, std::vector<float>(30'000));
    data[0].assign(30'000, 5.0f);
    std::vector<Outcome> outcomes(3);
    for (Rank r = 0; r < 2; ++r) {
      cluster.group(r).broadcast(data[r].data(), 30'000, DataType::kFloat32, 0,
                                 within(std::chrono::seconds(20)), outcomes[r].callback());
    }
    cluster.network().runUntil([] { return false; }, std::chrono::seconds(1));
    cluster.group(2).broadcast(data[2].data(), 30'000, DataType::kFloat32, 0,
                               within(std::chrono::seconds(20)), outcomes[2].callback());
    // Whoever is done leaves at once.
    std::vector<bool> left(3);
    ASSERT_TRUE(cluster.network().runUntil(
        [&] {
          for (Rank r = 0; r < 3; ++r) {
            if (!outcomes[r].done || left[r]) continue;
            cluster.group(r).close();
            left[r] = true;
          }
          return left[0] && left[1] && left[2];
        },
        std::chrono::seconds(30)));
    expectOk(outcomes);
    EXPECT_EQ(data[1], data[0]);
    EXPECT_EQ(data[2], data[0]);
  }
}

// For ThreadSanitizer: real threads deliver and call.
TEST(ExchangeThreads, CollectivesFromSeveralThreadsOverSeveralThreads) {
  ClusterOptions options = clusterOf(Algorithm::kMixed, 3, 2, 11);
  options.sim.threads = 3;
  options.sim.latency_min = std::chrono::microseconds(0);
  options.sim.latency_max = std::chrono::microseconds(50);
  SimCluster cluster(options);
  std::vector<std::thread> threads;
  for (Rank r = 0; r < 3; ++r) {
    threads.emplace_back([&cluster, r] {
      for (int round = 0; round < 20; ++round) {
        std::vector<std::vector<std::int32_t>> data(5, std::vector<std::int32_t>(6000, r + round));
        std::mutex mutex;
        std::condition_variable condition;
        std::size_t done = 0;
        for (auto& one : data) {
          cluster.group(r).allReduce(one.data(), one.data(), one.size(), DataType::kInt32,
                                     ReduceOp::kSum, within(std::chrono::seconds(60)),
                                     [&](const Status& status) {
                                       EXPECT_TRUE(status.ok()) << status.message();
                                       const std::lock_guard lock(mutex);
                                       ++done;
                                       condition.notify_one();
                                     });
        }
        std::unique_lock lock(mutex);
        ASSERT_TRUE(condition.wait_for(lock, std::chrono::seconds(60),
                                       [&] { return done == data.size(); }));
        for (const auto& one : data) ASSERT_EQ(one, std::vector<std::int32_t>(6000, 3 + 3 * round));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace reducer::testing
