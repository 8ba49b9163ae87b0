#include <utility>

#include "transport/grpc/core.h"
#include "transport/grpc/factory.h"
#include "transport/grpc/stream.h"
#include "transport/grpc/timer.h"

namespace reducer::transport {
namespace grpc_detail {
namespace {

class GrpcListener final : public GrpcReception {
 public:
  GrpcListener(std::shared_ptr<Core> core, std::shared_ptr<ListenerState> state)
      : core_(std::move(core)), state_(std::move(state)) {}
  ~GrpcListener() override {
    const auto core = core_.lock();
    if (core && !core->orphaned()) core->unlisten(state_);
  }
  std::string address() const override { return state_->address; }
  std::uint64_t refused() const override {
    const auto core = core_.lock();
    return core ? core->dialer().refused() : 0;
  }
  void take(Fd fd, const SocketAddress& peer, std::shared_ptr<net::Guest> guest) override {
    if (const auto core = core_.lock()) core->take(std::move(fd), peer, std::move(guest), state_);
  }

 private:
  const std::weak_ptr<Core> core_;
  const std::shared_ptr<ListenerState> state_;
};

class GrpcTransportImpl final : public GrpcTransport {
 public:
  explicit GrpcTransportImpl(const GrpcOptions& options) : core_(std::make_shared<Core>(options)) {}

  ~GrpcTransportImpl() override {
    // In a forked child there are no threads to join: the parent's objects stay as they are.
    if (core_->orphaned()) new std::shared_ptr<Core>(core_);
  }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, Acceptor acceptor) override {
    auto state = core_->listen(address, std::move(acceptor));
    if (!state.ok()) return state.status();
    return std::unique_ptr<Listener>(
        std::make_unique<GrpcListener>(core_, std::move(state).value()));
  }

  std::unique_ptr<GrpcReception> receive(const std::string& address, Acceptor acceptor) override {
    return std::make_unique<GrpcListener>(core_, core_->receive(address, std::move(acceptor)));
  }

  std::shared_ptr<Connection> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) override {
    return std::make_shared<StreamConnection>(core_->connect(address, std::move(handler), timeout));
  }

  std::unique_ptr<Timer> every(Duration interval, std::function<void(TimePoint)> tick) override {
    auto state = std::make_shared<TimerState>(*core_, interval, std::move(tick));
    state->start();
    return std::make_unique<GrpcTimer>(std::move(state));
  }

  TimePoint now() const override { return Clock::now(); }

  void post(std::function<void()> task) override { core_->post(std::move(task)); }

 private:
  const std::shared_ptr<Core> core_;
};

}  // namespace
}  // namespace grpc_detail

std::unique_ptr<GrpcTransport> makeGrpcTransport(const GrpcOptions& options) {
  return std::make_unique<grpc_detail::GrpcTransportImpl>(options);
}

}  // namespace reducer::transport
