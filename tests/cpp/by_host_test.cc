// Sums in the order of a placement: what the engine makes of the parts of all ranks, and of the
// parts of a rail, are the same bits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "engine/engine.h"
#include "frames.h"
#include "kernels/reduce.h"
#include "wire/lane.h"

namespace reducer::engine {
namespace {

using testing::copyOf;
using testing::inPieces;
using Memory = std::vector<std::byte>;

const std::vector<std::vector<std::uint32_t>> kPlacements = {
    {0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 0, 1, 1, 2}, {0, 1, 1, 2, 0, 1, 3}, {0, 0, 0, 1},
};

/// Numbers of the type, of very different sizes, from their conversion out of float64.
Memory anyNumbers(DataType dtype, std::size_t count, std::mt19937_64& random) {
  Memory bytes(count * sizeOf(dtype));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  if (dtype == DataType::kFloat32) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < count; ++i) {
      const float value = normal(random) * std::pow(10.0f, static_cast<float>(random() % 7));
      std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    }
  } else if (dtype == DataType::kBFloat16 || dtype == DataType::kFloat16) {
    for (std::size_t i = 1; i < bytes.size(); i += 2) bytes[i] &= std::byte{0xB7};  // no inf, NaN
  }
  return bytes;
}

/// The definition, by the scalar reference: each host's ranks, rounded; then the hosts.
Memory expected(const Placement& placement, DataType dtype, ReduceOp op,
                const std::vector<Memory>& inputs) {
  const std::size_t count = inputs[0].size() / sizeOf(dtype);
  const ReduceOp part = op != ReduceOp::kAvg       ? op
                        : dtype == DataType::kBool ? ReduceOp::kMin
                                                   : ReduceOp::kSum;
  std::vector<Memory> hosts(placement.hosts(), Memory(inputs[0].size()));
  for (Rank host = 0; host < placement.hosts(); ++host) {
    std::vector<Payload> ranks;
    for (const Rank rank : placement.ranksOf(host)) ranks.push_back(inPieces(inputs[rank], {}));
    kernels::reduceScalar(dtype, part, ranks, hosts[host].data(), count);
  }
  std::vector<Payload> sums;
  for (const Memory& host : hosts) sums.push_back(inPieces(host, {}));
  Memory result(inputs[0].size());
  kernels::reduceScalar(dtype, part, sums, result.data(), count);
  if (op == ReduceOp::kAvg) kernels::divide(dtype, result.data(), count, placement.worldSize());
  return result;
}

