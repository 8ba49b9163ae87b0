// Receives from any rank, and the second step of a collective, on the simulated network.
#include "collective/receives.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CallOptions;
using std::chrono::seconds;

CallOptions within(std::chrono::milliseconds timeout) {
  CallOptions options;
  options.timeout = timeout;
  return options;
}

ClusterOptions clusterOf(std::int32_t workers, std::uint64_t seed) {
  ClusterOptions options;
  options.workers = workers;
  options.settings.algorithm = Algorithm::kDirect;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.seed = seed;
  options.sim.piece_bytes_max = 1500;
  return options;
}

struct Receipt {
  Outcome outcome;
  Rank from = -1;
  std::vector<std::int32_t> data;
  collective::Received callback() {
    return [this, done = outcome.callback()](const Status& status, Rank rank) {
      from = rank;
      done(status);
    };
  }
};

bool allDone(const std::vector<Receipt>& receipts) {
  return std::all_of(receipts.begin(), receipts.end(),
                     [](const Receipt& receipt) { return receipt.outcome.done; });
}

TEST(Receives, EverySendIsReceivedOnceInItsSendersOrderOnEverySeed) {
  constexpr std::uint32_t kTag = 7;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto workers = static_cast<std::int32_t>(2 + random() % 4);
    const std::size_t each = 1 + random() % 4;
    const std::size_t counts[] = {0, 3, 5000};
    const std::size_t count = counts[random() % 3];
    SimCluster cluster(clusterOf(workers, seed));
    const std::size_t total = each * (workers - 1);
    std::vector<Outcome> sent(total);
    std::vector<std::vector<std::int32_t>> messages;
    for (std::size_t i = 0; i < total; ++i) {
      messages.emplace_back(count + 1, static_cast<std::int32_t>(i));
    }
    std::vector<Receipt> receipts(total);
    for (Receipt& receipt : receipts) receipt.data.assign(count + 1, -1);
    // Sends and receives start in any order, and time passes between them.
    std::vector<int> turns(2 * total);
    for (std::size_t i = 0; i < turns.size(); ++i) turns[i] = i < total ? 0 : 1;
    std::shuffle(turns.begin(), turns.end(), random);
    std::size_t next_send = 0;
    std::size_t next_receive = 0;
    for (const int turn : turns) {
      if (turn == 0) {
        const std::size_t i = next_send++;
        const auto from = static_cast<Rank>(1 + i % (workers - 1));
        cluster.group(from).send(messages[i].data(), count + 1, DataType::kInt32, 0, kTag,
                                 within(seconds(10)), sent[i].callback());
      } else {
        Receipt& receipt = receipts[next_receive++];
        cluster.group(0).recvAny(receipt.data.data(), count + 1, DataType::kInt32, kTag,
                                 within(seconds(10)), receipt.callback());
      }
      if (random() % 2) {
        cluster.network().runUntil([] { return false; }, std::chrono::milliseconds(random() % 20));
      }
    }
    ASSERT_TRUE(cluster.network().runUntil([&] { return allDone(receipts); }, seconds(30)));
    ASSERT_TRUE(cluster.finish(sent));
    std::vector<std::int32_t> last(workers, -1);
    std::set<std::int32_t> seen;
    for (const Receipt& receipt : receipts) {
      ASSERT_TRUE(receipt.outcome.status.ok()) << receipt.outcome.status.message();
      ASSERT_GE(receipt.from, 1);
      const std::int32_t message = receipt.data[0];
      EXPECT_EQ(receipt.data, messages.at(message));
      EXPECT_EQ(receipt.from, 1 + message % (workers - 1));
      EXPECT_GT(message, last[receipt.from]) << "a sender's messages changed places";
      last[receipt.from] = message;
      EXPECT_TRUE(seen.insert(message).second) << "received twice";
    }
    EXPECT_EQ(seen.size(), total);
    cluster.expectNothingHeld();
  }
}

