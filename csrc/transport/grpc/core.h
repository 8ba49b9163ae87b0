// What all connections of a transport share: the completion queue and its threads, the server, the
// dialer.
#pragma once

#include <grpcpp/completion_queue.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "common/clock.h"
#include "reducer.grpc.pb.h"
#include "transport/grpc/factory.h"
#include "transport/net/dialer.h"
#include "transport/transport.h"

namespace reducer::transport::grpc_detail {

using net::Dialer;
using net::Fd;
using net::SocketAddress;

class Stream;
class TimerState;

/// Payload-agnostic Data service: the generated one, so that reflection lists it, with raw bytes
/// both ways.
using RawDataService = v1::Data::WithRawMethod_Exchange<v1::Data::Service>;

struct ListenerState {
  std::string address;
  Acceptor acceptor;
  std::uint64_t dialer_id = 0;  // 0: another transport accepts for it
  std::atomic<bool> closed{false};
};

inline void* tagOf(GrpcTag& tag) { return &tag; }

/// For gRPC's timers, on the clock that steady_clock reads.
gpr_timespec deadlineAfter(Duration wait);

/// Thread safety: every method, from any thread.
class Core {
 public:
  explicit Core(const GrpcOptions& options);
  /// Cancels everything, waits until every onClosed was called, and joins the threads. Not from a
  /// transport thread.
  ~Core();

  bool orphaned() const noexcept;
  grpc::ServerCompletionQueue& queue() { return *queue_; }
  Dialer& dialer() { return *dialer_; }
  RawDataService& service() { return service_; }

  Result<std::shared_ptr<ListenerState>> listen(const std::string& address, Acceptor acceptor);
  /// A listener that accepts nothing by itself: take() gives it connections.
  std::shared_ptr<ListenerState> receive(std::string address, Acceptor acceptor);
  void take(Fd fd, const SocketAddress& peer, std::shared_ptr<net::Guest> guest,
            const std::shared_ptr<ListenerState>& listener);
  /// Closes its connections; none of its calls is running afterwards.
  void unlisten(const std::shared_ptr<ListenerState>& listener);
  std::shared_ptr<Stream> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                  Duration timeout);
  void post(std::function<void()> task);

  /// The stream is over.
  void forget(const std::shared_ptr<Stream>& stream);
  void keep(std::shared_ptr<TimerState> timer);
  void forget(const std::shared_ptr<TimerState>& timer);

  /// Asks the server for its next stream.
  void acceptNext();

  struct Origin {
    std::string peer;
    std::shared_ptr<ListenerState> listener;
    std::shared_ptr<net::Guest> guest;  // null: there is no place for it
  };
  /// Who is behind a new stream whose peer gRPC calls "fd:N", or with TLS "ipv4:HOST:PORT". The
  /// connection's place among the guests is its first stream's; each further one has its own.
  Origin originOf(const std::string& grpc_peer);

  /// A channel of its own for a socket, or with TLS for one that gRPC makes.
  std::shared_ptr<grpc::Channel> channelTo(const std::string& address, Fd fd);
  const TlsFiles& tls() const { return tls_; }

 private:
  struct Taken {
    Origin of_first;
    bool has_stream = false;
  };

  const std::uint64_t generation_;
  const TlsFiles tls_;
  std::shared_ptr<grpc::ChannelCredentials> credentials_;                     // with TLS
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;  // likewise
  RawDataService service_;
  // One for all threads: gRPC has one set of sockets per process, whose events any thread that
  // waits may get; with a queue for each thread most of them would have to be handed to another one
  // (10% more processor time).
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Dialer> dialer_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // no new streams
  bool stopped_ = false;   // nothing new on the queue
  std::unordered_set<std::shared_ptr<Stream>> streams_;
  std::unordered_set<std::shared_ptr<TimerState>> timers_;
  // By gRPC's name: never more than descriptors; with TLS, those of which no stream has come, and
  // the listener of all others.
  std::unordered_map<std::string, Taken> origins_;
  std::shared_ptr<ListenerState> tls_listener_;
  std::vector<std::thread> threads_;
};

}  // namespace reducer::transport::grpc_detail
