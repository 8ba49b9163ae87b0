// What frames go through if hosts have NICs: two ports for each host, which the connections share,
// and a processor.
//
// A connection's bytes leave in segments of at most a quantum. The sender's port serves its
// connections in turns of equal bytes, and so does the receiver's port with what has reached it:
// what TCP's connections come to by their windows, without the windows' errors. A segment runs
// through the receiver's port while it still leaves the sender's (the network is made of small
// packets), so a frame alone takes its bytes' time once, and one latency. What waits at the
// receiver's port is what a switch would have to hold, and is counted.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "transport/sim/fifo.h"
#include "transport/sim/sim.h"

namespace reducer::transport::sim {

struct Endpoint;
struct Host;

/// An encoded frame. The payload stays in the sender's memory until it arrives.
struct Message {
  std::vector<std::byte> header;
  Payload payload;
};

/// What comes to an endpoint, in order.
struct Item {
  enum class Kind { kAccept, kMessage, kEnd };
  Kind kind = Kind::kMessage;
  Message message;
  Status end;
};

/// A frame in a flow: what of it has still to leave, and to arrive, in bytes on the wire.
struct Parcel {
  Item item;
  std::uint32_t to_send = 0;
  std::uint32_t to_receive = 0;
};

/// One direction of a connection. It outlives the sending endpoint if that was flushed and closed.
struct Flow {
  std::shared_ptr<Endpoint> to;
  std::shared_ptr<Host> from_host;
  std::shared_ptr<Host> to_host;
  Fifo<Parcel> parcels;
  std::size_t released = 0;       ///< so many of them have been through the sender's processor
  std::size_t sending = 0;        ///< the one that leaves, or is next to
  Fifo<std::uint32_t> under_way;  ///< segments that have left, or begun to
  Fifo<std::uint32_t> reached;    ///< segments that are at the receiver's port
  TimePoint last_release;         ///< order is kept through every stage
  TimePoint last_reach;
  std::uint32_t credit[2] = {};  ///< bytes of its turn that are left, at either port
  bool queued[2] = {};           ///< waits at that port, or is served there
  bool dropped = false;          ///< nothing of it arrives any more
};

/// One direction of a NIC.
struct Port {
  double bytes_per_second = 0;
  double burst_bytes = 0;
  double tokens = 0;  ///< bytes that pass at once, when `tokens_at` was
  TimePoint tokens_at;
  std::shared_ptr<Flow> serving;
  std::uint32_t segment = 0;  ///< of it
  Fifo<std::shared_ptr<Flow>> turns;
  std::uint64_t waiting_bytes = 0;

  Duration timeOf(std::uint64_t nbytes) const {
    return Duration(
        static_cast<Duration::rep>(static_cast<double>(nbytes) * 1e9 / bytes_per_second));
  }

  /// How long a segment takes that begins now.
  Duration take(TimePoint now, std::uint64_t nbytes) {
    if (burst_bytes == 0) return timeOf(nbytes);
    const double idle = std::chrono::duration<double>(now - tokens_at).count();
    tokens = std::min(burst_bytes, tokens + idle * bytes_per_second);
    const double left = std::max(0.0, static_cast<double>(nbytes) - tokens);
    tokens = std::max(0.0, tokens - static_cast<double>(nbytes));
    const Duration time = timeOf(static_cast<std::uint64_t>(left));
    tokens_at = now + time;
    return time;
  }
};

/// Cores that take work in its order.
struct Processor {
  std::vector<TimePoint> free_at;  ///< by core

  /// When work that is asked for now is done.
  TimePoint serve(TimePoint now, Duration work) {
    auto core = std::min_element(free_at.begin(), free_at.end());
    *core = std::max(*core, now) + work;
    return *core;
  }
};

/// Of one host. `processor` may be many hosts' own, or null.
struct Nic {
  enum Side { kOut = 0, kIn = 1 };
  Port ports[2];
  std::shared_ptr<Processor> processor;
  SimHostCounters counters;
};

/// Bytes on the wire of a frame of `nbytes`.
inline std::uint32_t onWire(const NicModel& model, std::size_t nbytes) {
  const std::size_t packets =
      nbytes == 0 ? 1 : (nbytes + model.packet_bytes - 1) / model.packet_bytes;
  return static_cast<std::uint32_t>(nbytes + packets * model.header_bytes);
}

}  // namespace reducer::transport::sim
