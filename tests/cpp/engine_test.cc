#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "common/limits.h"
#include "wire/lane.h"

namespace reducer::engine {
namespace {

struct Worker : Peer {
  explicit Worker(Rank r) : rank(r) {}
  Rank rank;
};

// An engine with n workers of one group; keeps what each of them got.
class EngineTest : public testing::Test {
 protected:
  void makeGroup(Rank n) {
    for (Rank r = 0; r < n; ++r) {
      workers_.push_back(std::make_shared<Worker>(r));
      wire::Hello hello;
      hello.job = "0123456789abcdef";
      hello.group = "default";
      hello.rank = r;
      hello.world_size = n;
      hello.host = "host" + std::to_string(r) + ":" + std::to_string(100 + r);
      Actions none;
      engine_.join(workers_.back(), hello, account_, none);
    }
    got_.resize(n);
  }

  static Payload floats(const std::vector<float>& values) {
    auto copy = std::make_shared<std::vector<float>>(values);
    return Payload(
        Bytes(reinterpret_cast<const std::byte*>(copy->data()), copy->size() * sizeof(float)),
        copy);
  }

  static std::vector<float> toFloats(const Payload& payload) {
    std::vector<float> values(payload.nbytes() / sizeof(float));
    payload.copyTo(reinterpret_cast<std::byte*>(values.data()));
    return values;
  }

  static wire::Frame push(std::uint64_t seq, std::uint64_t count, std::uint32_t chunk = 0) {
    wire::Frame frame;
    frame.slot.seq = seq;
    frame.slot.chunk = chunk;
    frame.call.collective = Collective::kAllReduce;
    frame.call.op = ReduceOp::kSum;
    frame.call.dtype = DataType::kFloat32;
    frame.call.count = count;
    frame.length = count * sizeof(float);
    frame.timeout_ms = 5000;
    return frame;
  }

  Status give(Rank rank, const wire::Frame& frame, Payload payload = {}) {
    Actions actions;
    Status status = engine_.onPush(workers_[rank], frame, std::move(payload), now_, actions);
    collect(std::move(actions));
    return status;
  }

  void collect(Actions actions) {
    for (Ready& ready : actions.ready) {
      for (Outgoing& out : settle(std::move(ready), *pool_))
        actions.sends.push_back(std::move(out));
    }
    for (Outgoing& out : actions.sends)
      got_[static_cast<Worker&>(*out.to).rank].push_back(std::move(out));
  }

  void advance(Duration duration) {
    now_ += duration;
    Actions actions;
    engine_.tick(now_, actions);
    collect(std::move(actions));
  }

  void TearDown() override {
    for (const auto& worker : workers_) {
      Actions actions;
      engine_.leave(worker, {}, actions);
    }
    got_.clear();
    EXPECT_EQ(limit_->held(), 0u) << "something stays on the account of a group that is gone";
  }

  void expectEmpty() { EXPECT_EQ(engine_.counters().slots_open, 0u); }

  const std::string& errorOf(Rank rank) {
    static const std::string kNone = "(no error)";
    if (got_[rank].empty() || got_[rank].back().frame.kind != wire::FrameKind::kError) return kNone;
    return got_[rank].back().frame.text;
  }

