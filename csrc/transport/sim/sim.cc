#include "transport/sim/sim.h"

#include <utility>

#include "transport/sim/world.h"

namespace reducer::transport {

struct SimNetwork::State : sim::World {
  using World::World;
  std::shared_ptr<sim::Host> stranger;  // who sends garbage
};

namespace {

class SimConnection : public Connection {
 public:
  SimConnection(std::shared_ptr<sim::World> world, std::shared_ptr<sim::Endpoint> endpoint)
      : world_(std::move(world)), endpoint_(std::move(endpoint)) {}
  ~SimConnection() override { world_->close(endpoint_, Status(), /*flush=*/true); }

  void send(const wire::Frame& frame, Payload payload) override {
    std::vector<std::byte> header = wire::encodeHeader(frame, payload.nbytes());
    world_->send(*endpoint_, {std::move(header), std::move(payload)});
  }
  void close(const Status& reason, bool flush) override { world_->close(endpoint_, reason, flush); }
  std::string peer() const override { return endpoint_->peer_address; }

 private:
  const std::shared_ptr<sim::World> world_;
  const std::shared_ptr<sim::Endpoint> endpoint_;
};

class SimListener : public Listener {
 public:
  SimListener(std::shared_ptr<sim::World> world, std::shared_ptr<sim::ListenerState> state)
      : world_(std::move(world)), state_(std::move(state)) {}
  ~SimListener() override { world_->unlisten(state_); }
  std::string address() const override { return state_->address; }

 private:
  const std::shared_ptr<sim::World> world_;
  const std::shared_ptr<sim::ListenerState> state_;
};

class SimTimer : public Timer {
 public:
  SimTimer(std::shared_ptr<sim::World> world, std::shared_ptr<sim::TimerState> state)
      : world_(std::move(world)), state_(std::move(state)) {}
  ~SimTimer() override { world_->cancel(*state_); }

 private:
  const std::shared_ptr<sim::World> world_;
  const std::shared_ptr<sim::TimerState> state_;
};

/// The broken client's side of sendGarbage().
class Stranger : public Handler {
 public:
  Stranger(std::function<void(const wire::Frame&)> reply, std::function<void(const Status&)> closed)
      : reply_(std::move(reply)), closed_(std::move(closed)) {}
  void onFrame(wire::Frame frame, Payload payload) override {
    if (reply_) reply_(frame);
  }
  void onClosed(const Status& reason) override {
    if (closed_) closed_(reason);
  }

 private:
  const std::function<void(const wire::Frame&)> reply_;
  const std::function<void(const Status&)> closed_;
};

}  // namespace

class SimTransport : public Transport {
 public:
  SimTransport(std::shared_ptr<sim::World> world, std::shared_ptr<sim::Host> host)
      : world_(std::move(world)), host_(std::move(host)) {}
  ~SimTransport() override { world_->destroyHost(host_); }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, Acceptor acceptor) override {
    auto state = world_->listen(host_, address, std::move(acceptor));
    if (!state.ok()) return state.status();
    return std::unique_ptr<Listener>(
        std::make_unique<SimListener>(world_, std::move(state).value()));
  }

  std::shared_ptr<Connection> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) override {
    return sim::makeConnection(world_,
                               world_->connect(host_, address, std::move(handler), timeout));
  }

  std::unique_ptr<Timer> every(Duration interval, std::function<void(TimePoint)> tick) override {
    return std::make_unique<SimTimer>(world_, world_->every(host_, interval, std::move(tick)));
  }

  TimePoint now() const override { return world_->now(); }

  void post(std::function<void()> task) override { world_->post(host_, std::move(task)); }

 private:
  const std::shared_ptr<sim::World> world_;
  const std::shared_ptr<sim::Host> host_;
};

std::shared_ptr<Connection> sim::makeConnection(std::shared_ptr<World> world,
                                                std::shared_ptr<Endpoint> endpoint) {
  return std::make_shared<SimConnection>(std::move(world), std::move(endpoint));
}

SimNetwork::SimNetwork(SimOptions options) : state_(std::make_shared<State>(options)) {
  state_->stranger = state_->addHost("a stranger");
  state_->startThreads();
}

SimNetwork::~SimNetwork() { state_->stop(); }

std::unique_ptr<Transport> SimNetwork::addHost(const std::string& name, double bytes_per_second) {
  return std::make_unique<SimTransport>(state_, state_->addHost(name, bytes_per_second));
}

SimHostCounters SimNetwork::counters(const std::string& name) const {
  return state_->counters(name);
}

bool SimNetwork::step() { return state_->step(); }

bool SimNetwork::runUntil(const std::function<bool()>& done, Duration limit) {
  return state_->runUntil(done, limit);
}

TimePoint SimNetwork::now() const { return state_->now(); }

void SimNetwork::kill(const std::string& name) { state_->kill(name); }
void SimNetwork::pause(const std::string& name) { state_->pause(name); }
void SimNetwork::resume(const std::string& name) { state_->resume(name); }
void SimNetwork::sever(const std::string& one, const std::string& other) {
  state_->sever(one, other);
}
void SimNetwork::name(const std::string& name, const std::string& host) {
  state_->name(name, host);
}
void SimNetwork::cut(const std::string& one, const std::string& other) { state_->cut(one, other); }
void SimNetwork::mend(const std::string& one, const std::string& other) {
  state_->mend(one, other);
}
void SimNetwork::slow(const std::string& name, Duration extra) { state_->slow(name, extra); }

void SimNetwork::sendGarbage(const std::string& address, Payload bytes,
                             std::function<void(const wire::Frame&)> reply,
                             std::function<void(const Status&)> closed) {
  auto handler = std::make_shared<Stranger>(std::move(reply), std::move(closed));
  const auto endpoint =
      state_->connect(state_->stranger, address, std::move(handler), std::chrono::seconds(5));
  state_->send(*endpoint, {{}, std::move(bytes)});
}

}  // namespace reducer::transport
