// The model of NICs and processors in the simulated network: rates, shares, latencies, ends.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "conformance.h"
#include "transport/sim/sim.h"

namespace reducer {
namespace {

using namespace std::chrono_literals;
using testing::numbered;
using transport::Connection;
using transport::SimNetwork;
using transport::SimOptions;

constexpr double kRate = 125e6;  // 1 Gbit/s
constexpr std::size_t kChunk = 100'000;

double inSeconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

/// Counts what arrives, by sender, and when the last of it did.
struct Sink : transport::Handler {
  explicit Sink(SimNetwork& n) : network(n) {}
  void onFrame(wire::Frame frame, Payload payload) override {
    ++frames;
    nbytes += payload.nbytes();
    last_seq = frame.slot.seq;
    last = network.now();
  }
  void onClosed(const Status& reason) override { closed = reason.ok() ? 1 : 2; }

  SimNetwork& network;
  std::shared_ptr<Connection> connection;
  std::size_t frames = 0;
  std::size_t nbytes = 0;
  std::uint64_t last_seq = 0;
  int closed = 0;
  TimePoint last;
};

/// Hosts that all listen, and connections that are made before the time counts.
class Nics {
 public:
  explicit Nics(SimOptions options) : network_(options) {}
  ~Nics() {
    for (auto& sink : sinks_) sink->connection.reset();
    listeners_.clear();
    hosts_.clear();
  }

  static SimOptions options(double rate = kRate) {
    SimOptions options;
    options.nic.bytes_per_second = rate;
    options.latency_min = options.latency_max = 20us;
    return options;
  }

  void add(const std::string& name, double rate = 0) {
    hosts_[name] = network_.addHost(name, rate);
    auto listener = hosts_[name]->listen(name + ":1", [this](std::shared_ptr<Connection> c) {
      sinks_.push_back(std::make_shared<Sink>(network_));
      sinks_.back()->connection = std::move(c);
      return sinks_.back();
    });
    ASSERT_TRUE(listener.ok());
    listeners_.push_back(std::move(listener).value());
  }

  /// The near and the far end.
  std::pair<Sink*, Sink*> connect(const std::string& from, const std::string& to) {
    auto near = std::make_shared<Sink>(network_);
    near->connection = hosts_[from]->connect(to + ":1", near, 5s);
    const std::size_t before = sinks_.size();
    EXPECT_TRUE(network_.runUntil([&] { return sinks_.size() > before; }, 1s));
    Sink* const far = sinks_.back().get();
    sinks_.push_back(near);
    return {near.get(), far};
  }

  void send(Sink& from, std::size_t frames, std::size_t nbytes = kChunk) {
    const std::shared_ptr<std::byte[]> memory(new std::byte[nbytes]());
    for (std::size_t i = 0; i < frames; ++i) {
      from.connection->send(numbered(i, nbytes), Payload(Bytes(memory.get(), nbytes), memory));
    }
  }

  void runDry() {
    network_.runUntil([] { return false; }, 100s);
  }
  SimNetwork& network() { return network_; }
  void forget(const std::string& name) { hosts_.erase(name); }

