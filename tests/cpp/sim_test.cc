#include "transport/sim/sim.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/limits.h"
#include "conformance.h"

namespace reducer {
namespace {

using namespace std::chrono_literals;
using testing::Counter;
using testing::expectNumbered;
using testing::numbered;
using testing::patternPayload;
using testing::Recorder;
using transport::Connection;
using transport::Listener;
using transport::SimNetwork;
using transport::SimOptions;
using transport::Transport;
using wire::Frame;
using wire::FrameKind;

/// A server that echoes and any number of clients, in virtual time on the test's thread.
class Sim : public ::testing::Test {
 protected:
  void start(SimOptions options) {
    network_ = std::make_unique<SimNetwork>(options);
    server_ = network_->addHost("server");
    client_ = network_->addHost("client");
    auto listener = server_->listen("server:7000", [this](std::shared_ptr<Connection> connection) {
      auto recorder = std::make_shared<Recorder>(
          [](Recorder& self, const Frame& frame, const Payload& payload) {
            self.connection()->send(frame, payload);
          });
      recorder->hold(std::move(connection));
      accepted_.push_back(recorder);
      return recorder;
    });
    ASSERT_TRUE(listener.ok()) << listener.status().message();
    listener_ = std::move(listener).value();
  }

  std::shared_ptr<Recorder> connect(Transport& from, const std::string& address = "server:7000",
                                    Duration timeout = 5s) {
    auto recorder = std::make_shared<Recorder>();
    recorder->hold(from.connect(address, recorder, timeout));
    made_.push_back(recorder);
    return recorder;
  }

  void send(Recorder& from, std::uint64_t seq, std::size_t nbytes) {
    from.connection()->send(numbered(seq, nbytes), patternPayload(seq, nbytes, 2, released_));
  }

  bool until(const std::function<bool()>& done, Duration limit = 60s) {
    return network_->runUntil(done, limit);
  }
  bool untilFrames(const Recorder& recorder, std::size_t count) {
    return until([&] { return recorder.arrived().size() >= count; });
  }
  bool untilClosed(const Recorder& recorder) {
    return until([&] { return recorder.closes() > 0; });
  }

  void TearDown() override {
    for (const auto& recorder : made_) recorder->drop();
    for (const auto& recorder : accepted_) recorder->drop();
    listener_.reset();
    client_.reset();
    server_.reset();
    network_.reset();
  }

