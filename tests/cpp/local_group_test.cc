// A group whose ranks share memory: as any other group for its callers, whichever thread runs it.
#include "collective/local_group.h"

#include <cstring>
#include <future>
#include <thread>

#include "sim_cluster.h"

namespace reducer::collective {
namespace {

using namespace std::chrono_literals;  // NOLINT(google-build-using-namespace): tests
using testing::ClusterOptions;
using testing::SimCluster;

ClusterOptions oneHost(std::int32_t n, std::size_t chunk_bytes = 4096) {
  ClusterOptions options;
  options.workers = n;
  options.places.assign(n, "here");
  options.settings.chunk_bytes = chunk_bytes;
  options.sim.threads = 1;
  options.sim.latency_min = options.sim.latency_max = Duration::zero();
  return options;
}

CallOptions within(std::chrono::milliseconds timeout, bool blocking) {
  CallOptions options;
  options.timeout = timeout;
  options.blocking = blocking;
  return options;
}

using Start = std::function<void(Done)>;
Status await(const Start& start) {
  const auto ended = std::make_shared<std::promise<Status>>();
  start([ended](const Status& status) { ended->set_value(status); });
  auto future = ended->get_future();
  if (future.wait_for(30s) != std::future_status::ready) {
    return Status(Code::kInternal, "an operation never ended");
  }
  return future.get();
}

Status sumOf(Group& group, std::vector<float>& data, bool blocking,
             std::chrono::milliseconds timeout = 20s) {
  return await([&](Done done) {
    group.allReduce(data.data(), data.data(), data.size(), DataType::kFloat32, ReduceOp::kSum,
                    within(timeout, blocking), std::move(done));
  });
}

void onEveryRank(SimCluster& cluster, std::int32_t n,
                 const std::function<void(Rank, Group&)>& run) {
  std::vector<std::thread> threads;
  for (Rank r = 0; r < n; ++r) {
    threads.emplace_back([&cluster, &run, r] { run(r, cluster.group(r)); });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(LocalGroup, IsChosenWhereAllRanksShareAHost) {
  GroupConfig config;
  config.places = {"a", "a"};
  EXPECT_TRUE(sharesMemory(config).value());
  config.settings.carrier = Carrier::kGrpc;
  EXPECT_FALSE(sharesMemory(config).value());
  config.settings.carrier = Carrier::kShm;
  EXPECT_TRUE(sharesMemory(config).value());
  config.settings.algorithm = Algorithm::kDirect;
  EXPECT_FALSE(sharesMemory(config).value());
  config.settings.algorithm = Algorithm::kLocal;
  EXPECT_TRUE(sharesMemory(config).value());
  config.places = {"a", "b", "a"};
  EXPECT_NE(sharesMemory(config).status().message().find("ranks 0, 2 on a; ranks 1 on b"),
            std::string::npos)
      << sharesMemory(config).status().message();
  config.settings.algorithm = Algorithm::kAuto;
  EXPECT_FALSE(sharesMemory(config).value());
  config.places.clear();
  EXPECT_FALSE(sharesMemory(config).value());
}

TEST(LocalGroup, AllCollectivesHereAndOnTheGroupsThread) {
  constexpr std::int32_t n = 3;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    EXPECT_EQ(group.algorithm(), Algorithm::kLocal);
    for (const bool blocking : {false, true, true}) {
      const auto options = [&] { return within(20s, blocking); };
      const std::size_t counts[] = {5, 0, 3000};
      for (const std::size_t count : {std::size_t{0}, std::size_t{7}, std::size_t{5000}}) {
        std::vector<float> data(count, static_cast<float>(r));
        ASSERT_TRUE(sumOf(group, data, blocking).ok());
        EXPECT_EQ(data, std::vector<float>(count, 3));
      }
      std::vector<int> word(2000, r == 1 ? 42 : 0);
      ASSERT_TRUE(await([&](Done done) {
                    group.broadcast(word.data(), word.size(), DataType::kInt32, 1, options(), done);
                  }).ok());
      EXPECT_EQ(word, std::vector<int>(2000, 42));
      ASSERT_TRUE(await([&](Done done) { group.barrier(options(), done); }).ok());

      std::vector<std::vector<int>> parts(n);
      std::vector<void*> outs;
      std::vector<const void*> ins;
      for (Rank p = 0; p < n; ++p) {
        parts[p].assign(counts[p], 0);
        outs.push_back(parts[p].data());
      }
      const std::vector<int> own(counts[r], r + 1);
      ASSERT_TRUE(await([&](Done done) {
                    group.allGather(own.data(), outs, counts, DataType::kInt32, options(), done);
                  }).ok());
      for (Rank p = 0; p < n; ++p) EXPECT_EQ(parts[p], std::vector<int>(counts[p], p + 1));
      for (Rank p = 0; p < n; ++p) ins.push_back(parts[p].data());
      std::vector<int> mine(counts[r]);
      ASSERT_TRUE(await([&](Done done) {
                    group.reduceScatter(ins, mine.data(), counts, DataType::kInt32, ReduceOp::kSum,
                                        options(), done);
                  }).ok());
      EXPECT_EQ(mine, std::vector<int>(counts[r], 3 * (r + 1)));
      std::fill(mine.begin(), mine.end(), 0);
      ASSERT_TRUE(await([&](Done done) {
                    group.scatter(
                        r == 2 ? std::span<const void* const>(ins) : std::span<const void* const>(),
                        mine.data(), counts, DataType::kInt32, 2, options(), done);
                  }).ok());
      EXPECT_EQ(mine, std::vector<int>(counts[r], r + 1));
      ASSERT_TRUE(await([&](Done done) {
                    group.gather(mine.data(),
                                 r == 0 ? std::span<void* const>(outs) : std::span<void* const>(),
                                 counts, DataType::kInt32, 0, options(), done);
                  }).ok());
      // To each the same as from it: everybody's counts, by pairs.
      std::vector<std::vector<int>> given, got;
      std::vector<const void*> to;
      std::vector<void*> from;
      std::vector<std::size_t> sizes;
      for (Rank p = 0; p < n; ++p) {
        sizes.push_back(static_cast<std::size_t>(p + r) * 700);
        given.emplace_back(sizes[p], 10 * r + p);
        got.emplace_back(sizes[p], 0);
      }
      for (Rank p = 0; p < n; ++p) {
        to.push_back(given[p].data());
        from.push_back(got[p].data());
      }
      ASSERT_TRUE(await([&](Done done) {
                    group.allToAll(to, sizes, from, sizes, DataType::kInt32, options(), done);
                  }).ok());
      for (Rank p = 0; p < n; ++p) EXPECT_EQ(got[p], std::vector<int>(sizes[p], 10 * p + r));
    }
  });
}

TEST(LocalGroup, ManyCallsAtOnceKeepTheirOrder) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    std::vector<std::vector<float>> data(50);
    std::vector<std::future<Status>> ends;
    for (std::size_t i = 0; i < data.size(); ++i) {
      data[i].assign(i * 37, static_cast<float>(r + i));
      auto ended = std::make_shared<std::promise<Status>>();
      ends.push_back(ended->get_future());
      group.allReduce(data[i].data(), data[i].data(), data[i].size(), DataType::kFloat32,
                      ReduceOp::kSum, within(20s, i % 7 == 0),
                      [ended](const Status& status) { ended->set_value(status); });
    }
    for (std::size_t i = 0; i < data.size(); ++i) {
      ASSERT_TRUE(ends[i].get().ok());
      EXPECT_EQ(data[i], std::vector<float>(i * 37, static_cast<float>(2 * i + 1)));
    }
    EXPECT_EQ(group.sequence(), data.size());
  });
}

