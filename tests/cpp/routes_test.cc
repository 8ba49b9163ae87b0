// Several algorithms in one group, by the size of the call.
#include "collective/routes.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <numeric>

#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;
using collective::Nics;
using collective::OwnerIndex;
using collective::Routes;
using collective::Settings;

Settings settingsOf(const std::string& text) {
  Settings settings;
  settings.choose(collective::parseRanges(text).value());
  return settings;
}

TEST(Routes, ASizeHasTheRangeThatItBeginsIn) {
  const Routes routes(settingsOf("0-64KiB:direct,64KiB-1MiB:ring,1MiB-:mixed"), Nics::equal(4, 2));
  EXPECT_EQ(routes.at(0).range.algorithm, Algorithm::kDirect);
  EXPECT_EQ(routes.at(65535).range.algorithm, Algorithm::kDirect);
  EXPECT_EQ(routes.at(65536).range.algorithm, Algorithm::kRing);
  EXPECT_EQ(routes.at(1 << 20).range.algorithm, Algorithm::kMixed);
  EXPECT_EQ(routes.at(UINT64_MAX).range.algorithm, Algorithm::kMixed);
  EXPECT_EQ(routes.algorithm(), Algorithm::kAuto);
  EXPECT_EQ(&routes.mapOf(routes.at(0)), &routes.mapOf(routes.at(65536))) << "ring has no map";
}

TEST(Routes, OneAlgorithmIsAsBefore) {
  const Routes routes(settingsOf("mixed"), Nics::equal(8, 4));
  const collective::ShardMap map(Algorithm::kMixed, 8, 4, 0, 0);
  EXPECT_EQ(routes.owners(), map.owners());
  EXPECT_EQ(routes.windowBytesTotal(), map.windowBytesTotal());
  for (std::uint64_t seq = 0; seq < 30; ++seq)
    EXPECT_EQ(routes.coordinator(seq), map.coordinator(seq));
  EXPECT_FALSE(routes.several());
  EXPECT_EQ(Routes(settingsOf("auto"), Nics::equal(3, 0)).algorithm(), Algorithm::kDirect);
  EXPECT_EQ(Routes(settingsOf("auto"), Nics::equal(3, 1)).algorithm(), Algorithm::kMixed);
}

TEST(Routes, CoordinatorsAreOwnersOfEveryMapWhereThereAreSome) {
  const Routes common(settingsOf("0-64KiB:direct,64KiB-:mixed"), Nics::equal(4, 2));
  const Routes servers(settingsOf("0-64KiB:server,64KiB-:mixed"), Nics::equal(4, 2));
  const Routes none(settingsOf("0-64KiB:direct,64KiB-:server"), Nics::equal(4, 2));
  for (std::uint64_t seq = 0; seq < 12; ++seq) {
    EXPECT_EQ(common.coordinator(seq), seq % 4);
    EXPECT_EQ(servers.coordinator(seq), 4 + seq % 2);
    EXPECT_EQ(none.coordinator(seq), seq % 4) << "those of the smallest calls";
  }
}

TEST(Routes, CoordinatorsFollowWhatWasMeasured) {
  Settings settings = settingsOf("auto");
  settings.measures = true;
  const auto measured = [](Algorithm algorithm, std::uint64_t nbytes, std::uint64_t microseconds) {
    collective::Sample sample;
    sample.algorithm = algorithm;
    sample.ranks = sample.hosts = sample.servers = 4;
    sample.nbytes = nbytes;
    sample.nanoseconds = 1000 * microseconds;
    return sample;
  };
  for (const bool direct_first : {true, false}) {
    Routes routes(settings, Nics::equal(4, 4));
    routes.adopt({measured(Algorithm::kDirect, 1 << 10, direct_first ? 100 : 300),
                  measured(Algorithm::kMixed, 1 << 10, 200),
                  measured(Algorithm::kDirect, 1 << 20, 9000),
                  measured(Algorithm::kMixed, 1 << 20, 5000)});
    ASSERT_EQ(routes.at(1 << 10).range.algorithm,
              direct_first ? Algorithm::kDirect : Algorithm::kMixed);
    ASSERT_EQ(routes.at(1 << 20).range.algorithm, Algorithm::kMixed);
    for (std::uint64_t seq = 0; seq < 12; ++seq) {
      EXPECT_EQ(routes.coordinator(seq), (direct_first ? 0 : 4) + seq % 4);
    }
  }
}

TEST(Routes, WindowsAreTheLargestOfTheMaps) {
  const Routes routes(settingsOf("0-64KiB:direct,64KiB-:mixed"), Nics::equal(8, 4));
  const collective::ShardMap direct(Algorithm::kDirect, 8, 4, 0, 0);
  const collective::ShardMap mixed(Algorithm::kMixed, 8, 4, 0, 0);
  EXPECT_EQ(routes.windowBytes(0), std::max(direct.windowBytes(0), mixed.windowBytes(0)));
  EXPECT_EQ(routes.windowBytes(9), mixed.windowBytes(9)) << "direct has no such owner";
  const Routes asked(settingsOf("0-64KiB:direct,64KiB-:direct/64KiB/32MiB"), Nics::equal(8, 0));
  EXPECT_EQ(asked.windowBytes(3), std::size_t{4} << 20);
}

