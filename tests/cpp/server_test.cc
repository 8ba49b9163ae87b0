// A reducer's sessions on the simulated network: who says nothing, and what is left of who has
// gone.
#include "server/server.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "common/limits.h"
#include "conformance.h"
#include "server/tokens.h"
#include "transport/sim/sim.h"

namespace reducer::testing {
namespace {

using server::ServerOptions;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::size_t kWindowBytes = 1 << 20;
constexpr int kSilentMax = 5;

/// A standalone reducer and one host from which clients connect. In virtual time.
class ServerTest : public ::testing::Test {
 protected:
  ServerTest() {
    ServerOptions options;
    options.host = "server:1";
    options.standalone = true;
    options.silent_max = kSilentMax;
    server_ = std::make_unique<server::ReducerServer>(*server_host_, options);
    EXPECT_TRUE(server_->listen("server:7000").ok());
  }

  std::shared_ptr<Recorder> connect() {
    auto client = std::make_shared<Recorder>();
    client->hold(client_host_->connect("server:7000", client, seconds(5)));
    clients_.push_back(client);
    return client;
  }

  ~ServerTest() override {
    for (const auto& client : clients_) client->drop();
    pass(seconds(1));
  }

  static wire::Frame hello(Rank rank, std::int32_t world_size) {
    wire::Frame frame;
    frame.kind = wire::FrameKind::kHello;
    frame.hello.version = kProtocolVersion;
    frame.hello.job = "0123456789abcdef";
    frame.hello.group = "default";
    frame.hello.rank = rank;
    frame.hello.world_size = world_size;
    frame.hello.host = "client:" + std::to_string(rank);
    frame.hello.window_bytes = kWindowBytes;
    return frame;
  }

  /// A chunk of zeros of an all_reduce(sum).
  static void push(const Recorder& client, std::uint64_t seq, std::size_t count) {
    wire::Frame frame;
    frame.kind = wire::FrameKind::kPush;
    frame.slot.seq = seq;
    frame.call.collective = Collective::kAllReduce;
    frame.call.op = ReduceOp::kSum;
    frame.call.dtype = DataType::kFloat32;
    frame.call.count = count;
    frame.length = count * sizeof(float);
    client.connection()->send(frame, owned(std::vector<std::byte>(frame.length)));
  }

  void pass(Duration time) {
    network_.runUntil([] { return false; }, time);
  }

