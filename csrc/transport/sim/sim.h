// A network inside one process: every fault and every delay comes from a seed, so a failure can be
// replayed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "transport/transport.h"

namespace reducer::transport {

/// A host's NIC, full duplex. Its connections share each direction of it equally.
struct NicModel {
  double bytes_per_second =
      0;  ///< each way, headers included; 0: frames take a latency and no more
  /// A packet has so many bytes of a frame, and these of Ethernet, IP and TCP: of a line of
  /// 1 Gbit/s, 0.956 carry frames.
  std::size_t packet_bytes = 1448;
  std::size_t header_bytes = 66;
  std::size_t quantum_bytes = std::size_t{64} << 10;  ///< of a connection's turn
  /// Not 0: a token bucket, as an emulated NIC has. After a pause so many bytes pass at once, and
  /// a segment is at the receiver's port when it has left the sender's as a whole.
  std::size_t burst_bytes = 0;
};

/// A host's processor: it works on each frame before it leaves and before the handler gets it, one
/// frame after the other on each core. Only with NICs.
struct ProcessorModel {
  int cores = 0;        ///< 0: work takes no time
  bool shared = false;  ///< all hosts have the cores together, as emulated hosts do
  Duration per_frame = Duration::zero();
  double ns_per_byte = 0;
};

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
  /// One of so many payloads arrives with a bit turned over; 0: none.
  std::uint64_t damages_one_in = 0;
  /// False: payloads arrive as references to the sender's memory, for runs too large to copy.
  bool copies = true;
  NicModel nic;  ///< virtual time only
  ProcessorModel processor;
};

/// What a host's NIC and processor have done so far (all 0 without NICs), and its connections.
struct SimHostCounters {
  std::uint64_t sent_bytes = 0;  ///< on the wire, headers included
  std::uint64_t received_bytes = 0;
  std::uint64_t sent_frames = 0;
  std::uint64_t received_frames = 0;
  Duration sending{};    ///< time for which its NIC sent
  Duration receiving{};  ///< time for which its NIC received
  Duration working{};    ///< core time
  /// Most bytes that had reached its port and waited for their turn: a switch's buffer.
  std::uint64_t waiting_bytes_max = 0;
  std::size_t connections = 0;
};

/// All simulated hosts and what lies between them. Outlives the transports that it makes.
/// Frames really are encoded and decoded (wire/), so what cannot be written cannot be sent.
class SimNetwork {
 public:
  explicit SimNetwork(SimOptions options);
  ~SimNetwork();
  SimNetwork(const SimNetwork&) = delete;
  SimNetwork& operator=(const SimNetwork&) = delete;

  /// A process on a host of its own; listens at "name:port". `bytes_per_second` is its NIC's rate,
  /// 0: the options'.
  std::unique_ptr<Transport> addHost(const std::string& name, double bytes_per_second = 0);

  /// Virtual time: does the next event (frame, close, timer, posted task). False if there is none.
  bool step();
  /// Virtual time: steps until `done()` or until `limit` of virtual time has passed. True if done.
  bool runUntil(const std::function<bool()>& done, Duration limit);
  TimePoint now() const;

  /// Of a host that was added and not killed.
  SimHostCounters counters(const std::string& name) const;

  /// kill -9: connections of this host end at the other side with kUnavailable (after a latency),
  /// nothing is delivered to it any more, its timers stop, connects to it go unanswered.
  /// (Destroying its transport calls onClosed of what it left open and runs what was posted, so
  /// that a test can clean up.) Its name may be used again.
  void kill(const std::string& name);
  /// SIGSTOP / cable out: what is sent to or from it is held (nothing lost) until resume().
  void pause(const std::string& name);
  void resume(const std::string& name);
  /// Breaks every connection between two hosts, as a reset does: both ends learn of it, and part of
  /// what was on its way is gone.
  void sever(const std::string& one, const std::string& other);
  /// A cable out between two hosts: what is sent between them is held (nothing lost), and connects
  /// go unanswered, until mend().
  void cut(const std::string& one, const std::string& other);
  void mend(const std::string& one, const std::string& other);
  /// Whoever dials this name from now on reaches that host, as a resolver would have it.
  void name(const std::string& name, const std::string& host);
  /// What is sent to or from the host takes so much longer from now on.
  void slow(const std::string& name, Duration extra);

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