// ------------------------------------------------------------------ on the simulated network

constexpr const char* kMixtures[] = {"0-64KiB:direct,64KiB-:server", "0-4KiB:server,4KiB-:direct",
                                     "0-4KiB:direct,4KiB-64KiB:server,64KiB-:mixed/8KiB",
                                     "0-20KiB:mixed,20KiB-:ring"};

ClusterOptions clusterOf(const std::string& algorithms, std::uint64_t seed) {
  ClusterOptions options;
  options.workers = 4;
  options.servers = 2;
  options.settings = settingsOf(algorithms);
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.seed = seed;
  options.sim.piece_bytes_max = 1500;
  return options;
}

CallOptions within(std::chrono::milliseconds timeout) {
  CallOptions options;
  options.timeout = timeout;
  return options;
}

void allReduce(SimCluster& cluster, Rank rank, std::vector<std::int32_t>& data, Outcome& outcome) {
  cluster.group(rank).allReduce(data.data(), data.data(), data.size(), DataType::kInt32,
                                ReduceOp::kSum, within(std::chrono::seconds(10)),
                                outcome.callback());
}

TEST(Mixtures, CallsOfEverySizeAreRightSideBySide) {
  const std::vector<std::size_t> counts{0, 1, 999, 1024, 5001, 16'383, 16'384, 40'001};
  for (const char* algorithms : kMixtures) {
    for (std::uint64_t seed = 0; seed < 15; ++seed) {
      SCOPED_TRACE(std::string(algorithms) + ", seed " + std::to_string(seed));
      SimCluster cluster(clusterOf(algorithms, seed));
      const std::size_t calls = 3 * counts.size();
      std::vector<Outcome> outcomes(calls * 4);
      std::vector<std::vector<std::int32_t>> data;
      for (Rank r = 0; r < 4; ++r) {
        for (std::size_t i = 0; i < calls; ++i) {
          data.emplace_back(counts[i % counts.size()]);
          std::iota(data.back().begin(), data.back().end(),
                    static_cast<std::int32_t>(r * 1000 + i));
        }
      }
      // All under way at once: reduce and broadcast among the all-reduces, and barriers.
      for (Rank r = 0; r < 4; ++r) {
        for (std::size_t i = 0; i < calls; ++i) {
          auto& own = data[r * calls + i];
          Outcome& outcome = outcomes[r * calls + i];
          const CallOptions options = within(std::chrono::seconds(20));
          if (i % 3 == 0) {
            allReduce(cluster, r, own, outcome);
          } else if (i % 3 == 1) {
            cluster.group(r).broadcast(own.data(), own.size(), DataType::kInt32, 3, options,
                                       outcome.callback());
          } else if (i % 6 == 2) {
            cluster.group(r).reduce(own.data(), own.data(), own.size(), DataType::kInt32,
                                    ReduceOp::kSum, 2, options, outcome.callback());
          } else {
            cluster.group(r).barrier(options, outcome.callback());
          }
        }
      }
      ASSERT_TRUE(cluster.finish(outcomes));
      for (const Outcome& outcome : outcomes)
        ASSERT_TRUE(outcome.status.ok()) << outcome.status.message();
      for (std::size_t i = 0; i < calls; ++i) {
        for (Rank r = 0; r < 4; ++r) {
          const auto& own = data[r * calls + i];
          for (std::size_t j = 0; j < own.size(); ++j) {
            const auto base = static_cast<std::int32_t>(j + i);
            const bool summed = i % 3 == 0 || (i % 6 == 2 && r == 2);
            const std::int32_t expected =
                summed ? 4 * base + 6000 : base + 1000 * (i % 3 == 1 ? 3 : r);
            ASSERT_EQ(own[j], expected) << "call " << i << ", rank " << r;
          }
        }
      }
      cluster.expectNothingHeld();
    }
  }
}

TEST(Mixtures, RanksWhoseSizesGoDifferentWaysMeetAndGoOn) {
  for (const char* algorithms : kMixtures) {
    for (const auto& [small, large] : {std::pair<std::size_t, std::size_t>{1, 40'001},
                                       {0, 5001},
                                       {16'383, 16'384},
                                       {1000, 1024}}) {
      SCOPED_TRACE(std::string(algorithms) + ", " + std::to_string(small));
      std::deque<std::vector<std::int32_t>>
          kept;  // a failed call's bytes may still be on their way
      SimCluster cluster(clusterOf(algorithms, small));
      for (int turn = 0; turn < 3; ++turn) {
        std::vector<std::vector<std::int32_t>> data;
        for (Rank r = 0; r < 4; ++r) data.emplace_back(r == turn ? large : small, 7 + r);
        std::vector<Outcome> outcomes(4);
        for (Rank r = 0; r < 4; ++r) allReduce(cluster, r, data[r], outcomes[r]);
        ASSERT_TRUE(cluster.finish(outcomes));
        for (Rank r = 0; r < 4; ++r) {
          EXPECT_EQ(outcomes[r].status.code(), Code::kMismatch) << outcomes[r].status.message();
          for (const std::int32_t value : data[r]) ASSERT_EQ(value, 7 + r);
        }
        // The number is spent on all alike: the next call works.
        std::vector<Outcome> next(4);
        for (Rank r = 0; r < 4; ++r) {
          kept.push_back(std::move(data[r]));
          data[r].assign(large, 1);
          allReduce(cluster, r, data[r], next[r]);
        }
        ASSERT_TRUE(cluster.finish(next));
        for (Rank r = 0; r < 4; ++r) {
          EXPECT_TRUE(next[r].status.ok()) << next[r].status.message();
          for (const std::int32_t value : data[r]) ASSERT_EQ(value, 4);
        }
      }
      cluster.expectNothingHeld();
    }
  }
}

TEST(Mixtures, UnequalNicsShiftBytesAndKeepTheSum) {
  for (const char* algorithms : {"mixed", "server", "direct", "0-4KiB:direct,4KiB-:mixed"}) {
    SCOPED_TRACE(algorithms);
    ClusterOptions options = clusterOf(algorithms, 3);
    SimCluster cluster(options);
    cluster.groups().clear();
    for (Rank r = 0; r < 4; ++r) {
      auto config = cluster.config(r, "0123456789abcdeY", "unequal");
      config.places = {"a", "a", "b", "c"};
      config.settings.carrier =
          collective::Carrier::kGrpc;  // all bytes of all ranks go over the NICs
      config.worker_bandwidths = {20, 20, 10, 5};
      config.server_bandwidths = {25, 100};
      auto group = collective::Group::create(config, cluster.host(r), *cluster.locals()[r]);
      ASSERT_TRUE(group.ok()) << group.status().message();
      cluster.groups().push_back(std::move(group).value());
    }
    std::vector<std::vector<std::int32_t>> data(4, std::vector<std::int32_t>(40'001, 3));
    std::vector<Outcome> outcomes(4);
    for (Rank r = 0; r < 4; ++r) allReduce(cluster, r, data[r], outcomes[r]);
    ASSERT_TRUE(cluster.finish(outcomes));
    for (Rank r = 0; r < 4; ++r) {
      EXPECT_TRUE(outcomes[r].status.ok()) << outcomes[r].status.message();
      for (const std::int32_t value : data[r]) ASSERT_EQ(value, 12);
    }
    const auto pushed = [&](int server) {
      return cluster.reducers()[server]->stats().pushed_bytes;
    };
    if (std::string(algorithms) == "direct") {
      EXPECT_EQ(pushed(0) + pushed(1), 0u);
    } else {
      EXPECT_NEAR(static_cast<double>(pushed(1)), 4.0 * static_cast<double>(pushed(0)),
                  0.05 * static_cast<double>(pushed(1)));
    }
  }
}

TEST(Mixtures, BandwidthsAreGivenForAllOrForNone) {
  SimCluster cluster(clusterOf("mixed", 1));
  auto config = cluster.config(0, "0123456789abcdeZ", "other");
  config.worker_bandwidths = {1, 1, 1, 1};
  auto group = collective::Group::create(config, cluster.host(0), *cluster.locals()[0]);
  ASSERT_FALSE(group.ok());
  EXPECT_NE(group.status().message().find("4 of 4 ranks and 0 of 2 standalone"), std::string::npos)
      << group.status().message();
  config.server_bandwidths = {1, 0};
  group = collective::Group::create(config, cluster.host(0), *cluster.locals()[0]);
  EXPECT_FALSE(group.ok());
}

TEST(Mixtures, ServerAmongTheRangesNeedsServers) {
  ClusterOptions options = clusterOf("0-1MiB:direct,1MiB-:direct", 1);
  options.servers = 0;
  SimCluster cluster(options);
  auto config = cluster.config(0, "0123456789abcdeX", "other");
  config.settings = settingsOf("0-1MiB:direct,1MiB-:server");
  const auto group = collective::Group::create(config, cluster.host(0), *cluster.locals()[0]);
  ASSERT_FALSE(group.ok());
  EXPECT_EQ(group.status().code(), Code::kInvalidArgument);
  EXPECT_NE(group.status().message().find("'1MiB-:server'"), std::string::npos)
      << group.status().message();
}

}  // namespace
}  // namespace reducer::testing
