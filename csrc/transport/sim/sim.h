// A network inside one process: every fault and every delay comes from a seed, so a failure can be
// replayed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "transport/transport.h"

namespace reducer::transport {

struct SimOptions {
  std::uint64_t seed = 1;
  /// 0: nothing moves but in SimNetwork::step(), on the caller's thread, in virtual time
  /// (deterministic). n > 0: n threads deliver at once, in real time (for ThreadSanitizer and the
  /// conformance suite).
  int threads = 0;
  Duration latency_min =
      std::chrono::microseconds(10);  ///< each frame's delay is drawn between the two;
  Duration latency_max =
      std::chrono::microseconds(200);  ///< order is kept within a connection's direction only
  /// Payloads arrive cut into random pieces of 1 to this many bytes at random alignments (0: one
  /// piece).
  std::size_t piece_bytes_max = 0;
};

/// All simulated hosts and what lies between them. Outlives the transports that it makes.
/// Frames really are encoded and decoded (wire/), so what cannot be written cannot be sent.
class SimNetwork {
 public:
  explicit SimNetwork(SimOptions options);
  ~SimNetwork();
  SimNetwork(const SimNetwork&) = delete;
  SimNetwork& operator=(const SimNetwork&) = delete;

  /// A process on a host of its own; listens at "name:port".
  std::unique_ptr<Transport> addHost(const std::string& name);

  /// Virtual time: does the next event (frame, close, timer, posted task). False if there is none.
  bool step();
  /// Virtual time: steps until `done()` or until `limit` of virtual time has passed. True if done.
  bool runUntil(const std::function<bool()>& done, Duration limit);
  TimePoint now() const;

  /// kill -9: connections of this host end at the other side with kUnavailable (after a latency),
  /// nothing is delivered to it any more, its timers stop, connects to it go unanswered.
  /// (Destroying its transport calls onClosed of what it left open and runs what was posted, so
  /// that a test can clean up.) Its name may be used again.
  void kill(const std::string& name);
  /// SIGSTOP / cable out: what is sent to or from it is held (nothing lost) until resume().
  void pause(const std::string& name);
  void resume(const std::string& name);

  /// Sends raw bytes instead of a frame on a new connection to `address` as a broken client would;
  /// `reply` gets each frame that comes back, and `closed` the end.
  void sendGarbage(const std::string& address, Payload bytes,
                   std::function<void(const wire::Frame&)> reply,
                   std::function<void(const Status&)> closed);

 private:
  friend class SimTransport;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace reducer::transport
