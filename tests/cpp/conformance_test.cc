// One suite for every transport: what transport.h promises.
#include "conformance.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "carriers.h"
#include "transport/transport.h"

namespace reducer {
namespace {

using testing::Carrier;
using testing::Counter;
using testing::expectNumbered;
using testing::kDeadline;
using testing::numbered;
using testing::pattern;
using testing::patternPayload;
using testing::Recorder;
using transport::Connection;
using transport::Listener;
using transport::Transport;
using wire::Frame;
using wire::FrameKind;

class Conformance : public ::testing::TestWithParam<Carrier (*)()> {
 protected:
  void SetUp() override { carrier_ = GetParam()(); }

  void TearDown() override {
    for (const auto& recorder : recorders()) recorder->drop();
    listeners_.clear();
    carrier_.client.reset();
    carrier_.server.reset();
    carrier_.network.reset();
    for (const auto& recorder : recorders())
      EXPECT_EQ(recorder->closes(), 1) << "a dropped onClosed";
  }

  /// Listens; every accepted connection gets a recorder with this hook. Returns the address.
  std::string listen(Recorder::Hook hook = nullptr, const std::string& at = "127.0.0.1:0") {
    auto listener =
        carrier_.server->listen(at, [this, hook](std::shared_ptr<Connection> connection) {
          auto recorder = std::make_shared<Recorder>(hook);
          connection->admit(kMaxMessageBytes);
          recorder->hold(std::move(connection));
          const std::lock_guard lock(mutex_);
          recorders_.push_back(recorder);
          accepted_.push_back(recorder);
          accepted_changed_.notify_all();
          return recorder;
        });
    EXPECT_TRUE(listener.ok()) << listener.status().message();
    if (!listener.ok()) return "";
    listeners_.push_back(std::move(listener).value());
    return listeners_.back()->address();
  }

  std::shared_ptr<Recorder> connect(const std::string& address, Recorder::Hook hook = nullptr,
                                    Duration timeout = std::chrono::seconds(5)) {
    auto recorder = std::make_shared<Recorder>(std::move(hook));
    {
      const std::lock_guard lock(mutex_);
      recorders_.push_back(recorder);
    }
    recorder->hold(carrier_.client->connect(address, recorder, timeout));
    return recorder;
  }

  /// The index-th accepted connection's recorder, once there is one.
  std::shared_ptr<Recorder> accepted(std::size_t index = 0) {
    std::unique_lock lock(mutex_);
    if (!accepted_changed_.wait_for(lock, kDeadline, [&] { return accepted_.size() > index; })) {
      ADD_FAILURE() << "no connection came";
      return std::make_shared<Recorder>();
    }
    return accepted_[index];
  }

  /// A connection that has carried a frame.
  std::shared_ptr<Recorder> connectedTo(const std::string& address, Recorder::Hook hook = nullptr) {
    auto client = connect(address, std::move(hook));
    client->connection()->send(numbered(0, 0), {});
    EXPECT_TRUE(accepted()->waitForFrames(1));
    return client;
  }

  std::vector<std::shared_ptr<Recorder>> recorders() {
    const std::lock_guard lock(mutex_);
    return recorders_;
  }

  /// An address at which nobody listens: its port was free a moment ago.
  std::string deadAddress() {
    const std::string address = listen();
    listeners_.pop_back();
    return address;
  }

  static Recorder::Hook echo() {
    return [](Recorder& recorder, const Frame& frame, const Payload& payload) {
      recorder.connection()->send(frame, payload);
    };
  }

  void send(Recorder& from, std::uint64_t seq, std::size_t nbytes, std::size_t pieces = 1) {
    from.connection()->send(numbered(seq, nbytes), patternPayload(seq, nbytes, pieces, released_));
  }

  Carrier carrier_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  const std::shared_ptr<Counter> released_ = std::make_shared<Counter>();

