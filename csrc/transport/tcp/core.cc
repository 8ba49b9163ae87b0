#include "transport/tcp/core.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "common/check.h"
#include "transport/tcp/stream.h"

namespace reducer::transport::tcp {

Core::Core(const TcpOptions& options)
    : loop_(std::make_shared<Loop>(std::max(1, options.threads))),
      dialer_(options.congestion_control) {}

Core::~Core() {
  dialer_.stop();
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<std::shared_ptr<TimerState>> timers;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    streams.assign(streams_.begin(), streams_.end());
    timers.assign(timers_.begin(), timers_.end());
  }
  for (const auto& timer : timers) timer->cancel();
  for (const auto& stream : streams)
    stream->abort(Status(Code::kAborted, "the transport was shut down"));
  streams.clear();
  timers.clear();
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return streams_.empty(); });
  }
  loop_->stop();
}

// ------------------------------------------------------------------ listening

Result<std::shared_ptr<ListenerState>> Core::listen(const std::string& address, Acceptor acceptor,
                                                    TcpTransport::Http2 http2) {
  auto opened = net::openListener(address, dialer_.congestionControl());
  if (!opened.ok()) return opened.status();
  auto [socket, real] = std::move(opened).value();
  auto listener = std::make_shared<ListenerState>();
  listener->address = std::move(real);
  listener->acceptor = std::move(acceptor);
  listener->dialer_id = dialer_.startListening(
      std::move(socket),
      [this, http2 = std::move(http2), weak = std::weak_ptr<ListenerState>(listener)](
          net::Fd fd, const net::SocketAddress& peer, net::Speech speech,
          std::shared_ptr<net::Guest> guest) {
        if (speech == net::Speech::kHttp2) {
          if (http2) http2(std::move(fd), peer, std::move(guest));
        } else if (const auto state = weak.lock()) {
          take(std::move(fd), peer, std::move(guest), state);
        }
      },
      net::Hearing::kFramesAndHttp2);
  return listener;
}

void Core::take(net::Fd fd, const net::SocketAddress& peer, std::shared_ptr<net::Guest> guest,
                const std::shared_ptr<ListenerState>& listener) {
  auto stream = std::make_shared<Stream>(*this, net::toString(peer), listener, std::move(guest));
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    streams_.insert(stream);
  }
  stream->accept(std::move(fd));
}

void Core::unlisten(const std::shared_ptr<ListenerState>& listener) {
  dialer_.stopListening(listener->dialer_id);
  listener->closed = true;
  std::vector<std::shared_ptr<Stream>> streams;
  const auto accepted_by = [&](const std::shared_ptr<Stream>& stream) {
    return stream->listener() == listener.get();
  };
  {
    const std::lock_guard lock(mutex_);
    std::copy_if(streams_.begin(), streams_.end(), std::back_inserter(streams), accepted_by);
  }
  for (const auto& stream : streams)
    stream->abort(Status(Code::kAborted, "the listener was closed"));
  streams.clear();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return std::none_of(streams_.begin(), streams_.end(), accepted_by); });
}

// ------------------------------------------------------------------ connecting, and the rest

std::shared_ptr<Stream> Core::connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout, TcpTransport::Fallback fallback) {
  auto stream = std::make_shared<Stream>(*this, address, nullptr, nullptr);
  {
    const std::lock_guard lock(mutex_);
    REDUCER_CHECK(!stopping_);
    streams_.insert(stream);
  }
  stream->dial(std::move(handler), timeout, std::move(fallback));
  return stream;
}

void Core::forget(const std::shared_ptr<Stream>& stream) {
  const std::lock_guard lock(mutex_);
  streams_.erase(stream);
  changed_.notify_all();
}

void Core::keep(std::shared_ptr<TimerState> timer) {
  const std::lock_guard lock(mutex_);
  timers_.insert(std::move(timer));
}

void Core::forget(const std::shared_ptr<TimerState>& timer) {
  const std::lock_guard lock(mutex_);
  timers_.erase(timer);
}

}  // namespace reducer::transport::tcp
