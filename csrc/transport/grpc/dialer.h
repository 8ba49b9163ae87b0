// The thread that accepts and makes TCP connections. It sleeps unless one comes or goes; gRPC moves
// the bytes.
//
// Why not gRPC's own listener and connector: with sockets of our own, "connection refused" and
// "address in use" reach the user, each connection may have its congestion control, a dead host is
// noticed by the kernel, and one gRPC server (so one set of completion queues) serves every
// listener and every outgoing connection.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "transport/grpc/socket.h"

namespace reducer::transport::grpc_detail {

/// Who wants a connection. Called from the dialer's thread, without locks.
class Caller {
 public:
  virtual ~Caller() = default;
  virtual void onSocket(Fd fd) = 0;
  /// The deadline passed; the dialer has forgotten the caller.
  virtual void onExpired(const std::string& last_error) = 0;
};

/// Thread safety: every method, from any thread.
class Dialer {
 public:
  explicit Dialer(std::string congestion_control);
  ~Dialer();
  /// Joins the thread; nobody is called afterwards.
  void stop();
  const std::string& congestionControl() const { return congestion_control_; }

  using OnAccept = std::function<void(Fd fd, const SocketAddress& peer)>;
  /// Returns a number for stopListening.
  std::uint64_t startListening(Fd fd, OnAccept on_accept);
  /// No call of its `on_accept` is running afterwards.
  void stopListening(std::uint64_t id);

  /// Gives the caller a socket when there is a connection; goes on if retry() says that it was of
  /// no use, until `timeout`.
  void dial(std::shared_ptr<Caller> caller, const std::string& address, Duration timeout);
  void retry(const Caller* caller, const std::string& why);
  /// True if the caller was known: neither onSocket nor onExpired will be called (but one onSocket
  /// may be under way).
  bool forget(const Caller* caller);

 private:
  struct Listening {
    std::uint64_t id = 0;
    Fd fd;
    std::shared_ptr<OnAccept> on_accept;
  };
  struct Call {
    enum class State { kWaiting, kConnecting, kHandedOver };
    std::shared_ptr<Caller> caller;
    std::string address;
    TimePoint deadline;
    TimePoint retry_at;
    Duration backoff{};
    State state = State::kWaiting;
    std::vector<SocketAddress> candidates;  // of the name, not yet tried
    Fd fd;
    std::string last_error;
  };

  void work();
  void wake();
  Duration untilNext(TimePoint now);
  void acceptAll(std::unique_lock<std::mutex>& lock, std::uint64_t id, int fd);
  void attempt(std::unique_lock<std::mutex>& lock, std::size_t index, TimePoint now);
  void decided(std::unique_lock<std::mutex>& lock, int fd);
  void failed(Call& call, std::string why, TimePoint now);
  bool expire(std::unique_lock<std::mutex>& lock, TimePoint now);

  const std::string congestion_control_;
  Fd wake_fd_;
  std::mutex mutex_;
  std::condition_variable accepted_;
  std::vector<Listening> listening_;
  std::vector<Call> calls_;
  std::uint64_t next_id_ = 1;
  std::uint64_t accepting_ = 0;  // the listener whose on_accept runs
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace reducer::transport::grpc_detail