 private:
  std::mutex mutex_;
  std::condition_variable accepted_changed_;
  std::vector<std::shared_ptr<Recorder>> recorders_;
  std::vector<std::shared_ptr<Recorder>> accepted_;
};

// ------------------------------------------------------------------ carrying frames

TEST_P(Conformance, EchoesFramesAndPayloadsInPieces) {
  const auto client = connect(listen(echo()));
  const std::vector<std::size_t> sizes = {0, 1, 1000, 1 << 20, 3, 777777, 0};
  for (std::size_t i = 0; i < sizes.size(); ++i) send(*client, i, sizes[i], 1 + 2 * i);
  ASSERT_TRUE(client->waitForFrames(sizes.size()));
  expectNumbered(*client, 0, sizes.size(), [&](std::uint64_t seq) { return sizes[seq]; });
}

TEST_P(Conformance, CarriesEveryFieldOfEveryKind) {
  const auto client = connect(listen(echo()));
  testing::Random random(11);
  std::vector<Frame> sent;
  for (int i = 0; i < 300; ++i) {
    std::size_t nbytes = 0;
    sent.push_back(testing::anyFrame(random, 2000, nbytes));
    client->connection()->send(sent.back(), testing::owned(testing::anyBytes(random, nbytes)));
  }
  ASSERT_TRUE(client->waitForFrames(sent.size()));
  const auto arrived = client->arrived();
  for (std::size_t i = 0; i < sent.size(); ++i) ASSERT_EQ(arrived[i].frame, sent[i]) << i;
}

TEST_P(Conformance, KeepsOrderOverTenThousandFrames) {
  const auto client = connect(listen());
  const auto nbytes = [](std::uint64_t seq) { return static_cast<std::size_t>(seq % 50); };
  for (std::uint64_t seq = 0; seq < 10000; ++seq) send(*client, seq, nbytes(seq));
  const auto server = accepted();
  ASSERT_TRUE(server->waitForFrames(10000));
  expectNumbered(*server, 0, 10000, nbytes);
}

TEST_P(Conformance, ServesManyConnectionsAtOnce) {
  const std::string address = listen(echo());
  std::vector<std::shared_ptr<Recorder>> clients;
  for (int i = 0; i < 32; ++i) clients.push_back(connect(address));
  for (std::uint64_t round = 0; round < 50; ++round) {
    for (const auto& client : clients) send(*client, round, 100 * round, 2);
  }
  for (const auto& client : clients) {
    ASSERT_TRUE(client->waitForFrames(50));
    expectNumbered(*client, 0, 50, [](std::uint64_t seq) { return 100 * seq; });
  }
}

TEST_P(Conformance, CarriesBothDirectionsAtOnce) {
  const auto client = connectedTo(listen());
  const auto server = accepted();
  const auto flood = [this](Recorder& from) {
    for (std::uint64_t seq = 1; seq <= 1000; ++seq) send(from, seq, 4096, 2);
  };
  std::thread other([&] { flood(*server); });
  flood(*client);
  other.join();
  ASSERT_TRUE(client->waitForFrames(1000));
  ASSERT_TRUE(server->waitForFrames(1001));
  expectNumbered(*client, 1, 1000, [](std::uint64_t) { return 4096U; });
  EXPECT_TRUE(released_->waitFor(2000));
}

TEST_P(Conformance, TakesFramesFromSeveralThreads) {
  const auto client = connect(listen());
  std::vector<std::thread> threads;
  for (std::uint64_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::uint64_t i = 0; i < 500; ++i) send(*client, thread * 1000 + i, 64);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto server = accepted();
  ASSERT_TRUE(server->waitForFrames(2000));
  std::vector<std::uint64_t> next(4, 0);
  for (const auto& one : server->arrived()) {
    const std::uint64_t thread = one.frame.slot.seq / 1000;
    ASSERT_EQ(one.frame.slot.seq % 1000, next[thread]++);
    ASSERT_EQ(one.payload, pattern(one.frame.slot.seq, 64));
  }
}

TEST_P(Conformance, ReleasesPayloadOwnersOnceSent) {
  const auto client = connect(listen());
  for (std::uint64_t seq = 0; seq < 100; ++seq) send(*client, seq, 20000, 3);
  ASSERT_TRUE(released_->waitFor(100));
  ASSERT_TRUE(accepted()->waitForFrames(100));
  expectNumbered(*accepted(), 0, 100, [](std::uint64_t) { return 20000U; });
}

TEST_P(Conformance, ReleasesPayloadOwnersThatCannotBeSent) {
  const auto client = connect(deadAddress(), nullptr, std::chrono::milliseconds(200));
  for (std::uint64_t seq = 0; seq < 10; ++seq) send(*client, seq, 1000);
  ASSERT_TRUE(client->waitForClose());
  send(*client, 10, 1000);
  EXPECT_TRUE(released_->waitFor(11));
}

TEST_P(Conformance, NamesThePeer) {
  const std::string address = listen();
  const auto client = connectedTo(address);
  EXPECT_NE(client->connection()->peer().find(address), std::string::npos)
      << client->connection()->peer();
  EXPECT_FALSE(accepted()->connection()->peer().empty());
}

// ------------------------------------------------------------------ closing

TEST_P(Conformance, CloseWithFlushDeliversEverythingFirst) {
  const auto client = connect(listen());
  for (std::uint64_t seq = 0; seq < 200; ++seq) send(*client, seq, 10000);
  client->connection()->close({}, /*flush=*/true);
  const auto server = accepted();
  ASSERT_TRUE(client->waitForClose());
  ASSERT_TRUE(server->waitForClose());
  expectNumbered(*server, 0, 200, [](std::uint64_t) { return 10000U; });
  EXPECT_TRUE(client->reason().ok()) << client->reason().message();
  EXPECT_TRUE(server->reason().ok()) << server->reason().message();
  EXPECT_TRUE(released_->waitFor(200));
}

TEST_P(Conformance, ServersCloseWithFlushToo) {
  const auto client = connectedTo(listen());
  const auto server = accepted();
  for (std::uint64_t seq = 0; seq < 200; ++seq) send(*server, seq, 10000);
  server->connection()->close({}, /*flush=*/true);
  ASSERT_TRUE(server->waitForClose());
  ASSERT_TRUE(client->waitForClose());
  expectNumbered(*client, 0, 200, [](std::uint64_t) { return 10000U; });
  EXPECT_TRUE(server->reason().ok()) << server->reason().message();
  EXPECT_TRUE(client->reason().ok()) << client->reason().message();
}

TEST_P(Conformance, CloseWithoutFlushDeliversAPrefixAtMost) {
  const auto client = connectedTo(listen());
  const auto server = accepted();
  for (std::uint64_t seq = 1; seq <= 100; ++seq) send(*client, seq, 50000);
  client->connection()->close({}, /*flush=*/false);
  ASSERT_TRUE(client->waitForClose());
  ASSERT_TRUE(server->waitForClose());
  EXPECT_TRUE(client->reason().ok()) << client->reason().message();
  EXPECT_TRUE(released_->waitFor(100));
  const auto arrived = server->arrived();
  for (std::size_t i = 1; i < arrived.size(); ++i) {
    ASSERT_EQ(arrived[i].frame.slot.seq, i);
    ASSERT_EQ(arrived[i].payload, pattern(i, 50000));
  }
}

TEST_P(Conformance, TheReasonOfACloseComesBack) {
  const std::string address = listen();
  for (const bool flush : {false, true}) {
    const std::size_t index = flush ? 1 : 0;
    const auto client = connect(address);
    client->connection()->send(numbered(0, 0), {});
    const auto server = accepted(index);
    ASSERT_TRUE(server->waitForFrames(1));
    Recorder& closer = flush ? *server : *client;
    closer.connection()->close(Status(Code::kAborted, "the group was torn down"), flush);
    ASSERT_TRUE(client->waitForClose());
    ASSERT_TRUE(server->waitForClose());
    EXPECT_EQ(closer.reason().code(), Code::kAborted);
    EXPECT_EQ(closer.reason().message(), "the group was torn down");
  }
}

TEST_P(Conformance, CloseIsIdempotentAndLaterFramesAreDropped) {
  const auto client = connectedTo(listen());
  const auto connection = client->connection();
  connection->close(Status(Code::kAborted, "first"), /*flush=*/true);
  connection->close(Status(Code::kInternal, "second"), /*flush=*/false);
  send(*client, 1, 1000);
  ASSERT_TRUE(client->waitForClose());
  send(*client, 2, 1000);
  connection->close({}, /*flush=*/true);
  EXPECT_EQ(client->reason().message(), "first");
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_EQ(accepted()->arrived().size(), 1U);
  EXPECT_TRUE(released_->waitFor(2));
}

TEST_P(Conformance, OnClosedDoesNotComeFromWithinClose) {
  struct Watcher : transport::Handler {
    void onFrame(Frame, Payload) override {}
    void onClosed(const Status&) override {
      thread = std::this_thread::get_id();
      closed.raise();
    }
    std::thread::id thread;
    Counter closed;
  };
  const std::string address = listen();
  const auto watcher = std::make_shared<Watcher>();
  const auto connection = carrier_.client->connect(address, watcher, std::chrono::seconds(5));
  connection->close({}, /*flush=*/false);
  ASSERT_TRUE(watcher->closed.waitFor(1));
  EXPECT_NE(watcher->thread, std::this_thread::get_id());
}

TEST_P(Conformance, DroppingTheLastReferenceCloses) {
  const std::string address = listen();
  const auto client = connectedTo(address);
  client->drop();
  ASSERT_TRUE(client->waitForClose());
  ASSERT_TRUE(accepted()->waitForClose());
  // And on the accepting side.
  const auto other = connect(address);
  other->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted(1)->waitForFrames(1));
  accepted(1)->drop();
  ASSERT_TRUE(accepted(1)->waitForClose());
  ASSERT_TRUE(other->waitForClose());
}

TEST_P(Conformance, DestroyingTheListenerClosesItsConnections) {
  const std::string address = listen();
  const auto client = connectedTo(address);
  const auto server = accepted();
  listeners_.clear();
  EXPECT_EQ(server->closes(), 1) << "no call of the listener may come after its end";
  ASSERT_TRUE(client->waitForClose());
  const auto late = connect(address, nullptr, std::chrono::milliseconds(200));
  ASSERT_TRUE(late->waitForClose());
  EXPECT_EQ(late->reason().code(), Code::kUnavailable);
}

TEST_P(Conformance, DestroyingTheTransportClosesWhatIsLeft) {
  const auto client = connectedTo(listen());
  carrier_.client.reset();
  EXPECT_EQ(client->closes(), 1);
  ASSERT_TRUE(accepted()->waitForClose());
  client->connection()->send(numbered(1, 0), {});  // dropped in silence
  client->connection()->close({}, /*flush=*/true);
}

TEST_P(Conformance, HandlersMaySendAndCloseFromOnFrame) {
  const auto bounce = [](Recorder& recorder, const Frame& frame, const Payload& payload) {
    Frame next = frame;
    ++next.slot.seq;
    if (next.slot.seq <= 400) {
      recorder.connection()->send(next, payload);
    } else {
      recorder.connection()->close(Status(Code::kAborted, "enough"), /*flush=*/true);
      recorder.drop();
    }
  };
  const auto client = connect(listen(bounce), bounce);
  send(*client, 0, 5000, 3);
  ASSERT_TRUE(client->waitForClose());
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_EQ(client->arrived().size() + accepted()->arrived().size(), 401U);
}

TEST_P(Conformance, AnAcceptorMaySendAtOnce) {
  auto listener =
      carrier_.server->listen("127.0.0.1:0", [](std::shared_ptr<Connection> connection) {
        connection->send(numbered(5, 10), testing::owned(pattern(5, 10)));
        auto recorder = std::make_shared<Recorder>();
        recorder->hold(std::move(connection));
        return recorder;
      });
  ASSERT_TRUE(listener.ok());
  const auto client = connect(listener.value()->address());
  ASSERT_TRUE(client->waitForFrames(1));
  expectNumbered(*client, 5, 1, [](std::uint64_t) { return 10U; });
  client->drop();
  ASSERT_TRUE(client->waitForClose());
}

// ------------------------------------------------------------------ addresses

TEST_P(Conformance, ConnectsToAListenerThatStartsLater) {
  const std::string address = deadAddress();
  const auto client = connect(address);
  send(*client, 7, 100);
  Counter ticks;
  const auto timer =
      carrier_.client->every(std::chrono::milliseconds(100), [&](TimePoint) { ticks.raise(); });
  ASSERT_TRUE(ticks.waitFor(3));
  ASSERT_EQ(client->closes(), 0) << client->reason().message();
  ASSERT_EQ(listen(echo(), address), address);
  ASSERT_TRUE(client->waitForFrames(1));
  expectNumbered(*client, 7, 1, [](std::uint64_t) { return 100U; });
}

TEST_P(Conformance, SaysWhichAddressDidNotAnswer) {
  const std::string address = deadAddress();
  const TimePoint begin = Clock::now();
  const auto client = connect(address, nullptr, std::chrono::milliseconds(500));
  ASSERT_TRUE(client->waitForClose());
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(450));
  EXPECT_EQ(client->reason().code(), Code::kUnavailable);
  EXPECT_NE(client->reason().message().find(address + " did not answer within 0.5 s"),
            std::string::npos)
      << client->reason().message();
}

