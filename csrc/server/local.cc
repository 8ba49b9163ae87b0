#include "server/local.h"

#include <atomic>
#include <mutex>
#include <string>

namespace reducer::server {
namespace {

// Both ends' handlers, until the close is told. Each end of the pair holds this; it holds neither
// end.
struct Pair {
  explicit Pair(transport::Transport& t) : transport(t) {}

  transport::Transport& transport;
  std::mutex mutex;
  std::shared_ptr<transport::Handler> handlers[2];  // 0: worker, 1: reducer
  bool closed = false;

  std::shared_ptr<transport::Handler> handler(int side) {
    const std::lock_guard lock(mutex);
    return closed ? nullptr : handlers[side];
  }

  static void close(const std::shared_ptr<Pair>& pair, const Status& reason) {
    {
      const std::lock_guard lock(pair->mutex);
      if (pair->closed) return;
      pair->closed = true;
    }
    pair->transport.post([pair, reason] {
      std::shared_ptr<transport::Handler> ends[2];
      {
        const std::lock_guard lock(pair->mutex);
        ends[0].swap(pair->handlers[0]);
        ends[1].swap(pair->handlers[1]);
      }
      for (const auto& end : ends) {
        if (end) end->onClosed(reason);
      }
    });
  }
};

class LocalConnection final : public transport::Connection {
 public:
  LocalConnection(std::shared_ptr<Pair> pair, int other) : pair_(std::move(pair)), other_(other) {}
  ~LocalConnection() override { Pair::close(pair_, Status()); }

  void send(const wire::Frame& frame, Payload payload) override {
    if (const auto handler = pair_->handler(other_)) handler->onFrame(frame, std::move(payload));
  }
  void close(const Status& reason, bool /*flush: nothing is ever queued*/) override {
    Pair::close(pair_, reason);
  }
  std::string peer() const override { return "this process"; }

 private:
  const std::shared_ptr<Pair> pair_;
  const int other_;
};

}  // namespace

std::shared_ptr<transport::Connection> connectInProcess(transport::Transport& transport,
                                                        std::shared_ptr<transport::Handler> handler,
                                                        const transport::Acceptor& acceptor) {
  const auto pair = std::make_shared<Pair>(transport);
  auto worker_end = std::make_shared<LocalConnection>(pair, 1);
  const auto reducer = acceptor(std::make_shared<LocalConnection>(pair, 0));
  const std::lock_guard lock(pair->mutex);
  pair->handlers[0] = std::move(handler);
  pair->handlers[1] = reducer;
  return worker_end;
}

}  // namespace reducer::server
