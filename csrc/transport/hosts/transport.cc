#include <memory>
#include <mutex>
#include <utility>

#include "common/check.h"
#include "transport/hosts/factory.h"
#include "transport/tcp/factory.h"

namespace reducer::transport {
namespace {

/// gRPC, once somebody needs it. Thread safety: every method, from any thread.
class LazyGrpc {
 public:
  explicit LazyGrpc(GrpcOptions options) : options_(std::move(options)) {}

  /// Runs `use` with the transport; not after stop(). The lock keeps the transport meanwhile, so
  /// `use` is short, and nothing that it calls leads back here.
  template <class Use>
  void with(Use use) {
    const std::lock_guard lock(mutex_);
    if (stopped_) return;
    if (!transport_) transport_ = makeGrpcTransport(options_);
    use(*transport_);
  }

  void stop() {
    std::unique_ptr<GrpcTransport> stopped;
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    stopped.swap(transport_);
  }

 private:
  const GrpcOptions options_;
  std::mutex mutex_;
  std::unique_ptr<GrpcTransport> transport_;
  bool stopped_ = false;
};

/// The gRPC side of a listener, made at its first connection.
struct Reception {
  std::string address;
  Acceptor acceptor;
  std::mutex mutex;
  std::unique_ptr<GrpcReception> grpc;

  void take(LazyGrpc& lazy, net::Fd fd, const net::SocketAddress& peer,
            std::shared_ptr<net::Guest> guest) {
    const std::lock_guard lock(mutex);
    lazy.with([&](GrpcTransport& transport) {
      if (!grpc) grpc = transport.receive(address, acceptor);
    });
    if (grpc) grpc->take(std::move(fd), peer, std::move(guest));
  }
};

class HostsListener final : public Listener {
 public:
  HostsListener(std::unique_ptr<Listener> tcp, std::shared_ptr<Reception> reception)
      : tcp_(std::move(tcp)), reception_(std::move(reception)) {}
  ~HostsListener() override {
    tcp_.reset();  // nothing comes to the reception afterwards
    reception_->grpc.reset();
  }
  std::string address() const override { return tcp_->address(); }
  std::uint64_t refused() const override { return tcp_->refused(); }

 private:
  std::unique_ptr<Listener> tcp_;
  const std::shared_ptr<Reception> reception_;
};

class HostsTransport final : public Transport {
 public:
  explicit HostsTransport(HostsOptions options)
      : network_(options.network),
        inform_(std::move(options.inform)),
        grpc_(std::make_shared<LazyGrpc>(options.grpc)) {
    TcpOptions tcp;
    tcp.threads = options.grpc.threads;
    tcp.congestion_control = options.grpc.congestion_control;
    tcp_ = makeTcpTransport(tcp);
    const bool has_services = options.grpc.configure_server || options.grpc.serve;
    if (has_services) grpc_->with([](GrpcTransport&) {});
  }

  ~HostsTransport() override {
    // First: the ends of its connections may still want a timer or a task.
    grpc_->stop();
  }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, Acceptor acceptor) override {
    const auto reception = std::make_shared<Reception>();
    reception->address = address;
    reception->acceptor = acceptor;
    auto listener =
        tcp_->listenBeside(address, std::move(acceptor),
                           [grpc = grpc_, reception](net::Fd fd, const net::SocketAddress& peer,
                                                     std::shared_ptr<net::Guest> guest) {
                             reception->take(*grpc, std::move(fd), peer, std::move(guest));
                           });
    if (!listener.ok()) return listener.status();
    return std::unique_ptr<Listener>(
        std::make_unique<HostsListener>(std::move(listener).value(), reception));
  }

  std::shared_ptr<Connection> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) override {
    if (network_ == Network::kTcp) return tcp_->connect(address, std::move(handler), timeout);
    return tcp_->connectOr(
        address, std::move(handler), timeout,
        [grpc = grpc_, inform = inform_, address](std::shared_ptr<Handler> other, Duration left,
                                                  const std::string& why) {
          if (inform) inform(address + ": " + why + "; gRPC is used for it");
          std::shared_ptr<Connection> connection;
          grpc->with([&](GrpcTransport& transport) {
            connection = transport.connect(address, std::move(other), left);
          });
          return connection;
        });
  }

  std::unique_ptr<Timer> every(Duration interval, std::function<void(TimePoint)> tick) override {
    return tcp_->every(interval, std::move(tick));
  }

  TimePoint now() const override { return tcp_->now(); }

  void post(std::function<void()> task) override { tcp_->post(std::move(task)); }

  std::size_t bufferedBytes() const override { return tcp_->bufferedBytes(); }

  std::shared_ptr<Helper> helper() override { return tcp_->helper(); }

 private:
  const Network network_;
  const std::function<void(const std::string&)> inform_;
  const std::shared_ptr<LazyGrpc> grpc_;
  std::unique_ptr<TcpTransport> tcp_;
};

}  // namespace

std::unique_ptr<Transport> makeHostsTransport(HostsOptions options) {
  REDUCER_CHECK(!options.grpc.tls.on() || options.network != Network::kTcp);
  if (options.network == Network::kGrpc || options.grpc.tls.on())
    return makeGrpcTransport(options.grpc);
  return std::make_unique<HostsTransport>(std::move(options));
}

}  // namespace reducer::transport