  const std::shared_ptr<MemoryLimit> limit_ = std::make_shared<MemoryLimit>(std::uint64_t{1} << 30);
  const std::shared_ptr<MemoryAccount> account_ = MemoryAccount::open(limit_, 1 << 20);
  Engine engine_;
  std::shared_ptr<BufferPool> pool_ = BufferPool::create();
  std::vector<std::shared_ptr<Worker>> workers_;
  std::vector<std::vector<Outgoing>> got_;
  TimePoint now_{};
};

TEST_F(EngineTest, SumsInRankOrderWhateverTheOrderOfArrival) {
  makeGroup(4);
  // ((1e8 + 1) - 1e8) + 1 differs from every other order.
  const float inputs[] = {1e8f, 1.0f, -1e8f, 1.0f};
  const float expected = ((inputs[0] + inputs[1]) + inputs[2]) + inputs[3];
  std::vector<Rank> order{0, 1, 2, 3};
  std::uint64_t seq = 0;
  do {
    for (const Rank rank : order) {
      ASSERT_TRUE(give(rank, push(seq, 1), floats({inputs[rank]})).ok());
    }
    for (Rank rank = 0; rank < 4; ++rank) {
      ASSERT_EQ(got_[rank].size(), seq + 1);
      ASSERT_EQ(toFloats(got_[rank].back().payload), std::vector<float>{expected});
    }
    ++seq;
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(seq, 24u);
  EXPECT_EQ(engine_.counters().slots_done, 24u);
  expectEmpty();
}

TEST_F(EngineTest, ZeroElementsAreAnOperationToo) {
  makeGroup(2);
  ASSERT_TRUE(give(0, push(0, 0)).ok());
  EXPECT_TRUE(got_[0].empty());
  ASSERT_TRUE(give(1, push(0, 0)).ok());
  EXPECT_EQ(got_[0].size(), 1u);
  EXPECT_EQ(got_[1].size(), 1u);
  expectEmpty();
}

TEST_F(EngineTest, ReduceGivesItsResultToTheRootOnly) {
  makeGroup(3);
  wire::Frame frame = push(0, 2);
  frame.call.collective = Collective::kReduce;
  frame.call.root = 1;
  frame.puller = 1;
  for (Rank rank = 0; rank < 3; ++rank) ASSERT_TRUE(give(rank, frame, floats({1, 2})).ok());
  EXPECT_EQ(got_[0][0].payload.nbytes(), 0u);
  EXPECT_EQ(toFloats(got_[1][0].payload), (std::vector<float>{3, 6}));
  EXPECT_EQ(got_[2][0].payload.nbytes(), 0u);
}

TEST_F(EngineTest, BroadcastIsAnsweredWhenAllAreThereItsOwnWorkerLast) {
  makeGroup(3);
  workers_[0]->in_process = true;
  wire::Frame frame = push(0, 1);
  frame.call.collective = Collective::kBroadcast;
  frame.call.op = ReduceOp::kNone;
  frame.call.root = 0;
  frame.pusher = 0;
  ASSERT_TRUE(give(0, frame, floats({7})).ok());
  ASSERT_TRUE(give(2, frame).ok());
  EXPECT_TRUE(got_[2].empty()) << "rank 1 may still show another call";
  Actions actions;
  ASSERT_TRUE(engine_.onPush(workers_[1], frame, {}, now_, actions).ok());
  ASSERT_EQ(actions.sends.size(), 3u);
  EXPECT_EQ(actions.sends[2].to, workers_[0]) << "it may end once it has its answer";
  collect(std::move(actions));
  EXPECT_EQ(toFloats(got_[1][0].payload), std::vector<float>{7});
  EXPECT_EQ(toFloats(got_[2][0].payload), std::vector<float>{7});
  EXPECT_EQ(got_[0][0].payload.nbytes(), 0u);
  expectEmpty();
}

TEST_F(EngineTest, BroadcastsWithDifferentRootsFailOnEveryRank) {
  makeGroup(3);
  wire::Frame frame = push(0, 1);
  frame.call.collective = Collective::kBroadcast;
  frame.call.op = ReduceOp::kNone;
  frame.call.root = 0;
  frame.pusher = 0;
  ASSERT_TRUE(give(0, frame, floats({7})).ok());
  ASSERT_TRUE(give(1, frame).ok());
  frame.call.root = frame.pusher = 1;
  ASSERT_TRUE(give(2, frame).ok());
  for (Rank rank = 0; rank < 3; ++rank) {
    ASSERT_EQ(got_[rank].size(), 1u);
    EXPECT_EQ(got_[rank][0].frame.code, Code::kMismatch);
  }
  expectEmpty();
}

TEST_F(EngineTest, MismatchNamesWhoCalledWhatOnEveryRankAndTheNextCallWorks) {
  makeGroup(3);
  ASSERT_TRUE(give(0, push(0, 2), floats({1, 2})).ok());
  wire::Frame other = push(0, 3);
  ASSERT_TRUE(give(1, other, floats({1, 2, 3})).ok());
  EXPECT_TRUE(got_[0].empty()) << "rank 2 may still show what it called";
  ASSERT_TRUE(give(2, push(0, 2), floats({1, 2})).ok());
  for (Rank rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(got_[rank].back().frame.code, Code::kMismatch);
    EXPECT_EQ(errorOf(rank),
              "ranks made different calls in group 'default', collective #0: rank 0 (host0:100), "
              "rank 2 (host2:102) "
              "called all_reduce(sum, float32, 2 elements); rank 1 (host1:101) called "
              "all_reduce(sum, float32, 3 "
              "elements). All ranks of a group must make the same calls in the same order.");
  }
  for (Rank rank = 0; rank < 3; ++rank) ASSERT_TRUE(give(rank, push(1, 1), floats({1})).ok());
  EXPECT_EQ(toFloats(got_[0].back().payload), std::vector<float>{3});
  expectEmpty();
}

TEST_F(EngineTest, MismatchDoesNotWaitLongForRanksThatDoNotCome) {
  makeGroup(3);
  ASSERT_TRUE(give(0, push(0, 2), floats({1, 2})).ok());
  ASSERT_TRUE(give(1, push(0, 1), floats({1})).ok());
  advance(std::chrono::milliseconds(500));
  EXPECT_EQ(got_[0].back().frame.code, Code::kMismatch);
  const std::string text = errorOf(0);
  EXPECT_EQ(errorOf(1), text);
  ASSERT_TRUE(give(2, push(0, 2), floats({1, 2})).ok());
  EXPECT_EQ(errorOf(2), text) << "a rank that comes late gets the same message";
  expectEmpty();
}

TEST_F(EngineTest, TimeoutNamesTheMissingRanks) {
  makeGroup(3);
  ASSERT_TRUE(give(1, push(4, 2), floats({1, 2})).ok());
  advance(std::chrono::milliseconds(4900));
  EXPECT_EQ(got_[1].back().frame.kind, wire::FrameKind::kLate);
  advance(std::chrono::milliseconds(200));
  EXPECT_EQ(got_[1].back().frame.code, Code::kTimeout);
  EXPECT_EQ(errorOf(1),
            "group 'default', collective #4, all_reduce(sum, float32, 2 elements): timeout after "
            "5.1 s, waiting for rank 0 "
            "(host0:100), rank 2 (host2:102); here is rank 1 (host1:101)");
  expectEmpty();
}

TEST_F(EngineTest, WhoIsHereIsToldOnceOfThoseWhoAreLate) {
  makeGroup(4);
  ASSERT_TRUE(give(3, push(4, 2), floats({1, 2})).ok());
  ASSERT_TRUE(give(3, push(4, 2, /*chunk=*/1), floats({1, 2})).ok());
  advance(std::chrono::milliseconds(1000));
  ASSERT_TRUE(give(1, push(4, 2), floats({1, 2})).ok());
  advance(std::chrono::milliseconds(600));
  EXPECT_TRUE(got_[3].empty());
  advance(std::chrono::milliseconds(100));
  advance(std::chrono::milliseconds(1000));
  for (const Rank rank : {1, 3}) {
    ASSERT_EQ(got_[rank].size(), 1u) << "one slot speaks, once";
    const wire::Frame& news = got_[rank].back().frame;
    EXPECT_EQ(news.kind, wire::FrameKind::kLate);
    EXPECT_EQ(news.slot, push(4, 2).slot);
    EXPECT_EQ(news.pusher, 1) << "the lowest rank that is here says it aloud";
    EXPECT_EQ(news.text,
              "group 'default', collective #4, all_reduce(sum, float32, 2 elements): rank 0 "
              "(host0:100), rank 2 (host2:102) have not arrived for 1.7 s (timeout 5 s)");
  }
  for (const Rank rank : {0, 2}) {
    for (const std::uint32_t chunk : {0u, 1u}) {
      ASSERT_TRUE(give(rank, push(4, 2, chunk), floats({1, 2})).ok());
    }
  }
  ASSERT_TRUE(give(1, push(4, 2, 1), floats({1, 2})).ok());
  EXPECT_EQ(got_[1].back().frame.kind, wire::FrameKind::kResult);
  expectEmpty();
}

TEST_F(EngineTest, ALostRankFailsWhatWaitsForItAndWhatComesLater) {
  makeGroup(2);
  ASSERT_TRUE(give(0, push(0, 1), floats({1})).ok());
  Actions actions;
  engine_.leave(workers_[1], Status(Code::kUnavailable, "connection reset"), actions);
  collect(std::move(actions));
  EXPECT_EQ(
      errorOf(0),
      "group 'default', collective #0, all_reduce(sum, float32, 1 element): rank 1 (host1:101) was "
      "lost (connection reset) before it joined in");
  EXPECT_EQ(got_[0].back().frame.pusher, 1);
  ASSERT_TRUE(give(0, push(1, 1), floats({1})).ok());
  EXPECT_EQ(got_[0].size(), 2u);
  EXPECT_EQ(got_[0].back().frame.pusher, 1);
  EXPECT_EQ(got_[0].back().frame.code, Code::kUnavailable);
  expectEmpty();
}

TEST_F(EngineTest, TheLastCollectiveOfARankIsKnownEvenWhenItIsLost) {
  makeGroup(2);
  const std::string job = "0123456789abcdef";
  EXPECT_EQ(engine_.joined(job, 1).next, 0u);
  EXPECT_EQ(describeJoined(engine_.joined(job, 1)), "; no collective is known that it joined");
  wire::Frame second = push(8, 3);
  second.slot.lane = wire::partLane(1);  // a part of a gather is a part of the collective
  second.puller = 0;
  second.pusher = 1;
  ASSERT_TRUE(give(1, push(7, 2), floats({1, 2})).ok());
  ASSERT_TRUE(give(1, second, floats({1, 2, 3})).ok());
  wire::Frame sent = push(30, 2);
  sent.slot.lane = wire::pairLane(1, 0, 0);
  sent.pusher = 1;
  sent.puller = 0;
  ASSERT_TRUE(give(1, sent, floats({1, 2})).ok());
  Actions actions;
  engine_.leave(workers_[1], Status(Code::kUnavailable, "connection reset"), actions);
  EXPECT_EQ(describeJoined(engine_.joined(job, 1)),
            "; the last collective it joined was #8, all_reduce(sum, float32, 3 elements)");
  EXPECT_EQ(engine_.joined(job, 0).next, 0u);
  EXPECT_EQ(engine_.joined(job, 2).next, 0u);
  EXPECT_EQ(engine_.joined("another job", 1).next, 0u);
}

TEST_F(EngineTest, ARankThatLeftAfterItsPartHarmsNobody) {
  makeGroup(3);
  ASSERT_TRUE(give(1, push(0, 1), floats({1})).ok());
  Actions actions;
  engine_.leave(workers_[1], Status(), actions);
  collect(std::move(actions));
  ASSERT_TRUE(give(0, push(0, 1), floats({1})).ok());
  ASSERT_TRUE(give(2, push(0, 1), floats({1})).ok());
  EXPECT_EQ(toFloats(got_[0].back().payload), std::vector<float>{3});
}

TEST_F(EngineTest, CancelTellsTheOthersAndIsForgottenWhenAllCancelled) {
  makeGroup(2);
  ASSERT_TRUE(give(0, push(0, 1, 3), floats({1})).ok());
  wire::Frame cancel;
  cancel.kind = wire::FrameKind::kCancel;
  cancel.code = Code::kTimeout;
  cancel.text = "gave up";
  for (Rank rank = 0; rank < 2; ++rank) {
    Actions actions;
    ASSERT_TRUE(engine_.onCancel(workers_[1 - rank], cancel, actions).ok());
    collect(std::move(actions));
  }
  EXPECT_EQ(errorOf(0), "gave up");
  EXPECT_TRUE(got_[1].empty());
  expectEmpty();
  // Both have cancelled: the number could be used again (it never is, but nothing is remembered).
  ASSERT_TRUE(give(0, push(0, 1, 3), floats({1})).ok());
  ASSERT_TRUE(give(1, push(0, 1, 3), floats({1})).ok());
  EXPECT_EQ(toFloats(got_[1].back().payload), std::vector<float>{2});
}

TEST_F(EngineTest, ProtocolErrorsAreToldToTheCallerAndHarmNoSlot) {
  makeGroup(2);
  ASSERT_TRUE(give(0, push(0, 2), floats({1, 2})).ok());
  EXPECT_FALSE(give(0, push(0, 2), floats({1, 2})).ok()) << "twice";
  EXPECT_FALSE(give(1, push(0, 2), floats({1})).ok()) << "short payload";
  wire::Frame frame = push(0, 2);
  frame.pusher = 7;
  EXPECT_FALSE(give(1, frame, floats({1, 2})).ok()) << "a pusher outside of the group";
  frame = push(0, 2);
  frame.pusher = 0;
  frame.puller = 0;
  EXPECT_FALSE(give(1, frame).ok()) << "no part in it";
  frame = push(0, 2);
  frame.call.op = ReduceOp::kBitAnd;
  EXPECT_FALSE(give(1, frame, floats({1, 2})).ok()) << "bitwise and on float32";
  frame = push(0, 2);
  frame.length = kMaxChunkBytes * 2;
  EXPECT_FALSE(give(1, frame, floats({1, 2})).ok()) << "beyond the limit";
  ASSERT_TRUE(give(1, push(0, 2), floats({1, 2})).ok());
  EXPECT_EQ(toFloats(got_[0].back().payload), (std::vector<float>{2, 4}));
  expectEmpty();
}

TEST_F(EngineTest, PartsOfACollectiveFailWithIt) {
  makeGroup(2);
  wire::Frame part = push(0, 1, 1);
  part.slot.lane = wire::partLane(0);
  part.call.collective = Collective::kGather;
  part.call.op = ReduceOp::kNone;
  part.pusher = 0;
  part.puller = 1;
  ASSERT_TRUE(give(0, part, floats({1})).ok());
  wire::Frame cancel;
  cancel.kind = wire::FrameKind::kCancel;
  cancel.text = "gave up";
  Actions actions;
  ASSERT_TRUE(engine_.onCancel(workers_[1], cancel, actions).ok());
  collect(std::move(actions));
  EXPECT_EQ(errorOf(0), "gave up");
  expectEmpty();
}

TEST_F(EngineTest, RandomArrivalsOfManySlotsLeaveNothingBehind) {
  constexpr Rank kWorld = 5;
  makeGroup(kWorld);
  std::mt19937 random(7);
  std::vector<std::pair<Rank, std::uint32_t>> events;
  for (std::uint32_t chunk = 0; chunk < 500; ++chunk) {
    for (Rank rank = 0; rank < kWorld; ++rank) events.emplace_back(rank, chunk);
  }
  std::shuffle(events.begin(), events.end(), random);
  for (const auto& [rank, chunk] : events) {
    ASSERT_TRUE(
        give(rank, push(0, 1, chunk), floats({static_cast<float>(chunk * 10 + rank)})).ok());
  }
  for (Rank rank = 0; rank < kWorld; ++rank) {
    ASSERT_EQ(got_[rank].size(), 500u);
    for (const Outgoing& out : got_[rank]) {
      EXPECT_EQ(toFloats(out.payload)[0], static_cast<float>(out.frame.slot.chunk * 50 + 10));
    }
  }
  expectEmpty();
}

}  // namespace
}  // namespace reducer::engine
