// Any valid frames in any order on a few connections: a reducer must neither crash nor hold more
// than it promised, and nothing when all have gone. (Bytes that are no frames are frame_fuzz's.)
#include <fuzzer/FuzzedDataProvider.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "common/limits.h"
#include "server/server.h"
#include "transport/sim/sim.h"

namespace {

using namespace reducer;  // NOLINT(google-build-using-namespace)
using wire::Frame;
using wire::FrameKind;

constexpr std::size_t kConnections = 4;
constexpr std::size_t kMemoryLimit = 5 << 20;
// Results are counted as they are made, in place of what was pushed for them.
constexpr std::size_t kResultsUnderWay = 64 << 10;

void require(bool condition) {
  if (!condition) std::abort();
}

/// A worker's end, which asks the reducer nothing and bears what it says.
class Ear final : public transport::Handler {
 public:
  void onFrame(Frame /*frame*/, Payload /*payload*/) override {}
  void onClosed(const Status& /*reason*/) override {}
};

wire::Hello anyHello(FuzzedDataProvider& in) {
  wire::Hello hello;
  hello.version = in.ConsumeBool() ? kProtocolVersion : in.ConsumeIntegral<std::uint32_t>();
  hello.job = std::string(in.ConsumeIntegralInRange(0, 8) == 0 ? 5 : kJobBytes,
                          static_cast<char>('a' + in.ConsumeIntegralInRange(0, 1)));
  hello.group = "g";
  hello.world_size = in.ConsumeIntegralInRange(1, 4);
  hello.rank = in.ConsumeIntegralInRange(0, hello.world_size - 1);
  hello.host = "h";
  hello.window_bytes =
      in.ConsumeBool() ? 4096 : in.ConsumeIntegralInRange<std::uint64_t>(0, 1 << 24);
  hello.heartbeat_ms = in.ConsumeBool() ? 0 : in.ConsumeIntegralInRange<std::uint32_t>(0, 2000);
  hello.failover = in.ConsumeBool();
  if (in.ConsumeBool()) {
    for (Rank rank = 0; rank < hello.world_size; ++rank) {
      hello.hosts.push_back(rank == 0 ? 0 : in.ConsumeBool() ? hello.hosts.back() : rank);
    }
  }
  return hello;
}

Frame anyFrame(FuzzedDataProvider& in) {
  constexpr FrameKind kKinds[] = {
      FrameKind::kPush,    FrameKind::kPush,  FrameKind::kPush,   FrameKind::kPush,
      FrameKind::kHello,   FrameKind::kHello, FrameKind::kCancel, FrameKind::kSettled,
      FrameKind::kResend,  FrameKind::kLost,  FrameKind::kBack,   FrameKind::kHold,
      FrameKind::kBeat,    FrameKind::kBye,   FrameKind::kEpoch,  FrameKind::kResult,
      FrameKind::kWelcome, FrameKind::kError, FrameKind::kLate};
  Frame frame;
  frame.kind = in.PickValueInArray(kKinds);
  if (frame.kind == FrameKind::kHello) frame.hello = anyHello(in);
  const std::uint64_t lanes[] = {0,
                                 0,
                                 0,
                                 1,
                                 2,
                                 std::uint64_t{1} << 62,
                                 std::uint64_t{1} << 63,
                                 in.ConsumeIntegral<std::uint64_t>()};
  frame.slot.lane = in.PickValueInArray(lanes);
  frame.slot.seq = in.ConsumeIntegralInRange<std::uint64_t>(0, 3);
  frame.slot.chunk = in.ConsumeIntegralInRange<std::uint32_t>(0, 2);
  frame.epoch = in.ConsumeIntegralInRange<std::uint32_t>(0, 3);
  frame.acked = in.ConsumeIntegralInRange<std::uint64_t>(0, 3) << 28;
  frame.call.collective =
      static_cast<Collective>(in.ConsumeIntegralInRange(1, static_cast<int>(kLastCollective)));
  frame.call.op = static_cast<ReduceOp>(in.ConsumeIntegralInRange(0, 8));
  frame.call.dtype =
      static_cast<DataType>(in.ConsumeIntegralInRange(1, static_cast<int>(kLastDataType)));
  frame.call.count = in.ConsumeIntegralInRange<std::uint64_t>(0, 64);
  const Rank ranks[] = {kAllRanks, kAllRanks, 0, 1, 3, 7};
  frame.call.root = in.PickValueInArray(ranks);
  if (frame.kind == FrameKind::kPush || frame.kind == FrameKind::kResult) {
    frame.pusher = in.PickValueInArray(ranks);
    frame.puller = in.PickValueInArray(ranks);
    frame.again = frame.kind == FrameKind::kPush && in.ConsumeIntegralInRange(0, 3) == 0;
    frame.length = 16 * in.ConsumeIntegralInRange<std::uint64_t>(0, 300);
    frame.timeout_ms = in.ConsumeIntegralInRange<std::uint32_t>(0, 1000);
    frame.has_checksum = in.ConsumeIntegralInRange(0, 7) == 0;
    frame.checksum = in.ConsumeIntegral<std::uint8_t>();
  }
  if (frame.kind == FrameKind::kLost || frame.kind == FrameKind::kBack) {
    frame.owners = {in.ConsumeIntegralInRange<std::uint32_t>(0, 6)};
  }
  if (frame.kind == FrameKind::kCancel) frame.text = in.ConsumeRandomLengthString(20);
  return frame;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  transport::SimOptions options;
  options.seed = in.ConsumeIntegral<std::uint8_t>();
  transport::SimNetwork network(options);
  const auto host = network.addHost("reducer");
  const auto guest = network.addHost("guest");
  server::ServerOptions settings;
  settings.standalone = in.ConsumeBool();
  settings.memory_limit_bytes = kMemoryLimit;
  settings.shards = 3;
  settings.host = "reducer:1";
  server::ReducerServer server(*host, settings);
  require(server.listen("reducer:7000").ok());

  const auto ear = std::make_shared<Ear>();
  std::vector<std::shared_ptr<transport::Connection>> connections(kConnections);
  for (int i = 0; i < 200 && in.remaining_bytes() > 0; ++i) {
    auto& connection = connections[in.ConsumeIntegralInRange<std::size_t>(0, kConnections - 1)];
    switch (in.ConsumeIntegralInRange(0, 15)) {
      case 0:
        connection.reset();  // closes it
        break;
      case 1:
        network.runUntil([] { return false; },
                         std::chrono::milliseconds(in.ConsumeIntegralInRange(1, 1500)));
        break;
      default: {
        if (!connection) connection = guest->connect("reducer:7000", ear, std::chrono::seconds(1));
        const Frame frame = anyFrame(in);
        const bool pays = (frame.kind == FrameKind::kPush || frame.kind == FrameKind::kResult) &&
                          in.ConsumeBool();
        const auto bytes = std::make_shared<std::vector<std::byte>>(pays ? frame.length : 0);
        connection->send(frame, Payload(Bytes(*bytes), bytes));
      }
    }
    if (in.ConsumeBool()) {
      network.runUntil([] { return false; }, std::chrono::milliseconds(1));
      const server::ServerStats stats = server.stats();
      require(stats.taken_bytes <= kMemoryLimit + kResultsUnderWay);
      require(stats.reserved_bytes <= kMemoryLimit);
    }
  }
  connections.clear();
  network.runUntil([] { return false; }, std::chrono::seconds(15));
  const server::ServerStats stats = server.stats();
  require(stats.connections == 0 && stats.groups.empty());
  require(stats.held_bytes == 0 && stats.slots_open == 0 && stats.reserved_bytes == 0);
  return 0;
}