 private:
  SimNetwork network_;
  std::map<std::string, std::unique_ptr<transport::Transport>> hosts_;
  std::vector<std::unique_ptr<transport::Listener>> listeners_;
  std::vector<std::shared_ptr<Sink>> sinks_;
};

TEST(Nic, OneFlowGetsTheLineRateOfItsHeaders) {
  Nics nics(Nics::options());
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  const TimePoint begin = nics.network().now();
  nics.send(*near, 1000);
  nics.runDry();
  ASSERT_EQ(far->nbytes, 1000 * kChunk);
  const double gbit = 8e-9 * static_cast<double>(far->nbytes) / inSeconds(far->last - begin);
  EXPECT_NEAR(gbit, 1448.0 / 1514, 0.002);
  const auto sent = nics.network().counters("a");
  const auto received = nics.network().counters("b");
  EXPECT_EQ(sent.sent_frames, 1000u);
  EXPECT_EQ(received.received_frames, 1000u);
  EXPECT_EQ(received.received_bytes, sent.sent_bytes);
  EXPECT_NEAR(static_cast<double>(sent.sent_bytes), 1000.0 * kChunk * 1514 / 1448, 1e6);
  EXPECT_NEAR(inSeconds(sent.sending), inSeconds(far->last - begin), 1e-3);
}

TEST(Nic, AFrameTakesOneLatencyAndItsBytesTimeOnce) {
  Nics nics(Nics::options());
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  TimePoint begin = nics.network().now();
  nics.send(*near, 1, 0);
  nics.runDry();
  EXPECT_GE(far->last - begin, 20us);
  EXPECT_LT(far->last - begin, 22us);
  begin = nics.network().now();
  nics.send(*near, 1, 1'448'000);
  nics.runDry();
  EXPECT_NEAR(inSeconds(far->last - begin), 20e-6 + 1'514'000 / kRate, 20e-6);
}

TEST(Nic, FlowsIntoOneHostShareItEqually) {
  constexpr std::size_t kSenders = 5;
  Nics nics(Nics::options());
  nics.add("sink");
  std::vector<std::pair<Sink*, Sink*>> flows;
  for (std::size_t i = 0; i < kSenders; ++i) {
    nics.add("s" + std::to_string(i));
    flows.push_back(nics.connect("s" + std::to_string(i), "sink"));
  }
  // Chunks of other sizes, the same bytes: a turn is counted in bytes.
  const TimePoint begin = nics.network().now();
  for (std::size_t i = 0; i < kSenders; ++i)
    nics.send(*flows[i].first, 400 * (i + 1), kChunk / (i + 1));
  const double whole = kSenders * 400 * kChunk * (1514.0 / 1448) / kRate;
  nics.network().runUntil([] { return false; }, std::chrono::duration_cast<Duration>(
                                                    std::chrono::duration<double>(whole / 2)));
  for (const auto& [near, far] : flows) {
    EXPECT_NEAR(static_cast<double>(far->nbytes), 200.0 * kChunk, 4.0 * kChunk);
  }
  nics.runDry();
  for (const auto& [near, far] : flows) {
    EXPECT_NEAR(inSeconds(far->last - begin), whole, 0.02 * whole);
  }
  // What five hosts can send and one cannot take has waited before it.
  EXPECT_GT(nics.network().counters("sink").waiting_bytes_max, 100 * kChunk);
}

TEST(Nic, FlowsOutOfOneHostShareItEqually) {
  Nics nics(Nics::options());
  nics.add("source");
  std::vector<std::pair<Sink*, Sink*>> flows;
  for (std::size_t i = 0; i < 4; ++i) {
    nics.add("t" + std::to_string(i));
    flows.push_back(nics.connect("source", "t" + std::to_string(i)));
    nics.send(*flows.back().first, 100);
  }
  // A frame that is handed in last does not wait for all that was handed in before.
  nics.add("small");
  const auto [near, far] = nics.connect("source", "small");
  const TimePoint begin = nics.network().now();
  nics.send(*near, 1, 100);
  nics.runDry();
  EXPECT_LT(inSeconds(far->last - begin), 5 * 70'000 / kRate);
  for (const auto& flow : flows) {
    EXPECT_EQ(flow.second->frames, 100u);
    EXPECT_NEAR(inSeconds(flow.second->last - begin), 400 * kChunk * (1514.0 / 1448) / kRate, 4e-3);
  }
}

TEST(Nic, BothDirectionsAreFreeOfEachOther) {
  Nics nics(Nics::options());
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  const TimePoint begin = nics.network().now();
  nics.send(*near, 100);
  nics.send(*far, 100);
  nics.runDry();
  const double alone = 100 * kChunk * (1514.0 / 1448) / kRate;
  EXPECT_NEAR(inSeconds(far->last - begin), alone, 0.01 * alone);
  EXPECT_NEAR(inSeconds(near->last - begin), alone, 0.01 * alone);
}

TEST(Nic, TheSlowerOfTwoNicsIsTheLimitAndDoesNotHoldUpOthers) {
  Nics nics(Nics::options());
  nics.add("slow1", kRate / 10);
  nics.add("slow2", kRate / 10);
  nics.add("fast");
  const auto one = nics.connect("slow1", "fast");
  const auto two = nics.connect("slow2", "fast");
  const TimePoint begin = nics.network().now();
  nics.send(*one.first, 100);
  nics.send(*two.first, 100);
  nics.runDry();
  const double alone = 100 * kChunk * (1514.0 / 1448) / (kRate / 10);
  EXPECT_NEAR(inSeconds(one.second->last - begin), alone, 0.01 * alone);
  EXPECT_NEAR(inSeconds(two.second->last - begin), alone, 0.01 * alone);
}

TEST(Nic, ABurstPassesAtOnceAfterAPause) {
  SimOptions options = Nics::options();
  options.nic.burst_bytes = 128 << 10;
  Nics nics(options);
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  nics.runDry();
  TimePoint begin = nics.network().now();
  nics.send(*near, 1);
  nics.runDry();
  EXPECT_LT(far->last - begin, 25us);
  begin = nics.network().now();
  nics.send(*near, 100);
  nics.runDry();
  EXPECT_NEAR(inSeconds(far->last - begin), (100 * kChunk * (1514.0 / 1448) - (128 << 10)) / kRate,
              1e-3);
}

TEST(Nic, AProcessorsCoresAreShared) {
  for (const bool shared : {false, true}) {
    SCOPED_TRACE(shared);
    SimOptions options = Nics::options(kRate * 1000);
    options.processor.cores = 1;
    options.processor.shared = shared;
    options.processor.per_frame = 100us;
    options.processor.ns_per_byte = 1;
    Nics nics(options);
    nics.add("a");
    nics.add("b");
    const auto [near, far] = nics.connect("a", "b");
    const TimePoint begin = nics.network().now();
    nics.send(*near, 100);
    nics.runDry();
    // A frame of 100 kB costs 200 us at either end: one after the other, or both at once.
    const double each = 200e-6 * (shared ? 2 : 1);
    EXPECT_NEAR(inSeconds(far->last - begin), 100 * each, 3 * each);
    EXPECT_NEAR(inSeconds(nics.network().counters("b").working), 100 * 200e-6, 1e-3);
  }
}

TEST(Nic, WhatWasSentBeforeAFlushedCloseArrives) {
  Nics nics(Nics::options());
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  nics.send(*near, 50);
  near->connection->close(Status(), /*flush=*/true);
  nics.network().runUntil([near = near] { return near->closed != 0; }, 1s);
  nics.forget("a");  // the process ends, its bytes are on their way
  nics.runDry();
  EXPECT_EQ(far->frames, 50u);
  EXPECT_EQ(far->last_seq, 49u);
  EXPECT_EQ(far->closed, 1);
}

TEST(Nic, WhatAKilledHostHadNotSentIsLostAndOthersGoOn) {
  Nics nics(Nics::options());
  nics.add("victim");
  nics.add("other");
  nics.add("sink");
  const auto lost = nics.connect("victim", "sink");
  const auto into = nics.connect("sink", "victim");
  const auto kept = nics.connect("other", "sink");
  nics.send(*lost.first, 100);
  nics.send(*into.first, 100);
  nics.send(*kept.first, 100);
  nics.network().runUntil([&] { return lost.second->frames == 20; }, 1s);
  nics.network().kill("victim");
  nics.runDry();
  EXPECT_LT(lost.second->frames, 25u);
  EXPECT_EQ(lost.second->closed, 2);
  EXPECT_EQ(into.first->closed, 2);
  EXPECT_EQ(kept.second->frames, 100u);
  EXPECT_EQ(kept.second->closed, 0);
}

TEST(Nic, HeldFramesOfAPausedHostComeWhenItGoesOn) {
  Nics nics(Nics::options());
  nics.add("a");
  nics.add("b");
  const auto [near, far] = nics.connect("a", "b");
  nics.send(*near, 20);
  nics.network().pause("b");
  nics.runDry();
  EXPECT_EQ(far->frames, 0u);
  nics.network().resume("b");
  nics.runDry();
  EXPECT_EQ(far->frames, 20u);
}

TEST(Nic, WithoutCopiesPayloadsAreTheSendersMemory) {
  for (const bool copies : {true, false}) {
    SimOptions options = Nics::options();
    options.copies = copies;
    SimNetwork network(options);
    const auto a = network.addHost("a");
    const auto b = network.addHost("b");
    const std::byte* got = nullptr;
    struct Looker : transport::Handler {
      explicit Looker(const std::byte*& g) : got(g) {}
      void onFrame(wire::Frame frame, Payload payload) override {
        got = payload.pieces()[0].data();
      }
      void onClosed(const Status& reason) override {}
      const std::byte*& got;
    };
    std::shared_ptr<Connection> accepted;
    auto listener = b->listen("b:1", [&](std::shared_ptr<Connection> connection) {
      accepted = std::move(connection);
      return std::make_shared<Looker>(got);
    });
    ASSERT_TRUE(listener.ok());
    const auto connection = a->connect("b:1", std::make_shared<Looker>(got), 1s);
    const std::shared_ptr<std::byte[]> memory(new std::byte[kChunk]());
    connection->send(numbered(0, kChunk), Payload(Bytes(memory.get(), kChunk), memory));
    ASSERT_TRUE(network.runUntil([&] { return got != nullptr; }, 1s));
    EXPECT_EQ(got == memory.get(), !copies);
  }
}

}  // namespace
}  // namespace reducer
