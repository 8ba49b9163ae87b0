// How frames travel. Nothing above this line knows what carries them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "common/clock.h"
#include "common/payload.h"
#include "common/status.h"
#include "wire/frame.h"

namespace reducer::transport {

/// One end of an ordered, reliable, bidirectional stream of frames.
///
/// Thread safety: every method, from any thread, also from within a handler. The connection is
/// closed when the other end closes it, when it fails, or by close(); dropping the last reference
/// closes it too.
class Connection {
 public:
  virtual ~Connection() = default;

  /// Queues a frame and returns at once. The payload is released when its bytes have left this
  /// process' memory or the connection is gone. After the close, frames are dropped in silence:
  /// onClosed tells.
  virtual void send(const wire::Frame& frame, Payload payload) = 0;

  /// Sends what is queued if `flush`, then closes. Idempotent. The handler's onClosed follows, from
  /// another thread or later from this one, never from within this call.
  virtual void close(const Status& reason, bool flush) = 0;

  /// The other end's address, for messages.
  virtual std::string peer() const = 0;

  /// The peer has said who it is: until then it counts among the strangers, of which a transport
  /// takes only so many, and its messages have to be small. From here on they have at most
  /// `message_bytes`.
  virtual void admit(std::size_t message_bytes) { (void)message_bytes; }
};

/// What happens on a connection. Calls for one connection come one at a time, in order; those of
/// different connections may come at once, from the transport's threads. A handler must not block.
class Handler {
 public:
  virtual ~Handler() = default;
  virtual void onFrame(wire::Frame frame, Payload payload) = 0;
  /// Exactly once, last. Ok: the other end closed in good order, or close(Ok) was called here.
  virtual void onClosed(const Status& reason) = 0;
};

/// Called for every accepted connection; returns the handler for it. The connection may be used at
/// once.
using Acceptor = std::function<std::shared_ptr<Handler>(std::shared_ptr<Connection>)>;

class Listener {
 public:
  virtual ~Listener() =
      default;  ///< closes every accepted connection; none of its calls is running afterwards
  virtual std::string address() const = 0;  ///< "host:port" with the real port
  /// Connections that were closed before they came to the acceptor.
  virtual std::uint64_t refused() const { return 0; }
};

/// Cancels its timer when destroyed (a call in progress on another thread is waited for).
class Timer {
 public:
  virtual ~Timer() = default;
};

/// Lets a thread that waits move frames itself, so that none has to be woken for it and wake it in
/// turn. Thread safety: every method, from any thread. Outlives its transport, and does nothing
/// then.
class Helper {
 public:
  virtual ~Helper() = default;
  /// Serves the transport's events on this thread, handlers, timers and tasks as well, until
  /// `ended()`, `until`, or the transport's end; may return at once (while another thread helps).
  virtual void help(const std::function<bool()>& ended, TimePoint until) = 0;
  /// To be called after an `ended()` has turned true on a thread that may not be the helping one.
  virtual void wake() = 0;
};

/// A carrier of frames with its threads and its clock. Destroy it last: listeners and connections
/// made by it must be gone, or are closed by it; its destructor joins its threads.
class Transport {
 public:
  virtual ~Transport() = default;

  /// Accepts connections at "host:port" (port 0 picks one). kUnavailable with the reason if it
  /// cannot.
  virtual Result<std::unique_ptr<Listener>> listen(const std::string& address,
                                                   Acceptor acceptor) = 0;

  /// Starts connecting and returns at once; frames may be sent and are queued. If there is no
  /// answer until `timeout` (it keeps trying: the other end may start later) onClosed(kUnavailable)
  /// names the address.
  virtual std::shared_ptr<Connection> connect(const std::string& address,
                                              std::shared_ptr<Handler> handler,
                                              Duration timeout) = 0;

  /// Calls `tick` about every `interval`, one call at a time, from a transport thread.
  virtual std::unique_ptr<Timer> every(Duration interval,
                                       std::function<void(TimePoint now)> tick) = 0;

  /// The clock of this transport: real, or the simulation's.
  virtual TimePoint now() const = 0;

  /// Runs `task` soon on a transport thread (so that a caller need not do long work itself).
  virtual void post(std::function<void()> task) = 0;

  /// Bytes of the buffers that received payloads keep from being used again; 0 where that is not
  /// known. They may be more than the payloads' own.
  virtual std::size_t bufferedBytes() const { return 0; }

  /// Null where threads that wait cannot help.
  virtual std::shared_ptr<Helper> helper() { return nullptr; }
};

}  // namespace reducer::transport
