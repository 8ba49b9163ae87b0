// The thread that accepts and makes TCP connections, and finds out what they carry. It sleeps
// unless one comes or goes; the transports move the bytes.
//
// Why not gRPC's own listener and connector: with sockets of our own, "connection refused" and
// "address in use" reach the user, each connection may have its congestion control, a dead host is
// noticed by the kernel, one port serves both transports, and one gRPC server (so one set of
// completion queues) serves every listener and every outgoing connection.
#pragma once

#include <poll.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "transport/net/greeting.h"
#include "transport/net/guests.h"
#include "transport/net/socket.h"

namespace reducer::transport::net {

/// Who wants a connection. Called from the dialer's thread, without locks.
class Caller {
 public:
  virtual ~Caller() = default;
  virtual void onSocket(Fd fd) = 0;
  /// There was a connection, but its other end wants TLS. The dialer has forgotten the caller.
  virtual void onTlsWanted() = 0;
  /// There was a connection, but its other end speaks something else. The dialer waits for
  /// retry() or forget().
  virtual void onStranger(const std::string& why) { (void)why; }
  /// The deadline passed; the dialer has forgotten the caller.
  virtual void onExpired(const std::string& last_error) = 0;
};

/// What is said of an address that did not answer in time. kUnavailable.
Status noAnswer(const std::string& address, Duration timeout, const std::string& last_error);

/// What is said of an address that wants TLS, where there is none here. kInvalidArgument.
Status tlsWanted(const std::string& address);

/// Thread safety: every method, from any thread.
class Dialer {
 public:
  explicit Dialer(std::string congestion_control);
  ~Dialer();
  /// Joins the thread; nobody is called afterwards.
  void stop();
  const std::string& congestionControl() const { return congestion_control_; }
  /// Who was accepted, and has not said who it is.
  Guests& guests() { return *guests_; }

  /// `guest` leaves when the peer has said who it is.
  using OnAccept = std::function<void(Fd fd, const SocketAddress& peer, Speech speech,
                                      std::shared_ptr<Guest> guest)>;
  /// Returns a number for stopListening. Connections are handed on once their first bytes have
  /// come: those that begin otherwise, or with nothing for too long, are closed, and so are those
  /// for which there is no place among the guests.
  std::uint64_t startListening(Fd fd, OnAccept on_accept, Hearing hearing);
  /// Connections that were closed before they were handed on.
  std::uint64_t refused() const { return guests_->refused(); }
  /// No call of its `on_accept` is running afterwards.
  void stopListening(std::uint64_t id);

  enum class Way {
    kSocket,   ///< a connection
    kGreeted,  ///< a connection whose other end has answered the greeting
    kCaller,   ///< the first time no socket: the caller connects by itself; after a retry, kSocket
  };
  /// Gives the caller a socket when there is a connection; goes on if retry() says that it was of
  /// no use, until `timeout`.
  void dial(std::shared_ptr<Caller> caller, const std::string& address, Duration timeout, Way way);
  void retry(const Caller* caller, const std::string& why);
  /// True if the caller was known: neither onSocket nor onExpired will be called (but one onSocket
  /// may be under way).
  bool forget(const Caller* caller);

 private:
  struct Listening {
    std::uint64_t id = 0;
    Fd fd;
    std::shared_ptr<OnAccept> on_accept;
    Hearing hearing{};
  };
  struct Arrival {  // accepted, and has not said what it carries
    Fd fd;
    SocketAddress peer;
    std::shared_ptr<Guest> guest;
    std::uint64_t listener = 0;
    TimePoint deadline;
  };
  struct Watched {  // a guest whose connection gRPC has: this tells of its end
    Fd fd;
    std::shared_ptr<Guest> guest;
  };
  struct Call {
    enum class State { kWaiting, kConnecting, kGreeting, kHandedOver };
    std::shared_ptr<Caller> caller;
    std::string address;
    TimePoint deadline;
    TimePoint retry_at;
    TimePoint answer_by;  // to the greeting
    Duration backoff{};
    Way way{};
    int resets = 0;
    State state = State::kWaiting;
    std::vector<SocketAddress> candidates;  // of the name, not yet tried
    Fd fd;
    std::string last_error;
  };

  void work();
  void wake();
  Duration untilNext(TimePoint now);
  void acceptAll(std::unique_lock<std::mutex>& lock, std::uint64_t id, int fd);
  void handOn(std::unique_lock<std::mutex>& lock, const Listening& one, Arrival arrival,
              Speech speech);
  void spoke(std::unique_lock<std::mutex>& lock, int fd);
  void attempt(std::unique_lock<std::mutex>& lock, std::size_t index, TimePoint now);
  void decided(std::unique_lock<std::mutex>& lock, int fd);
  void connected(std::unique_lock<std::mutex>& lock, Call& call);
  void answered(std::unique_lock<std::mutex>& lock, Call& call);
  void estranged(std::unique_lock<std::mutex>& lock, Call& call, const std::string& why);
  void failed(Call& call, std::string why, TimePoint now);
  bool expire(std::unique_lock<std::mutex>& lock, TimePoint now);
  void tlsWanted(std::unique_lock<std::mutex>& lock, Call& call);
  void listPolled(std::vector<pollfd>& polled, std::vector<std::uint64_t>& listeners) const;

  const std::string congestion_control_;
  const std::shared_ptr<Guests> guests_ = Guests::forThisProcess();
  Fd wake_fd_;
  std::mutex mutex_;
  std::condition_variable accepted_;
  std::vector<Listening> listening_;
  std::vector<Arrival> arrivals_;
  std::vector<Watched> watched_;
  std::vector<Call> calls_;
  std::uint64_t next_id_ = 1;
  std::uint64_t accepting_ = 0;  // the listener whose on_accept runs
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace reducer::transport::net
