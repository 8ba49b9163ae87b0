// A reducer with little memory, a worker that wants all of it, and a job that goes on beside it.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/limits.h"
#include "conformance.h"
#include "server/server.h"
#include "transport/sim/sim.h"
#include "wire/frame.h"

namespace reducer::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using wire::Frame;
using wire::FrameKind;

constexpr std::size_t kLimit = std::size_t{24} << 20;
constexpr std::size_t kWindowBytes = 1 << 20;
// What is counted as it is made, in place of something that is about to go.
constexpr std::size_t kUnderWay = 256 << 10;
constexpr int kFramesMax = 70'000;

class ServerMemoryTest : public ::testing::Test {
 protected:
  ServerMemoryTest() {
    server::ServerOptions options;
    options.host = "server:1";
    options.standalone = true;
    options.memory_limit_bytes = kLimit;
    options.shards = 4;
    options.counts_unread = true;
    server_ = std::make_unique<server::ReducerServer>(*server_host_, options);
    EXPECT_TRUE(server_->listen("server:7000").ok());
    for (Rank rank = 0; rank < 2; ++rank) honest_.push_back(join('h', rank, 2));
  }

  ~ServerMemoryTest() override {
    for (const auto& client : clients_) client->drop();
    pass(seconds(1));
    const server::ServerStats stats = server_->stats();
    EXPECT_EQ(stats.held_bytes, 0U);
    EXPECT_EQ(stats.taken_bytes, 0U);
  }

  std::shared_ptr<Recorder> join(char job, Rank rank, std::int32_t world_size) {
    auto client = std::make_shared<Recorder>();
    client->hold(client_host_->connect("server:7000", client, seconds(5)));
    clients_.push_back(client);
    Frame frame;
    frame.kind = FrameKind::kHello;
    frame.hello.version = kProtocolVersion;
    frame.hello.job = std::string(kJobBytes, job);
    frame.hello.group = "default";
    frame.hello.rank = rank;
    frame.hello.world_size = world_size;
    frame.hello.host = "client:" + std::to_string(rank);
    frame.hello.window_bytes = kWindowBytes;
    client->connection()->send(frame, {});
    pass(milliseconds(10));
    return client;
  }

  static Frame pushOf(std::uint64_t seq, std::size_t nbytes) {
    Frame frame;
    frame.kind = FrameKind::kPush;
    frame.slot.seq = seq;
    frame.call.collective = Collective::kAllReduce;
    frame.call.op = ReduceOp::kSum;
    frame.call.dtype = DataType::kUInt8;
    frame.call.count = nbytes;
    frame.length = nbytes;
    return frame;
  }

  static Frame longCancelOf(std::uint64_t seq) {
    Frame frame;
    frame.kind = FrameKind::kCancel;
    frame.code = Code::kAborted;
    frame.slot.seq = seq;
    frame.text = std::string(kMaxTextBytes, 'x');
    return frame;
  }

  static Payload bytes(std::size_t nbytes) { return owned(std::vector<std::byte>(nbytes)); }

  void pass(Duration time) {
    network_.runUntil([] { return false; }, time);
  }

  /// A whole window of every honest worker is summed, at whatever the other one holds.
  void expectServed() {
    std::vector<std::size_t> before;
    for (const auto& worker : honest_) before.push_back(worker->arrived().size());
    for (const auto& worker : honest_) {
      for (std::uint64_t i = 0; i < 4; ++i) {
        worker->connection()->send(pushOf(next_seq_ + i, kWindowBytes / 4),
                                   bytes(kWindowBytes / 4));
      }
    }
    next_seq_ += 4;
    pass(seconds(1));
    for (std::size_t rank = 0; rank < honest_.size(); ++rank) {
      ASSERT_EQ(honest_[rank]->closes(), 0);
      ASSERT_EQ(honest_[rank]->arrived().size(), before[rank] + 4);
      for (std::size_t i = before[rank]; i < before[rank] + 4; ++i) {
        EXPECT_EQ(honest_[rank]->arrived()[i].frame.kind, FrameKind::kResult);
      }
    }
  }

  /// `attack` sends the i-th frame of a worker whose fellows never come. It may go on for as long
  /// as it is let; the reducer keeps within its limit and the honest job its share.
  void expectHarmless(std::int32_t world_size, const std::function<void(Recorder&, int)>& attack) {
    const auto hostile = join('x', 0, world_size);
    ASSERT_EQ(hostile->closes(), 0);
    for (int i = 0; i < kFramesMax && hostile->closes() == 0; ++i) {
      attack(*hostile, i);
      if (i % 256 != 255) continue;
      pass(milliseconds(1));
      ASSERT_LE(server_->stats().taken_bytes, kLimit + kUnderWay) << i;
      if (i % 32768 == 32767) expectServed();
    }
    expectServed();
    if (hostile->closes() > 0) {
      EXPECT_EQ(hostile->arrived().back().frame.code, Code::kResourceExhausted);
      ended_by_ = hostile->reason().message();
    }
  }

