#include "transport/grpc/core.h"

#include <grpc/support/time.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>
#include <pthread.h>

#include <algorithm>
#include <utility>

#include "transport/address.h"
#include "transport/grpc/channel_args.h"
#include "transport/grpc/client_stream.h"
#include "transport/grpc/peer.h"
#include "transport/grpc/server_stream.h"
#include "transport/grpc/timer.h"
#include "transport/net/fork.h"

namespace reducer::transport::grpc_detail {

gpr_timespec deadlineAfter(Duration wait) {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(wait).count();
  return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_nanos(ns, GPR_TIMESPAN));
}

Core::Core(const GrpcOptions& options) : generation_(net::forkGeneration()), tls_(options.tls) {
  prepareProcess();
  const int threads = std::max(1, options.threads);
  grpc::ServerBuilder builder;
  setServerArguments(builder);
  builder.RegisterService(&service_);
  if (tls_.on()) {
    silenceHandshakes();
    using Experimental = grpc::ServerBuilder::experimental_type;
    credentials_ = channelCredentials(tls_);
    if (!tls_.cert.empty()) {
      acceptor_ = builder.experimental().AddExternalConnectionAcceptor(
          Experimental::ExternalConnectionType::FROM_FD, serverCredentials(tls_));
    }
  }
  queue_ = builder.AddCompletionQueue();
  if (options.configure_server) options.configure_server(builder);
  server_ = builder.BuildAndStart();
  REDUCER_CHECK(server_ != nullptr);  // it has no port that could be taken
  for (int i = 0; i < threads; ++i) acceptNext();
  if (options.serve) options.serve(*queue_);
  dialer_ = std::make_unique<Dialer>(options.congestion_control);
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([queue = queue_.get()] {
      void* tag = nullptr;
      bool ok = false;
      while (queue->Next(&tag, &ok)) static_cast<GrpcTag*>(tag)->complete(ok);
    });
    pthread_setname_np(threads_.back().native_handle(), "reducer-cq");
  }
}

Core::~Core() {
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<std::shared_ptr<TimerState>> timers;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    streams.assign(streams_.begin(), streams_.end());
    timers.assign(timers_.begin(), timers_.end());
  }
  dialer_->stop();
  for (const auto& timer : timers) timer->cancel();
  for (const auto& stream : streams)
    stream->abort(Status(Code::kAborted, "the transport was shut down"));
  streams.clear();
  timers.clear();
  server_->Shutdown(gpr_now(GPR_CLOCK_MONOTONIC));
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return streams_.empty() && timers_.empty(); });
    stopped_ = true;
  }
  queue_->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

bool Core::orphaned() const noexcept { return net::forkGeneration() != generation_; }

// ------------------------------------------------------------------ listening

Result<std::shared_ptr<ListenerState>> Core::listen(const std::string& address, Acceptor acceptor) {
  auto opened = net::openListener(address, dialer_->congestionControl());
  if (!opened.ok()) return opened.status();
  auto [socket, real] = std::move(opened).value();
  auto listener = receive(std::move(real), std::move(acceptor));
  if (tls_.on()) {
    const std::lock_guard lock(mutex_);
    REDUCER_CHECK(acceptor_ && !tls_listener_);
    tls_listener_ = listener;
  }
  listener->dialer_id = dialer_->startListening(
      std::move(socket),
      [this, weak = std::weak_ptr<ListenerState>(listener)](
          Fd fd, const SocketAddress& peer, net::Speech, std::shared_ptr<net::Guest> guest) {
        if (const auto state = weak.lock()) take(std::move(fd), peer, std::move(guest), state);
      },
      tls_.on() ? net::Hearing::kTls : net::Hearing::kHttp2);
  return listener;
}

std::shared_ptr<ListenerState> Core::receive(std::string address, Acceptor acceptor) {
  auto listener = std::make_shared<ListenerState>();
  listener->address = std::move(address);
  listener->acceptor = std::move(acceptor);
  return listener;
}

void Core::take(Fd fd, const SocketAddress& peer, std::shared_ptr<net::Guest> guest,
                const std::shared_ptr<ListenerState>& listener) {
  const std::string address = net::toString(peer);
  const std::string name = tls_.on() ? address : "fd:" + std::to_string(fd.get());
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    if (tls_.on()) {  // those that went without a stream
      std::erase_if(origins_, [](const auto& one) { return one.second.of_first.guest->hasLeft(); });
    }
    origins_[name] = {{address, listener, std::move(guest)}, /*has_stream=*/false};
  }
  if (!tls_.on()) return grpc::AddInsecureChannelFromFd(server_.get(), fd.release());
  grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
  connection.fd = fd.release();
  acceptor_->HandleNewConnection(&connection);
}

Core::Origin Core::originOf(const std::string& grpc_peer) {
  const std::string name = tls_.on() ? addressOf(grpc_peer) : grpc_peer;
  const std::lock_guard lock(mutex_);
  const auto found = origins_.find(name);
  if (found == origins_.end()) return {name, tls_listener_, dialer_->guests().enter(name)};
  Origin origin = found->second.of_first;
  if (tls_.on()) {
    origins_.erase(found);
  } else if (std::exchange(found->second.has_stream, true)) {
    origin.guest = origin.guest->another();
  }
  return origin;
}

void Core::unlisten(const std::shared_ptr<ListenerState>& listener) {
  {
    const std::lock_guard lock(mutex_);
    if (tls_listener_ == listener) tls_listener_ = nullptr;
  }
  if (listener->dialer_id != 0) dialer_->stopListening(listener->dialer_id);
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

void Core::acceptNext() {
  auto stream = std::make_shared<ServerStream>(*this);
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    streams_.insert(stream);
  }
  stream->request();
}

// ------------------------------------------------------------------ connecting, and the rest

std::shared_ptr<Stream> Core::connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) {
  auto stream = std::make_shared<ClientStream>(*this, address, std::move(handler), timeout);
  {
    const std::lock_guard lock(mutex_);
    REDUCER_CHECK(!stopping_);
    streams_.insert(stream);
  }
  stream->dial();
  return stream;
}

std::shared_ptr<grpc::Channel> Core::channelTo(const std::string& address, Fd fd) {
  grpc::ChannelArguments arguments = clientArguments();
  if (!tls_.on()) {
    return grpc::CreateCustomInsecureChannelFromFd(address, fd.release(), arguments);
  }
  setTlsClientArguments(arguments, peerName(address));
  return grpc::CreateCustomChannel(dialledOf(address), credentials_, arguments);
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
  changed_.notify_all();
}

void Core::post(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  if (!stopped_) Task::start(*queue_, std::move(task));
}

}  // namespace reducer::transport::grpc_detail
