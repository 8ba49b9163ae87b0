#include <utility>

#include "transport/tcp/core.h"
#include "transport/tcp/factory.h"
#include "transport/tcp/stream.h"

namespace reducer::transport {
namespace tcp {
namespace {

class TcpListener final : public Listener {
 public:
  TcpListener(std::shared_ptr<Core> core, std::shared_ptr<ListenerState> state)
      : core_(std::move(core)), state_(std::move(state)) {}
  ~TcpListener() override {
    const auto core = core_.lock();
    if (core && !core->orphaned()) core->unlisten(state_);
  }
  std::string address() const override { return state_->address; }
  std::uint64_t refused() const override {
    const auto core = core_.lock();
    return core ? core->dialer().refused() : 0;
  }

 private:
  const std::weak_ptr<Core> core_;
  const std::shared_ptr<ListenerState> state_;
};

class TcpTimer final : public Timer {
 public:
  TcpTimer(std::shared_ptr<Core> core, std::shared_ptr<TimerState> state)
      : core_(std::move(core)), state_(std::move(state)) {}
  ~TcpTimer() override {
    if (state_->orphaned()) return;
    const auto core = core_.lock();
    if (!core) return;  // it has cancelled the timer
    state_->cancel();
    core->forget(state_);
  }

 private:
  const std::weak_ptr<Core> core_;
  const std::shared_ptr<TimerState> state_;
};

class TcpTransportImpl final : public TcpTransport {
 public:
  explicit TcpTransportImpl(const TcpOptions& options) : core_(std::make_shared<Core>(options)) {}

  ~TcpTransportImpl() override {
    // In a forked child there are no threads to join: the parent's objects stay as they are.
    if (core_->orphaned()) new std::shared_ptr<Core>(core_);
  }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, Acceptor acceptor) override {
    return listenBeside(address, std::move(acceptor), nullptr);
  }

  Result<std::unique_ptr<Listener>> listenBeside(const std::string& address, Acceptor acceptor,
                                                 Http2 http2) override {
    auto state = core_->listen(address, std::move(acceptor), std::move(http2));
    if (!state.ok()) return state.status();
    return std::unique_ptr<Listener>(
        std::make_unique<TcpListener>(core_, std::move(state).value()));
  }

  std::shared_ptr<Connection> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) override {
    return connectOr(address, std::move(handler), timeout, nullptr);
  }

  std::shared_ptr<Connection> connectOr(const std::string& address,
                                        std::shared_ptr<Handler> handler, Duration timeout,
                                        Fallback fallback) override {
    return std::make_shared<StreamConnection>(
        core_->connect(address, std::move(handler), timeout, std::move(fallback)));
  }

  std::unique_ptr<Timer> every(Duration interval, std::function<void(TimePoint)> tick) override {
    auto state = std::make_shared<TimerState>(core_->loop(), interval, std::move(tick));
    core_->keep(state);
    state->start();
    return std::make_unique<TcpTimer>(core_, std::move(state));
  }

  TimePoint now() const override { return Clock::now(); }

  void post(std::function<void()> task) override { core_->loop().post(std::move(task)); }

  std::size_t bufferedBytes() const override { return core_->blocks().lentBytes(); }

  std::shared_ptr<Helper> helper() override { return core_->helper(); }

 private:
  const std::shared_ptr<Core> core_;
};

}  // namespace
}  // namespace tcp

std::unique_ptr<TcpTransport> makeTcpTransport(const TcpOptions& options) {
  return std::make_unique<tcp::TcpTransportImpl>(options);
}

}  // namespace reducer::transport