TEST_P(Conformance, CloseEndsAConnectInProgress) {
  const auto client = connect(deadAddress(), nullptr, std::chrono::seconds(60));
  client->connection()->close(Status(Code::kAborted, "no longer wanted"), /*flush=*/false);
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().message(), "no longer wanted");
}

TEST_P(Conformance, APortInUseIsRefusedByName) {
  const std::string address = listen();
  for (const std::string& bad :
       {address, std::string("nonsense"), std::string("127.0.0.1:99999")}) {
    const auto listener = carrier_.server->listen(
        bad, [](std::shared_ptr<Connection>) { return std::make_shared<Recorder>(); });
    ASSERT_FALSE(listener.ok()) << bad;
    EXPECT_EQ(listener.status().code(), Code::kUnavailable);
    EXPECT_NE(listener.status().message().find(bad), std::string::npos)
        << listener.status().message();
  }
}

// ------------------------------------------------------------------ what peers send

TEST_P(Conformance, AFrameThatCannotBeReadIsAnsweredAndItsConnectionAloneCloses) {
  const std::string address = listen(echo());
  const auto good = connectedTo(address);
  const auto bad = connect(address);
  Frame broken = numbered(1, 0);
  broken.call.dtype = static_cast<DataType>(99);
  bad->connection()->send(broken, {});
  ASSERT_TRUE(bad->waitForClose());
  ASSERT_EQ(bad->arrived().size(), 1U);
  const Frame answer = bad->arrived()[0].frame;
  EXPECT_EQ(answer.kind, FrameKind::kError);
  EXPECT_TRUE(answer.fatal);
  EXPECT_EQ(answer.code, Code::kInvalidArgument);
  EXPECT_NE(answer.text.find("dtype 99"), std::string::npos) << answer.text;
  const auto server = accepted(1);
  ASSERT_TRUE(server->waitForClose());
  EXPECT_TRUE(server->arrived().empty());
  EXPECT_EQ(server->reason().code(), Code::kInvalidArgument);
  send(*good, 1, 10);
  ASSERT_TRUE(good->waitForFrames(2));
  EXPECT_EQ(good->closes(), 0);
}