  transport::SimNetwork network_{transport::SimOptions{}};
  std::unique_ptr<transport::Transport> server_host_ = network_.addHost("server");
  std::unique_ptr<transport::Transport> client_host_ = network_.addHost("client");
  std::unique_ptr<server::ReducerServer> server_;
  std::vector<std::shared_ptr<Recorder>> clients_;
};

TEST_F(ServerTest, AConnectionThatSaysNothingIsClosedAfterTenSeconds) {
  const auto silent = connect();
  const auto worker = connect();
  worker->connection()->send(hello(0, 1), {});
  pass(milliseconds(9'900));
  EXPECT_EQ(silent->closes(), 0);
  pass(milliseconds(400));
  EXPECT_EQ(silent->closes(), 1);
  ASSERT_EQ(silent->arrived().size(), 1u);
  const wire::Frame last = silent->arrived()[0].frame;
  EXPECT_EQ(last.kind, wire::FrameKind::kError);
  EXPECT_TRUE(last.fatal);
  EXPECT_EQ(last.code, Code::kTimeout);
  EXPECT_NE(last.text.find("did not say which worker it is"), std::string::npos) << last.text;
  // Who has said hello may then be silent for as long as it likes.
  pass(seconds(60));
  EXPECT_EQ(worker->closes(), 0);
  push(*worker, 0, 10);
  pass(seconds(1));
  ASSERT_EQ(worker->arrived().size(), 2u);
  EXPECT_EQ(worker->arrived()[0].frame.kind, wire::FrameKind::kWelcome);
  EXPECT_EQ(worker->arrived()[1].frame.kind, wire::FrameKind::kResult);
}

TEST_F(ServerTest, OnlySoManyConnectionsMayBeSilentAtOnce) {
  const auto worker = connect();
  worker->connection()->send(hello(0, 1), {});
  pass(milliseconds(100));
  std::vector<std::shared_ptr<Recorder>> silent;
  for (int i = 0; i < kSilentMax + 3; ++i) silent.push_back(connect());
  pass(seconds(1));
  int refused = 0;
  for (const auto& one : silent) {
    refused += one->closes();
    if (one->closes() == 0) continue;
    ASSERT_EQ(one->arrived().size(), 1U);
    EXPECT_EQ(one->arrived()[0].frame.code, Code::kUnavailable);
  }
  EXPECT_EQ(refused, 3);
  push(*worker, 0, 10);
  pass(seconds(1));
  EXPECT_EQ(worker->arrived().back().frame.kind, wire::FrameKind::kResult);
  // Who says hello makes room.
  const auto first = std::find_if(silent.begin(), silent.end(),
                                  [](const auto& one) { return one->closes() == 0; });
  ASSERT_NE(first, silent.end());
  wire::Frame other = hello(0, 1);
  other.hello.job = "another job's id";
  (*first)->connection()->send(other, {});
  pass(seconds(1));
  const auto next = connect();
  pass(seconds(1));
  EXPECT_EQ(next->closes(), 0);
}

TEST(SameSecret, IsTrueOfEqualTextsOnly) {
  const std::string secret = "0123456789abcdef";
  EXPECT_TRUE(server::sameSecret(secret, secret));
  EXPECT_TRUE(server::sameSecret("", ""));
  EXPECT_FALSE(server::sameSecret(secret, ""));
  EXPECT_FALSE(server::sameSecret("", secret));
  EXPECT_FALSE(server::sameSecret(secret, secret + secret));
  EXPECT_FALSE(server::sameSecret(secret + secret, secret));
  EXPECT_FALSE(server::sameSecret(std::string(16, '\0'), std::string(17, '\0')));
  for (std::size_t i = 0; i < secret.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string other = secret;
      other[i] = static_cast<char>(other[i] ^ (1 << bit));
      EXPECT_FALSE(server::sameSecret(secret, other));
      EXPECT_FALSE(server::sameSecret(other, secret));
    }
  }
}

TEST_F(ServerTest, RanksThatDoNotAgreeOnWhoSharesAHostAreRefusedByName) {
  const auto first = connect();
  wire::Frame frame = hello(0, 4);
  frame.hello.hosts = {0, 0, 1, 1};
  first->connection()->send(frame, {});
  pass(seconds(1));
  for (const auto& hosts : {std::vector<std::uint32_t>{0, 1, 0, 1}, {}}) {
    const auto other = connect();
    frame = hello(1, 4);
    frame.hello.hosts = hosts;
    other->connection()->send(frame, {});
    pass(seconds(1));
    ASSERT_EQ(other->arrived().size(), 1u);
    const wire::Frame last = other->arrived()[0].frame;
    EXPECT_TRUE(last.fatal);
    EXPECT_EQ(last.code, Code::kMismatch);
    EXPECT_EQ(last.text,
              "the ranks of group 'default' do not agree on who shares a host with whom: to rank 1 "
              "(client:1) the hosts of its ranks are " +
                  std::string(hosts.empty() ? "one for each rank" : "0 1 0 1") +
                  "; to rank 0 (client:0) they are 0 0 1 1");
  }
  EXPECT_EQ(first->closes(), 0);
}

TEST_F(ServerTest, NothingIsHeldWhenAllHaveLeftInTheMiddle) {
  const std::vector<std::shared_ptr<Recorder>> workers{connect(), connect()};
  for (Rank r = 0; r < 2; ++r) workers[r]->connection()->send(hello(r, 2), {});
  for (std::uint64_t seq = 0; seq < 20; ++seq) push(*workers[0], seq, 1000);
  push(*workers[1], 20, 500);
  pass(seconds(1));
  EXPECT_GT(server_->stats().held_bytes, 20u * 4000 + 2000) << "slots and frames count, too";
  const std::size_t places = 16u * 2 * 768;  // of two workers in 16 shards
  EXPECT_LT(server_->stats().held_bytes, 20u * 4000 + 2000 + 21 * 2048 + places);
  EXPECT_EQ(server_->stats().slots_open, 21u);
  for (const auto& worker : workers) {
    worker->connection()->close(Status(Code::kAborted, "the test wants it"), /*flush=*/false);
  }
  pass(seconds(1));
  const server::ServerStats stats = server_->stats();
  EXPECT_EQ(stats.held_bytes, 0u);
  EXPECT_EQ(stats.slots_open, 0u);
  EXPECT_EQ(stats.reserved_bytes, 0u);
  EXPECT_EQ(stats.connections, 0u);
  EXPECT_TRUE(stats.groups.empty());
  // All of the window is there for those that come after.
  const auto next = connect();
  next->connection()->send(hello(0, 1), {});
  push(*next, 0, kWindowBytes / sizeof(float));
  pass(seconds(1));
  ASSERT_EQ(next->arrived().size(), 2u);
  EXPECT_EQ(next->arrived()[1].frame.kind, wire::FrameKind::kResult);
}

}  // namespace
}  // namespace reducer::testing