  transport::SimNetwork network_{transport::SimOptions{}};
  std::unique_ptr<transport::Transport> server_host_ = network_.addHost("server");
  std::unique_ptr<transport::Transport> client_host_ = network_.addHost("client");
  std::unique_ptr<server::ReducerServer> server_;
  std::vector<std::shared_ptr<Recorder>> clients_;
  std::vector<std::shared_ptr<Recorder>> honest_;
  std::uint64_t next_seq_ = 0;
  std::string ended_by_;
};

TEST_F(ServerMemoryTest, EmptyChunks) {
  expectHarmless(6, [](Recorder& worker, int i) { worker.connection()->send(pushOf(i, 0), {}); });
  EXPECT_NE(ended_by_.find("raise --memory-limit"), std::string::npos) << ended_by_;
}

TEST_F(ServerMemoryTest, NothingComesAgainAndAgain) {
  expectHarmless(2, [](Recorder& worker, int i) {
    Frame frame = pushOf(i, 0);
    frame.again = true;
    frame.epoch = 1 + static_cast<std::uint32_t>(i / 1000);
    worker.connection()->send(frame, {});
    if (i % 1000 != 999) return;
    Frame settled;
    settled.kind = FrameKind::kSettled;
    settled.epoch = frame.epoch;
    worker.connection()->send(settled, {});
  });
  EXPECT_NE(ended_by_.find("raise --memory-limit"), std::string::npos) << ended_by_;
}

TEST_F(ServerMemoryTest, LossesThatDidNotHappen) {
  expectHarmless(2, [](Recorder& worker, int i) {
    Frame frame = pushOf(i, 64 << 10);
    frame.epoch = 1'000'000;
    worker.connection()->send(frame, bytes(frame.length));
  });
  EXPECT_NE(ended_by_.find("raise --memory-limit"), std::string::npos) << ended_by_;
}

TEST_F(ServerMemoryTest, OperationsGivenUpWithLongTexts) {
  expectHarmless(2,
                 [](Recorder& worker, int i) { worker.connection()->send(longCancelOf(i), {}); });
}

TEST_F(ServerMemoryTest, AnOperationOfManyChunksGivenUpWithALongText) {
  expectHarmless(2, [](Recorder& worker, int i) {
    Frame frame = pushOf(i / 8192, 0);
    frame.slot.chunk = i % 8192;
    if (i % 8192 == 8191) frame = longCancelOf(i / 8192);
    worker.connection()->send(frame, {});
  });
}

TEST_F(ServerMemoryTest, PlacesOfChunksThatCameDamaged) {
  expectHarmless(2, [](Recorder& worker, int i) {
    Frame frame = pushOf(i, 16);
    frame.has_checksum = i % 16 != 15;
    frame.checksum = 1;
    frame.epoch = 1'000'000;
    worker.connection()->send(frame, bytes(frame.length));
  });
  EXPECT_FALSE(ended_by_.empty());
}

TEST_F(ServerMemoryTest, TinyResultsThatAreKeptToBeSentAgain) {
  expectHarmless(1, [](Recorder& worker, int i) {
    Frame frame = pushOf(i, 1);
    frame.has_checksum = true;
    const Payload payload = bytes(1);
    frame.checksum = wire::crc32c(payload);
    worker.connection()->send(frame, payload);
  });
  EXPECT_TRUE(ended_by_.empty()) << ended_by_;
}

TEST_F(ServerMemoryTest, ChunksBehindOneThatCameDamaged) {
  expectHarmless(2, [](Recorder& worker, int i) {
    Frame frame = pushOf(i, 16 << 10);
    frame.has_checksum = i == 0;
    frame.checksum = 1;
    frame.epoch = 1'000'000;
    worker.connection()->send(frame, bytes(frame.length));
  });
}

TEST_F(ServerMemoryTest, GivenUpWithLongTextsBehindOneThatCameDamaged) {
  expectHarmless(2, [](Recorder& worker, int i) {
    if (i == 0) {
      Frame frame = pushOf(0, 16);
      frame.has_checksum = true;
      frame.checksum = 1;
      return worker.connection()->send(frame, bytes(frame.length));
    }
    worker.connection()->send(longCancelOf(i), {});
  });
}

TEST_F(ServerMemoryTest, AGroupThatIsTooLargeIsNotTakenIn) {
  const auto hostile = join('x', 0, kMaxWorldSize);
  EXPECT_EQ(hostile->closes(), 1);
  EXPECT_EQ(hostile->arrived().back().frame.code, Code::kResourceExhausted);
  expectServed();
}

}  // namespace
}  // namespace reducer::testing