  std::unique_ptr<SimNetwork> network_;
  std::unique_ptr<Transport> server_;
  std::unique_ptr<Transport> client_;
  std::unique_ptr<Listener> listener_;
  std::vector<std::shared_ptr<Recorder>> accepted_;
  std::vector<std::shared_ptr<Recorder>> made_;
  const std::shared_ptr<Counter> released_ = std::make_shared<Counter>();
};

/// Everything that three clients, a timer and a kill cause, with its times.
std::string traceOf(std::uint64_t seed) {
  struct Tracer : transport::Handler {
    Tracer(std::string& t, SimNetwork& n, std::string w)
        : trace(t), network(n), who(std::move(w)) {}
    void note(const std::string& what) {
      trace +=
          std::to_string(network.now().time_since_epoch().count()) + " " + who + " " + what + "\n";
    }
    void onFrame(Frame frame, Payload payload) override {
      note("frame " + std::to_string(frame.slot.seq) + " in " +
           std::to_string(payload.pieces().size()) + " pieces");
      ++frame.slot.seq;
      if (frame.slot.seq < 40 && connection) connection->send(frame, payload);
    }
    void onClosed(const Status& reason) override { note("closed: " + reason.message()); }
    std::string& trace;
    SimNetwork& network;
    std::string who;
    std::shared_ptr<Connection> connection;
  };
  std::string trace;
  SimOptions options;
  options.seed = seed;
  options.piece_bytes_max = 10;
  SimNetwork network(options);
  const auto server = network.addHost("server");
  auto listener = server->listen("server:1", [&](std::shared_ptr<Connection> connection) {
    auto tracer = std::make_shared<Tracer>(trace, network, "server, of " + connection->peer());
    tracer->connection = std::move(connection);
    return tracer;
  });
  EXPECT_TRUE(listener.ok());
  std::vector<std::unique_ptr<Transport>> hosts;
  std::vector<std::shared_ptr<Tracer>> tracers;
  for (int i = 0; i < 3; ++i) {
    hosts.push_back(network.addHost("client" + std::to_string(i)));
    tracers.push_back(std::make_shared<Tracer>(trace, network, "client" + std::to_string(i)));
    tracers[i]->connection = hosts[i]->connect("server:1", tracers[i], 1s);
    tracers[i]->connection->send(numbered(0, 100), testing::owned(testing::pattern(0, 100)));
  }
  const auto timer = hosts[0]->every(300us, [&](TimePoint) { tracers[0]->note("tick"); });
  network.runUntil([] { return false; }, 3ms);
  network.kill("client1");
  network.runUntil([] { return false; }, 3ms);
  for (auto& tracer : tracers) tracer->connection.reset();
  return trace;
}

TEST(SimDeterminism, OneSeedGivesOneTrace) {
  std::vector<std::string> traces;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    traces.push_back(traceOf(seed));
    ASSERT_EQ(traceOf(seed), traces.back()) << "seed " << seed;
    EXPECT_NE(traces.back().find("frame 30 "), std::string::npos);
    EXPECT_NE(traces.back().find("closed: "), std::string::npos);
    EXPECT_NE(traces.back().find("tick"), std::string::npos);
    for (std::size_t i = 0; i + 1 < traces.size(); ++i) EXPECT_NE(traces[i], traces.back());
  }
}

TEST_F(Sim, NothingMovesButInSteps) {
  start({});
  const auto client = connect(*client_);
  send(*client, 0, 10);
  EXPECT_EQ(client->arrived().size(), 0U);
  EXPECT_EQ(accepted_.size(), 0U);
  const TimePoint begin = network_->now();
  std::size_t steps = 0;
  while (network_->step()) ++steps;
  EXPECT_EQ(steps, 3U);  // accepted, there, and back
  ASSERT_EQ(client->arrived().size(), 1U);
  EXPECT_GT(network_->now() - begin, 3 * 10us);
  EXPECT_LE(network_->now() - begin, 3 * 200us);
  EXPECT_EQ(client_->now(), network_->now());
}

TEST_F(Sim, RunUntilEndsAtItsLimit) {
  start({});
  const TimePoint begin = network_->now();
  EXPECT_FALSE(until([] { return false; }, 7s));
  EXPECT_EQ(network_->now() - begin, 7s);
  int ticks = 0;
  const auto timer = client_->every(1s, [&](TimePoint) { ++ticks; });
  EXPECT_FALSE(until([] { return false; }, 3500ms));
  EXPECT_EQ(ticks, 3);
  EXPECT_EQ(network_->now() - begin, 10500ms);
  EXPECT_TRUE(until([&] { return ticks == 5; }));
}

TEST_F(Sim, AnUnansweredConnectEndsExactlyAtItsTimeout) {
  start({});
  const TimePoint begin = network_->now();
  const auto client = connect(*client_, "nowhere:1", 5s);
  send(*client, 0, 10);
  ASSERT_TRUE(untilClosed(*client));
  EXPECT_EQ(network_->now() - begin, 5s);
  EXPECT_EQ(client->reason().code(), Code::kUnavailable);
  EXPECT_NE(client->reason().message().find("nowhere:1 did not answer within 5 s"),
            std::string::npos);
  EXPECT_EQ(released_->value(), 1U);
  const auto malformed = connect(*client_, "nowhere");
  ASSERT_TRUE(untilClosed(*malformed));
  EXPECT_EQ(malformed->reason().code(), Code::kInvalidArgument);
}

TEST_F(Sim, FlushedFramesReachAListenerThatStartsAfterTheClose) {
  start({});
  listener_.reset();
  const auto client = connect(*client_);
  send(*client, 0, 10);
  client->connection()->close({}, /*flush=*/true);
  EXPECT_FALSE(until([&] { return client->closes() > 0; }, 1s));
  auto late = std::make_shared<Recorder>();
  auto listener = server_->listen("server:7000", [&](std::shared_ptr<Connection> connection) {
    late->hold(std::move(connection));
    return late;
  });
  ASSERT_TRUE(listener.ok());
  ASSERT_TRUE(untilClosed(*late));
  expectNumbered(*late, 0, 1, [](std::uint64_t) { return 10U; });
  EXPECT_TRUE(late->reason().ok());
  EXPECT_TRUE(client->reason().ok());
  late->drop();
}

TEST_F(Sim, PayloadsComeInPiecesAtOddPlaces) {
  SimOptions options;
  options.piece_bytes_max = 7;
  start(options);
  const auto client = connect(*client_);
  bool unaligned = false;
  std::size_t longest = 0;
  auto listener = server_->listen("server:0", [&](std::shared_ptr<Connection> connection) {
    auto recorder =
        std::make_shared<Recorder>([&](Recorder&, const Frame&, const Payload& payload) {
          for (const Bytes& piece : payload.pieces()) {
            longest = std::max(longest, piece.size());
            unaligned |= reinterpret_cast<std::uintptr_t>(piece.data()) % 4 != 0;
          }
        });
    recorder->hold(std::move(connection));
    accepted_.push_back(recorder);
    return recorder;
  });
  ASSERT_TRUE(listener.ok());
  EXPECT_NE(listener.value()->address(), "server:0");
  const auto other = connect(*client_, listener.value()->address());
  for (std::uint64_t seq = 0; seq < 100; ++seq) {
    send(*client, seq, 10 * seq);
    send(*other, seq, 10 * seq);
  }
  ASSERT_TRUE(until(
      [&] { return client->arrived().size() == 100 && accepted_[1]->arrived().size() == 100; }));
  expectNumbered(*client, 0, 100, [](std::uint64_t seq) { return 10 * seq; });
  EXPECT_EQ(longest, 7U);
  EXPECT_TRUE(unaligned);
  other->drop();
  listener.value().reset();
}

TEST_F(Sim, KillEndsConnectionsAtTheOtherSideOnly) {
  start({});
  const auto client = connect(*client_);
  const auto survivor_host = network_->addHost("survivor");
  const auto survivor = connect(*survivor_host);
  send(*client, 0, 10);
  send(*survivor, 0, 10);
  ASSERT_TRUE(until([&] { return client->arrived().size() + survivor->arrived().size() == 2; }));
  int ticks = 0;
  bool posted = false;
  const auto timer = client_->every(1ms, [&](TimePoint) { ++ticks; });
  client_->post([&] { posted = true; });
  send(*client, 1, 10);
  accepted_[0]->connection()->send(numbered(9, 0), {});
  accepted_[1]->connection()->send(numbered(9, 0), {});
  network_->kill("client");
  const TimePoint begin = network_->now();
  const auto& lost =
      accepted_[0]->connection()->peer().starts_with("client:") ? accepted_[0] : accepted_[1];
  ASSERT_TRUE(untilClosed(*lost));
  EXPECT_GE(network_->now() - begin, 10us);
  EXPECT_LE(network_->now() - begin, 200us);
  EXPECT_EQ(lost->reason().code(), Code::kUnavailable);
  EXPECT_NE(lost->reason().message().find("lost the connection to client:"), std::string::npos);
  send(*client, 2, 10);
  until([] { return false; }, 1s);
  EXPECT_EQ(ticks, 0);
  EXPECT_FALSE(posted);
  EXPECT_EQ(client->arrived().size(), 1U);
  EXPECT_EQ(client->closes(), 0) << "nothing is delivered to a killed host, not even the end";
  EXPECT_EQ(released_->value(), 4U);
  send(*survivor, 1, 10);
  ASSERT_TRUE(untilFrames(*survivor, 3));
  client_.reset();
  EXPECT_EQ(client->closes(), 1) << "the corpse is cleaned up";
  survivor->drop();
}

TEST_F(Sim, ConnectsToAKilledHostGoUnansweredUntilItIsBack) {
  start({});
  network_->kill("server");
  const auto client = connect(*client_, "server:7000", 1s);
  ASSERT_TRUE(untilClosed(*client));
  EXPECT_NE(client->reason().message().find("server:7000 did not answer within 1 s"),
            std::string::npos);
  const auto again = connect(*client_);
  send(*again, 3, 5);
  until([] { return false; }, 100ms);
  const auto reborn = network_->addHost("server");
  auto recorder = std::make_shared<Recorder>();
  auto listener = reborn->listen("server:7000", [&](std::shared_ptr<Connection> connection) {
    recorder->hold(std::move(connection));
    return recorder;
  });
  ASSERT_TRUE(listener.ok()) << listener.status().message();
  ASSERT_TRUE(untilFrames(*recorder, 1));
  recorder->drop();
  again->drop();
}

TEST_F(Sim, APausedHostLosesNothing) {
  start({});
  const auto client = connect(*client_);
  send(*client, 0, 10);
  ASSERT_TRUE(untilFrames(*client, 1));
  network_->pause("client");
  for (std::uint64_t seq = 1; seq <= 50; ++seq) send(*client, seq, 10);
  accepted_[0]->connection()->send(numbered(1000, 0), {});
  until([] { return false; }, 10s);
  EXPECT_EQ(accepted_[0]->arrived().size(), 1U);
  EXPECT_EQ(client->arrived().size(), 1U);
  const auto late = connect(*client_, "server:7000", 100ms);
  ASSERT_TRUE(untilClosed(*late));
  EXPECT_EQ(late->reason().code(), Code::kUnavailable);
  network_->resume("client");
  ASSERT_TRUE(untilFrames(*accepted_[0], 51));
  expectNumbered(*accepted_[0], 0, 51, [](std::uint64_t) { return 10U; });
  ASSERT_TRUE(untilFrames(*client, 52));
  EXPECT_EQ(client->arrived()[1].frame.slot.seq, 1000U);
}

TEST_F(Sim, APausedHostThatIsKilledHasSentNothingMore) {
  start({});
  const auto client = connect(*client_);
  send(*client, 0, 10);
  ASSERT_TRUE(untilFrames(*client, 1));
  network_->pause("client");
  send(*client, 1, 10);
  until([] { return false; }, 1s);
  network_->kill("client");
  ASSERT_TRUE(untilClosed(*accepted_[0]));
  EXPECT_EQ(accepted_[0]->arrived().size(), 1U);
  EXPECT_EQ(released_->value(), 2U);
}

TEST_F(Sim, GarbageIsAnsweredAndOthersAreServed) {
  start({});
  const auto client = connect(*client_);
  testing::Random random(5);
  for (int i = 0; i < 200; ++i) {
    std::vector<Frame> replies;
    Status closed;
    int closes = 0;
    auto bytes = testing::anyBytes(random, testing::upTo(random, 100));
    if (!bytes.empty()) bytes[0] = std::byte{0xFF};  // no such field
    network_->sendGarbage(
        "server:7000", testing::owned(bytes), [&](const Frame& frame) { replies.push_back(frame); },
        [&](const Status& reason) {
          ++closes;
          closed = reason;
        });
    ASSERT_TRUE(until([&] { return closes > 0; }));
    ASSERT_EQ(replies.size(), 1U);
    EXPECT_EQ(replies[0].kind, FrameKind::kError);
    EXPECT_TRUE(replies[0].fatal);
    EXPECT_EQ(replies[0].code, Code::kInvalidArgument);
    EXPECT_NE(replies[0].text.find("malformed frame: "), std::string::npos) << replies[0].text;
    EXPECT_EQ(closed.code(), Code::kUnavailable);
    const auto& server = accepted_.back();
    ASSERT_TRUE(untilClosed(*server));
    EXPECT_EQ(server->reason().code(), Code::kInvalidArgument);
    EXPECT_TRUE(server->arrived().empty());
  }
  send(*client, 1, 10);
  ASSERT_TRUE(untilFrames(*client, 1));
  EXPECT_EQ(client->closes(), 0);
}

TEST_F(Sim, TheOtherEndLearnsWhyAConnectionWasClosed) {
  start({});
  const auto client = connect(*client_);
  send(*client, 0, 10);
  ASSERT_TRUE(untilFrames(*client, 1));
  accepted_[0]->connection()->close(Status(Code::kInternal, "out of paper"), /*flush=*/true);
  ASSERT_TRUE(untilClosed(*client));
  EXPECT_EQ(client->reason().code(), Code::kUnavailable);
  EXPECT_EQ(client->reason().message(), "server:7000 closed the connection: out of paper");
}

TEST_F(Sim, AListenersEndCallsOnClosedBeforeItReturns) {
  start({});
  const auto client = connect(*client_);
  ASSERT_TRUE(until([&] { return !accepted_.empty(); }));
  listener_.reset();
  EXPECT_EQ(accepted_[0]->closes(), 1);
  EXPECT_EQ(accepted_[0]->reason().code(), Code::kAborted);
  ASSERT_TRUE(untilClosed(*client));
  client_.reset();
  EXPECT_EQ(client->closes(), 1);
}

TEST_F(Sim, AListenerMayEndWithinACallOfItsOwnConnection) {
  start({});
  const auto host = network_->addHost("other");
  std::unique_ptr<Listener> doomed;
  std::shared_ptr<Recorder> recorder;
  auto made = host->listen("other:1", [&](std::shared_ptr<Connection> connection) {
    recorder = std::make_shared<Recorder>([&](Recorder& self, const Frame&, const Payload&) {
      doomed.reset();
      EXPECT_EQ(self.closes(), 0) << "not from within a call";
    });
    recorder->hold(std::move(connection));
    return recorder;
  });
  ASSERT_TRUE(made.ok());
  doomed = std::move(made).value();
  const auto client = connect(*client_, "other:1");
  send(*client, 0, 10);
  ASSERT_TRUE(untilClosed(*client));
  EXPECT_EQ(recorder->closes(), 1);
  recorder->drop();
}

TEST_F(Sim, FramesOnTheirWayAreCutByACloseWithoutFlush) {
  std::size_t shortest = 1000;
  std::size_t longest = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    SimOptions options;
    options.seed = seed;
    start(options);
    const auto client = connect(*client_);
    send(*client, 0, 1);
    ASSERT_TRUE(untilFrames(*client, 1));
    for (std::uint64_t seq = 1; seq <= 20; ++seq) {
      send(*client, seq, 1);
      until([] { return false; }, 5us);
    }
    client->connection()->close({}, /*flush=*/false);
    ASSERT_TRUE(untilClosed(*accepted_[0]));
    const std::size_t count = accepted_[0]->arrived().size();
    expectNumbered(*accepted_[0], 0, count, [](std::uint64_t) { return 1U; });
    shortest = std::min(shortest, count);
    longest = std::max(longest, count);
    TearDown();
    accepted_.clear();
    made_.clear();
  }
  EXPECT_LT(shortest, 15U);
  EXPECT_GT(longest, 15U);
}