TEST_P(Conformance, AHelloOfAnotherVersionReachesTheHandler) {
  const auto client = connect(listen());
  Frame hello;
  hello.kind = FrameKind::kHello;
  hello.hello.version = kProtocolVersion + 7;
  client->connection()->send(hello, {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  const Frame arrived = accepted()->arrived()[0].frame;
  EXPECT_EQ(arrived.kind, FrameKind::kHello);
  EXPECT_EQ(arrived.hello.version, kProtocolVersion + 7);
}

// ------------------------------------------------------------------ timers and tasks

TEST_P(Conformance, TimersTickOneCallAtATimeAndStop) {
  Counter ticks;
  Counter others;
  std::atomic<bool> in_call = false;
  std::atomic<int> overlaps = 0;
  std::vector<TimePoint> times;
  auto timer = carrier_.client->every(std::chrono::milliseconds(5), [&](TimePoint now) {
    if (in_call.exchange(true)) ++overlaps;
    times.push_back(now);
    ticks.raise();
    in_call = false;
  });
  ASSERT_TRUE(ticks.waitFor(5));
  timer.reset();
  const std::size_t count = ticks.value();
  // Had it not stopped, it would tick on beside this one.
  const auto other =
      carrier_.client->every(std::chrono::milliseconds(10), [&](TimePoint) { others.raise(); });
  ASSERT_TRUE(others.waitFor(5));
  EXPECT_EQ(ticks.value(), count);
  EXPECT_EQ(overlaps, 0);
  for (std::size_t i = 1; i < times.size(); ++i) EXPECT_GT(times[i], times[i - 1]);
  EXPECT_LE(times.back(), carrier_.client->now());
}

TEST_P(Conformance, PostedTasksRunOnTheTransportsThreads) {
  Counter done;
  std::atomic<int> here = 0;
  const std::thread::id me = std::this_thread::get_id();
  for (int i = 0; i < 100; ++i) {
    carrier_.client->post([&] {
      if (std::this_thread::get_id() == me) ++here;
      carrier_.client->post([&] { done.raise(); });
    });
  }
  ASSERT_TRUE(done.waitFor(100));
  EXPECT_EQ(here, 0);
}

TEST_P(Conformance, TasksPostedBeforeTheEndRun) {
  Counter done;
  for (int i = 0; i < 100; ++i) carrier_.client->post([&] { done.raise(); });
  carrier_.client.reset();
  EXPECT_EQ(done.value(), 100U);
}

INSTANTIATE_TEST_SUITE_P(Sim, Conformance, ::testing::Values(&testing::simCarrier),
                         [](const auto&) { return std::string("two_threads"); });
INSTANTIATE_TEST_SUITE_P(Tcp, Conformance,
                         ::testing::Values(&testing::tcpCarrier<1>, &testing::tcpCarrier<3>),
                         [](const auto& info) {
                           return std::string(info.index == 0 ? "one_thread" : "three_threads");
                         });
#ifdef REDUCER_HAS_GRPC
using transport::Network;
std::string hostsName(const ::testing::TestParamInfo<Carrier (*)()>& info) {
  constexpr const char* kNames[] = {"grpc", "auto", "to_auto_by_grpc", "from_auto_to_grpc"};
  return kNames[info.index];
}
INSTANTIATE_TEST_SUITE_P(Hosts, Conformance,
                         ::testing::Values(&testing::hostsCarrier<Network::kGrpc, Network::kGrpc>,
                                           &testing::hostsCarrier<Network::kAuto, Network::kAuto>,
                                           &testing::hostsCarrier<Network::kAuto, Network::kGrpc>,
                                           &testing::hostsCarrier<Network::kGrpc, Network::kAuto>),
                         &hostsName);
INSTANTIATE_TEST_SUITE_P(Tls, Conformance, ::testing::Values(&testing::tlsCarrier),
                         [](const auto&) { return std::string("mutual"); });
#endif

}  // namespace
}  // namespace reducer