TEST(Receives, AReceiveFromOneRankStandsBehindOneFromAnyRankThatCameBeforeIt) {
  SimCluster cluster(clusterOf(2, 1));
  std::vector<Receipt> receipts(2);
  for (Receipt& receipt : receipts) receipt.data.assign(1, -1);
  cluster.group(0).recvAny(receipts[0].data.data(), 1, DataType::kInt32, 3, within(seconds(10)),
                           receipts[0].callback());
  cluster.group(0).recv(receipts[1].data.data(), 1, DataType::kInt32, 1, 3, within(seconds(10)),
                        receipts[1].outcome.callback());
  const std::int32_t messages[] = {10, 11};
  std::vector<Outcome> sent(2);
  for (int i = 0; i < 2; ++i) {
    cluster.group(1).send(&messages[i], 1, DataType::kInt32, 0, 3, within(seconds(10)),
                          sent[i].callback());
  }
  ASSERT_TRUE(cluster.network().runUntil([&] { return allDone(receipts); }, seconds(30)));
  ASSERT_TRUE(cluster.finish(sent));
  EXPECT_EQ(receipts[0].data[0], 10);
  EXPECT_EQ(receipts[1].data[0], 11);
}

TEST(Receives, WhatNobodySendsTimesOutAndSaysSo) {
  SimCluster cluster(clusterOf(3, 2));
  std::vector<Receipt> receipts(1);
  receipts[0].data.assign(1, -1);
  cluster.group(0).recvAny(receipts[0].data.data(), 1, DataType::kInt32, 9, within(seconds(2)),
                           receipts[0].callback());
  ASSERT_TRUE(cluster.network().runUntil([&] { return allDone(receipts); }, seconds(5)));
  const Status& status = receipts[0].outcome.status;
  EXPECT_EQ(status.code(), Code::kTimeout);
  EXPECT_NE(status.message().find("from any rank, tag 9"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("timeout after 2.0 s"), std::string::npos) << status.message();
  // The group goes on.
  const std::int32_t message = 5;
  std::vector<Outcome> sent(1);
  std::vector<Receipt> more(1);
  more[0].data.assign(1, -1);
  cluster.group(2).send(&message, 1, DataType::kInt32, 0, 9, within(seconds(10)),
                        sent[0].callback());
  cluster.group(0).recvAny(more[0].data.data(), 1, DataType::kInt32, 9, within(seconds(10)),
                           more[0].callback());
  ASSERT_TRUE(cluster.network().runUntil([&] { return allDone(more); }, seconds(5)));
  ASSERT_TRUE(cluster.finish(sent));
  EXPECT_EQ(more[0].from, 2);
  EXPECT_EQ(more[0].data[0], 5);
}

std::size_t countOf(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

// Nobody is known to be missing, so its own rank says so.
TEST(Receives, OneFromAnyRankWarnsOnceAfterAThirdOfItsTimeout) {
  for (const bool warns : {true, false}) {
    ClusterOptions options = clusterOf(3, 2);
    options.settings.warns = warns;
    SimCluster cluster(options);
    std::vector<Receipt> receipts(2);
    for (Receipt& receipt : receipts) receipt.data.assign(1, -1);
    const auto pass = [&](std::chrono::milliseconds time) {
      cluster.network().runUntil([] { return false; }, time);
    };
    ::testing::internal::CaptureStderr();
    cluster.group(1).recvAny(receipts[0].data.data(), 1, DataType::kInt32, 9, within(seconds(30)),
                             receipts[0].callback());
    // (This one is answered in time.)
    cluster.group(1).recvAny(receipts[1].data.data(), 1, DataType::kInt32, 8, within(seconds(30)),
                             receipts[1].callback());
    const std::int32_t message = 5;
    std::vector<Outcome> sent(2);
    cluster.group(2).send(&message, 1, DataType::kInt32, 1, 8, within(seconds(10)),
                          sent[0].callback());
    pass(std::chrono::milliseconds(9'900));
    const std::string before = ::testing::internal::GetCapturedStderr();
    EXPECT_EQ(countOf(before, "warning"), 0U) << before;
    EXPECT_TRUE(receipts[1].outcome.done);
    ::testing::internal::CaptureStderr();
    pass(seconds(15));
    const std::string after = ::testing::internal::GetCapturedStderr();
    EXPECT_EQ(countOf(after, "reducer: warning: "), warns ? 1U : 0U) << after;
    EXPECT_EQ(countOf(after,
                      "send/recv(int32, 1 element) from any rank, tag 9, in group 'default': "
                      "nothing has been sent for 10.0 s (after 30.0 s it fails); here is rank 1 "
                      "(worker1:1)"),
              warns ? 1U : 0U)
        << after;
    EXPECT_FALSE(receipts[0].outcome.done);
    cluster.group(0).send(&message, 1, DataType::kInt32, 1, 9, within(seconds(10)),
                          sent[1].callback());
    EXPECT_TRUE(cluster.network().runUntil([&] { return allDone(receipts); }, seconds(2)));
    EXPECT_TRUE(cluster.finish(sent));
    EXPECT_EQ(receipts[0].from, 0);
  }
}

TEST(Receives, AbortEndsThem) {
  SimCluster cluster(clusterOf(2, 3));
  std::vector<Receipt> receipts(1);
  receipts[0].data.assign(1, -1);
  cluster.group(0).recvAny(receipts[0].data.data(), 1, DataType::kInt32, 9, within(seconds(60)),
                           receipts[0].callback());
  cluster.group(0).abort("the test said so");
  EXPECT_TRUE(receipts[0].outcome.done);
  EXPECT_EQ(receipts[0].outcome.status.code(), Code::kAborted);
}

TEST(SecondStep, StartsAtAnyTimeOnEachRankOnEverySeed) {
  // Two collectives whose second steps start in another order on each rank, an all-reduce behind.
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto workers = static_cast<std::int32_t>(2 + random() % 4);
    SimCluster cluster(clusterOf(workers, seed));
    std::vector<std::size_t> counts;
    for (Rank r = 0; r < workers; ++r) counts.push_back(random() % 3 == 0 ? 0 : random() % 9000);
    struct Side {
      std::vector<std::uint8_t> in;
      std::vector<std::vector<std::uint8_t>> outs[2];
    };
    std::vector<Side> sides(workers);
    std::vector<Outcome> outcomes(3 * workers);
    std::vector<std::vector<float>> sums(workers, std::vector<float>(1000, 1.0f));
    for (Rank r = 0; r < workers; ++r) {
      Side& side = sides[r];
      side.in.resize(counts[r]);
      std::iota(side.in.begin(), side.in.end(), static_cast<std::uint8_t>(r));
      std::vector<int> order = {0, 1, 2};
      std::shuffle(order.begin(), order.end(), random);
      for (const int what : order) {
        if (what == 2) {
          cluster.group(r).allReduce(sums[r].data(), sums[r].data(), 1000, DataType::kFloat32,
                                     ReduceOp::kSum, within(seconds(10)),
                                     outcomes[3 * r + 2].callback());
          continue;
        }
        std::vector<void*> outs;
        for (Rank other = 0; other < workers; ++other) {
          side.outs[what].emplace_back(counts[other]);
          outs.push_back(side.outs[what].back().data());
        }
        CallOptions options = within(seconds(10));
        options.shown_as = Collective::kSparseAllReduce;
        options.second_step = what;
        cluster.group(r).allGather(side.in.data(), outs, counts, DataType::kUInt8, options,
                                   outcomes[3 * r + what].callback());
      }
    }
    ASSERT_TRUE(cluster.finish(outcomes));
    for (const Outcome& outcome : outcomes) {
      ASSERT_TRUE(outcome.status.ok()) << outcome.status.message();
    }
    for (Rank r = 0; r < workers; ++r) {
      for (const auto& outs : sides[r].outs) {
        for (Rank other = 0; other < workers; ++other) {
          ASSERT_EQ(outs[other], sides[other].in);
        }
      }
      EXPECT_EQ(sums[r][999], static_cast<float>(workers));
    }
    cluster.expectNothingHeld();
  }
}

}  // namespace
}  // namespace reducer::testing