TEST(SimThreads, FaultsUnderLoadLoseNoCallback) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    SimOptions options;
    options.seed = seed;
    options.threads = 3;
    options.piece_bytes_max = 100;
    auto network = std::make_unique<SimNetwork>(options);
    auto server = network->addHost("server");
    std::mutex mutex;
    std::vector<std::shared_ptr<Recorder>> accepted;
    auto listener = server->listen("server:1", [&](std::shared_ptr<Connection> connection) {
      auto recorder = std::make_shared<Recorder>(
          [](Recorder& self, const Frame& frame, const Payload& payload) {
            if (const auto held = self.connection()) held->send(frame, payload);
          });
      recorder->hold(std::move(connection));
      const std::lock_guard lock(mutex);
      accepted.push_back(recorder);
      return recorder;
    });
    ASSERT_TRUE(listener.ok());
    std::vector<std::unique_ptr<Transport>> hosts;
    std::vector<std::shared_ptr<Recorder>> clients;
    std::vector<std::unique_ptr<transport::Timer>> timers;
    const auto released = std::make_shared<Counter>();
    for (int i = 0; i < 4; ++i) {
      hosts.push_back(network->addHost("client" + std::to_string(i)));
      clients.push_back(std::make_shared<Recorder>());
      clients[i]->hold(hosts[i]->connect("server:1", clients[i], 5s));
      timers.push_back(hosts[i]->every(100us, [client = clients[i], released](TimePoint) {
        client->connection()->send(numbered(0, 50), patternPayload(0, 50, 1, released));
      }));
    }
    for (const auto& recorder : clients) ASSERT_TRUE(recorder->waitForFrames(1));
    network->pause("client1");
    network->kill("client2");
    ASSERT_TRUE(clients[0]->waitForFrames(20));
    network->resume("client1");
    ASSERT_TRUE(clients[1]->waitForFrames(20));
    timers.clear();
    listener.value().reset();
    ASSERT_TRUE(clients[0]->waitForClose());
    ASSERT_TRUE(clients[3]->waitForClose());
    for (const auto& recorder : clients) recorder->drop();
    hosts.clear();
    EXPECT_EQ(clients[1]->closes(), 1);
    EXPECT_EQ(clients[2]->closes(), 1);
    server.reset();
    network.reset();
    EXPECT_EQ(accepted.size(), 4U);
    for (const auto& recorder : accepted) {
      recorder->drop();
      EXPECT_EQ(recorder->closes(), 1);
    }
  }
}

}  // namespace
}  // namespace reducer