TEST(ByHost, EveryTypeAndOperationHasTheBitsOfTheDefinitionWhereverPiecesEnd) {
  std::mt19937_64 random(3);
  for (const auto& hosts : kPlacements) {
    const Placement placement(hosts);
    for (int type = 1; type <= static_cast<int>(kLastDataType); ++type) {
      const auto dtype = static_cast<DataType>(type);
      for (int number = 1; number <= 8; ++number) {
        const auto op = static_cast<ReduceOp>(number);
        if (!supports(op, dtype)) continue;
        for (const std::size_t count : {1U, 777U, 40'001U}) {
          if (count > 1000 && dtype != DataType::kBFloat16 && dtype != DataType::kFloat32) continue;
          std::vector<Memory> inputs;
          std::vector<Payload> payloads;
          for (Rank rank = 0; rank < placement.worldSize(); ++rank) {
            inputs.push_back(anyNumbers(dtype, count, random));
            const std::size_t size = inputs.back().size();
            const std::size_t cut = random() % size;
            payloads.push_back(inPieces(inputs.back(), {cut, cut + random() % (size - cut)}));
          }
          Memory result(inputs[0].size());
          sumByHost(placement, dtype, op, payloads, result.data());
          ASSERT_EQ(result, expected(placement, dtype, op, inputs))
              << nameOf(dtype) << " " << nameOf(op) << " " << count << " on hosts "
              << describeHosts(hosts);
        }
      }
    }
  }
}

TEST(ByHost, TheOrderIsAnotherThanTheRanks) {
  // ((1e8 + 1) + (-1e8 + 1)) by host is not (((1e8 + 1) - 1e8) + 1) by rank.
  const float inputs[] = {1e8f, -1e8f, 1.0f, 1.0f};
  std::vector<Payload> payloads;
  for (const float& input : inputs) {
    payloads.emplace_back(std::as_bytes(std::span(&input, 1)), nullptr);
  }
  float result = 0;
  auto* const out = reinterpret_cast<std::byte*>(&result);
  sumByHost(Placement({0, 1, 0, 1}), DataType::kFloat32, ReduceOp::kSum, payloads, out);
  EXPECT_EQ(result, (1e8f + 1.0f) + (-1e8f + 1.0f));
  sumByHost(Placement({0, 0, 1, 1}), DataType::kFloat32, ReduceOp::kSum, payloads, out);
  EXPECT_EQ(result, 2.0f);
}

struct Worker : Peer {
  explicit Worker(Rank r) : rank(r) {}
  Rank rank;
};

class RailTest : public ::testing::Test {
 protected:
  void makeGroup(const std::vector<std::uint32_t>& hosts) {
    for (Rank rank = 0; rank < static_cast<Rank>(hosts.size()); ++rank) {
      workers_.push_back(std::make_shared<Worker>(rank));
      wire::Hello hello;
      hello.job = "0123456789abcdef";
      hello.group = "default";
      hello.rank = rank;
      hello.world_size = static_cast<std::int32_t>(hosts.size());
      hello.host = "host" + std::to_string(rank);
      hello.hosts = hosts;
      Actions none;
      engine_.join(workers_.back(), hello, nullptr, none);
    }
    got_.resize(hosts.size());
  }

  static wire::Frame push(Rank pushers, ReduceOp op, std::size_t count) {
    wire::Frame frame;
    frame.slot.lane = isRail(pushers) ? wire::partLane(shareOf(pushers)) : wire::kCollectiveLane;
    frame.call = {Collective::kAllReduce, op, DataType::kFloat32, 0, kAllRanks, count};
    frame.pusher = frame.puller = pushers;
    frame.length = count * sizeof(float);
    frame.timeout_ms = 5000;
    return frame;
  }

  Status give(Rank rank, const wire::Frame& frame, Payload payload) {
    Actions actions;
    Status status = engine_.onPush(workers_[rank], frame, std::move(payload), now_, actions);
    collect(std::move(actions));
    return status;
  }

  void collect(Actions actions) {
    for (Ready& ready : actions.ready) {
      for (Outgoing& out : settle(std::move(ready), *pool_)) {
        actions.sends.push_back(std::move(out));
      }
    }
    for (Outgoing& out : actions.sends) {
      got_[static_cast<Worker&>(*out.to).rank].push_back(std::move(out));
    }
  }

  Engine engine_;
  std::shared_ptr<BufferPool> pool_ = BufferPool::create();
  std::vector<std::shared_ptr<Worker>> workers_;
  std::vector<std::vector<Outgoing>> got_;
  TimePoint now_{};
};

TEST_F(RailTest, ItsCarriersAreAllThatIsWaitedForAndOnlyTheyAreAnswered) {
  makeGroup({0, 1, 0, 2, 1, 0});  // hosts {0 2 5} {1 4} {3}: share 1 is carried by 2, 4 and 3
  const float sums[] = {3, 5, 7};
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kAvg}) {
    for (auto& got : got_) got.clear();
    wire::Frame frame = push(rail(1), op, 1);
    frame.slot.seq = static_cast<std::uint64_t>(op);
    int i = 0;
    for (const Rank rank : {3, 2, 4}) {
      ASSERT_TRUE(got_[3].empty());
      const Payload payload(std::as_bytes(std::span(&sums[i++], 1)), nullptr);
      ASSERT_TRUE(give(rank, frame, payload).ok());
    }
    for (Rank rank = 0; rank < 6; ++rank) {
      const bool carrier = rank == 2 || rank == 3 || rank == 4;
      ASSERT_EQ(got_[rank].size(), carrier ? 1U : 0U) << rank;
      if (!carrier) continue;
      float value = 0;
      got_[rank][0].payload.copyTo(reinterpret_cast<std::byte*>(&value));
      EXPECT_EQ(value, op == ReduceOp::kSum ? 15.0f : 15.0f / 6) << "AVG divides by all ranks";
    }
  }
  EXPECT_EQ(engine_.counters().slots_open, 0U);
}