TEST(LocalGroup, DifferentCallsAreToldOnEveryRankAndTheNextWorks) {
  constexpr std::int32_t n = 3;
  SimCluster cluster(oneHost(n));
  std::vector<std::string> texts(n);
  onEveryRank(cluster, n, [&](Rank r, Group& group) {
    std::vector<float> data(r == 2 ? 10 : 1000, 1);
    const Status status = sumOf(group, data, true);
    EXPECT_EQ(status.code(), Code::kMismatch);
    EXPECT_EQ(data.back(), 1);
    texts[r] = status.message();
    data.assign(1000, 1);
    ASSERT_TRUE(sumOf(group, data, false).ok());
    EXPECT_EQ(data.back(), 3);
  });
  EXPECT_EQ(texts[0],
            "ranks made different calls in group 'default', collective #0: rank 0 (worker0:1), "
            "rank 1 (worker1:1) called all_reduce(sum, float32, 1000 elements); rank 2 (worker2:1) "
            "called all_reduce(sum, float32, 10 elements). All ranks of a group must make the same "
            "calls in the same order.");
  EXPECT_EQ(texts[1], texts[0]);
  EXPECT_EQ(texts[2], texts[0]);
}

TEST(LocalGroup, DifferentCallsAreToldSoonThoughARankIsAway) {
  constexpr std::int32_t n = 3;
  SimCluster cluster(oneHost(n));
  std::atomic<int> told{0};
  onEveryRank(cluster, n, [&](Rank r, Group& group) {
    std::vector<float> data(8, 1);
    ASSERT_TRUE(sumOf(group, data, false).ok());
    if (r == 2) {
      while (told < 2) std::this_thread::sleep_for(1ms);
    }
    data.assign(r == 1 ? 4 : 8, 1);
    const Status status = sumOf(group, data, true);
    EXPECT_EQ(status.code(), Code::kMismatch) << status.message();
    ++told;
  });
}

TEST(LocalGroup, ALateRankIsNamedBeforeAndAfterTheyHaveMet) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  for (const bool met : {false, true}) {
    std::atomic<bool> late{false};
    onEveryRank(cluster, n, [&](Rank r, Group& group) {
      std::vector<float> data(8, 1);
      if (met) {
        ASSERT_TRUE(sumOf(group, data, true).ok());
      }
      if (r == 1) {
        while (!late) std::this_thread::sleep_for(1ms);
      }
      const Status status = sumOf(group, data, met, r == 0 ? 100ms : 20s);
      EXPECT_EQ(status.code(), Code::kTimeout);
      EXPECT_NE(status.message().find("waiting for rank 1 ("), std::string::npos)
          << status.message();
      late = true;
      ASSERT_TRUE(sumOf(group, data, true).ok());
    });
  }
}

TEST(LocalGroup, CallsAreGivenUpInAnyOrderAndTheNextWorks) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  std::atomic<bool> given_up{false};
  onEveryRank(cluster, n, [&](Rank r, Group& group) {
    std::vector<float> data(8, 1);
    const Status first = sumOf(group, data, true);
    ASSERT_TRUE(first.ok()) << first.message();
    if (r == 0) {  // the second first, which waits behind the other
      std::shared_ptr<Canceller> cancellers[2];
      std::future<Status> ends[2];
      for (int i = 0; i < 2; ++i) {
        CallOptions options;
        options.canceller = cancellers[i] = std::make_shared<Canceller>();
        auto ended = std::make_shared<std::promise<Status>>();
        ends[i] = ended->get_future();
        group.barrier(options, [ended](const Status& status) { ended->set_value(status); });
      }
      cancellers[1]->cancel(Status(Code::kAborted, "not wanted"));
      EXPECT_EQ(ends[1].get().message(), "not wanted");
      cancellers[0]->cancel(Status(Code::kAborted, "nor this"));
      EXPECT_EQ(ends[0].get().message(), "nor this");
      given_up = true;
    } else {
      while (!given_up) std::this_thread::sleep_for(1ms);
      for (const char* text : {"nor this", "not wanted"}) {
        const Status status = await([&](Done done) { group.barrier(within(20s, true), done); });
        EXPECT_EQ(status.message(), text);
      }
    }
    ASSERT_TRUE(sumOf(group, data, true).ok());
    EXPECT_EQ(data, std::vector<float>(8, 4));
  });
}

TEST(LocalGroup, AbortEndsAllAndTellsTheOthers) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    std::vector<float> data(8, 1);
    ASSERT_TRUE(sumOf(group, data, true).ok());
    if (r == 1) {
      std::vector<float> other(8, 1);
      auto first = std::async(std::launch::async, [&] { return sumOf(group, other, true); });
      std::this_thread::sleep_for(20ms);
      group.abort("enough");
      EXPECT_EQ(first.get().code(), Code::kAborted);
      EXPECT_EQ(sumOf(group, other, true).code(), Code::kAborted);
      return;
    }
    std::this_thread::sleep_for(60ms);
    const Status status = sumOf(group, data, true);
    EXPECT_EQ(status.code(), Code::kAborted);
    EXPECT_EQ(status.message(), "the group was aborted: enough");
  });
}

TEST(LocalGroup, ARankThatLeavesIsNamed) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    std::vector<float> data(8, 1);
    ASSERT_TRUE(sumOf(group, data, true).ok());
    if (r == 1) return group.close();
    const Status status = sumOf(group, data, true);
    EXPECT_EQ(status.code(), Code::kUnavailable);
    EXPECT_NE(status.message().find("rank 1 (worker1:1) left the group"), std::string::npos)
        << status.message();
  });
}

TEST(LocalGroup, ARankThatLeavesBeforeTheyHaveMetIsNamed) {
  constexpr std::int32_t n = 3;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    if (r == 2) return group.close();
    for (const bool blocking : {false, true}) {
      std::vector<float> data(8, 1);
      const auto begun = std::chrono::steady_clock::now();
      const Status status = sumOf(group, data, blocking);
      EXPECT_LT(std::chrono::steady_clock::now() - begun, 2s);
      EXPECT_EQ(status.code(), Code::kUnavailable);
      EXPECT_NE(status.message().find("rank 2 at"), std::string::npos) << status.message();
      EXPECT_NE(status.message().find("has left the group"), std::string::npos);
    }
  });
}

TEST(LocalGroup, SendAndReceiveGoOverTheNetwork) {
  constexpr std::int32_t n = 2;
  SimCluster cluster(oneHost(n));
  onEveryRank(cluster, n, [](Rank r, Group& group) {
    int word = r == 0 ? 7 : 0;
    ASSERT_TRUE(await([&](Done done) {
                  if (r == 0) {
                    group.send(&word, 1, DataType::kInt32, 1, 3, within(20s, true), done);
                  } else {
                    group.recv(&word, 1, DataType::kInt32, 0, 3, within(20s, true), done);
                  }
                }).ok());
    EXPECT_EQ(word, 7);
  });
}

}  // namespace
}  // namespace reducer::collective