TEST_F(RailTest, TheHostsComeInTheirOrderWhateverTheOrderOfArrival) {
  makeGroup({0, 0, 1, 1, 2, 2});
  const float sums[] = {1e8f, 1.0f, -1e8f};
  const float wanted = (sums[0] + sums[1]) + sums[2];
  std::vector<Rank> hosts{0, 1, 2};
  std::uint64_t seq = 0;
  do {
    for (const Rank host : hosts) {
      wire::Frame frame = push(rail(1), ReduceOp::kSum, 1);
      frame.slot.seq = seq;
      const Payload payload(std::as_bytes(std::span(&sums[host], 1)), nullptr);
      ASSERT_TRUE(give(2 * host + 1, frame, payload).ok());
    }
    for (const Rank rank : {1, 3, 5}) {
      float value = 0;
      got_[rank].back().payload.copyTo(reinterpret_cast<std::byte*>(&value));
      ASSERT_EQ(value, wanted);
    }
    ++seq;
  } while (std::next_permutation(hosts.begin(), hosts.end()));
}

TEST_F(RailTest, OneRankMayPushToARailAndARailToOneRank) {
  makeGroup({0, 0, 1, 1});
  const float value = 7;
  const Payload payload(std::as_bytes(std::span(&value, 1)), nullptr);
  wire::Frame broadcast = push(rail(1), ReduceOp::kNone, 1);
  broadcast.pusher = 1;
  ASSERT_TRUE(give(3, broadcast, {}).ok());
  ASSERT_TRUE(give(1, broadcast, payload).ok());
  EXPECT_EQ(copyOf(got_[3].back().payload), copyOf(payload));
  EXPECT_EQ(got_[1].back().payload.nbytes(), 0U);
  wire::Frame reduce = push(rail(0), ReduceOp::kSum, 1);
  reduce.slot.seq = 1;
  reduce.puller = 2;
  ASSERT_TRUE(give(0, reduce, payload).ok());
  ASSERT_TRUE(give(2, reduce, payload).ok());
  EXPECT_EQ(got_[0].back().payload.nbytes(), 0U);
  EXPECT_EQ(got_[2].back().payload.nbytes(), 4U);
}

TEST_F(RailTest, WhoIsNoCarrierAndWhatIsNoShareAreRefused) {
  makeGroup({0, 0, 1, 1});
  const float value = 1;
  const Payload payload(std::as_bytes(std::span(&value, 1)), nullptr);
  EXPECT_FALSE(give(0, push(rail(1), ReduceOp::kSum, 1), payload).ok());
  EXPECT_FALSE(give(0, push(rail(2), ReduceOp::kSum, 1), payload).ok());
  EXPECT_FALSE(give(0, push(rail(4000), ReduceOp::kSum, 1), payload).ok());
  EXPECT_EQ(engine_.counters().slots_open, 0U);
}

TEST_F(RailTest, CarriersThatDisagreeWaitForTheSlotWhereAllRanksShowTheirCalls) {
  makeGroup({0, 0, 1, 1});
  const float values[] = {1, 2};
  const Payload one(std::as_bytes(std::span(values, 1)), nullptr);
  const Payload two(std::as_bytes(std::span(values, 2)), nullptr);
  ASSERT_TRUE(give(0, push(rail(0), ReduceOp::kSum, 1), one).ok());
  ASSERT_TRUE(give(2, push(rail(0), ReduceOp::kSum, 2), two).ok());
  EXPECT_TRUE(got_[0].empty());
  wire::Frame shown = push(kAllRanks, ReduceOp::kSum, 0);
  for (Rank rank = 0; rank < 4; ++rank) {
    shown.call.count = rank < 2 ? 1 : 2;
    ASSERT_TRUE(give(rank, shown, {}).ok());
  }
  for (Rank rank = 0; rank < 4; ++rank) {
    ASSERT_FALSE(got_[rank].empty());
    EXPECT_EQ(got_[rank].back().frame.code, Code::kMismatch);
    EXPECT_NE(got_[rank].front().frame.text.find("rank 2 (host2), rank 3 (host3) called"),
              std::string::npos)
        << "the first that a rank hears says why";
  }
  EXPECT_EQ(got_[0].size(), 2U) << "its part of the rail has failed with the call";
  EXPECT_EQ(engine_.counters().slots_open, 0U);
}

}  // namespace
}  // namespace reducer::engine
