#include <absl/synchronization/mutex.h>
#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "transport/address.h"
#include "transport/grpc/channel_args.h"
#include "transport/grpc/factory.h"
#include "transport/grpc/stream.h"

namespace reducer::transport {
namespace {

/// Why nobody can listen at an address; gRPC itself does not tell. Ok if one can (or could: another
/// process may be faster).
Status checkListen(const std::string& address) {
  const auto refuse = [&](const std::string& why) {
    return Status(Code::kUnavailable, "cannot listen on " + address + ": " + why);
  };
  const auto parsed = parseAddress(address);
  if (!parsed) return refuse("this is not host:port with a port from 0 to 65535");
  std::string host = parsed->host;
  if (host.size() > 2 && host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(parsed->port).c_str(), &hints, &found);
  if (error != 0) return refuse(gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses(found, freeaddrinfo);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return refuse(std::strerror(errno));
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  Status status;
  if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || ::listen(fd, 1) != 0) {
    status = refuse(errno == EADDRINUSE
                        ? "the port is in use by another process; choose another one, or 0 for any"
                        : std::strerror(errno));
  }
  ::close(fd);
  return status;
}

/// A completion queue and the thread that serves it.
class Poller {
 public:
  explicit Poller(std::unique_ptr<grpc::CompletionQueue> queue) : queue_(std::move(queue)) {
    thread_ = std::thread([this] {
      void* tag = nullptr;
      bool ok = false;
      while (queue_->Next(&tag, &ok)) static_cast<Tag*>(tag)->proceed(ok);
    });
  }
  ~Poller() {
    queue_->Shutdown();
    thread_.join();
  }
  grpc::CompletionQueue* queue() { return queue_.get(); }

 private:
  const std::unique_ptr<grpc::CompletionQueue> queue_;
  std::thread thread_;
};

/// The streams of one owner (a listener or a transport), to be ended with it.
class StreamSet {
 public:
  void add(Stream* stream) {
    const std::lock_guard lock(mutex_);
    streams_.insert(stream);
  }
  void remove(Stream* stream) {
    const std::lock_guard lock(mutex_);
    streams_.erase(stream);
    if (streams_.empty()) empty_.notify_all();
  }
  void closeAll(const Status& reason) {
    std::vector<std::shared_ptr<Stream>> all;
    {
      const std::lock_guard lock(mutex_);
      for (Stream* stream : streams_) {
        if (auto alive = stream->weak_from_this().lock()) all.push_back(std::move(alive));
      }
    }
    for (const auto& stream : all) stream->close(reason, /*flush=*/false);
  }
  void waitEmpty() {
    std::unique_lock lock(mutex_);
    empty_.wait(lock, [this] { return streams_.empty(); });
  }

 private:
  std::mutex mutex_;
  std::condition_variable empty_;
  std::unordered_set<Stream*> streams_;
};

/// A task for a transport thread, by an alarm that has passed already.
class PostedTask final : public Tag {
 public:
  static void post(grpc::CompletionQueue* queue, std::function<void()> task) {
    auto* posted = new PostedTask(std::move(task));
    posted->alarm_.Set(queue, std::chrono::system_clock::now(), static_cast<Tag*>(posted));
  }
  void proceed(bool /*ok*/) override {
    const std::unique_ptr<PostedTask> self(this);
    task_();
  }

 private:
  explicit PostedTask(std::function<void()> task) : task_(std::move(task)) {}
  std::function<void()> task_;
  grpc::Alarm alarm_;
};

class GrpcTimer final : public Timer {
 public:
  GrpcTimer(grpc::CompletionQueue* queue, Duration interval, std::function<void(TimePoint)> tick)
      : state_(std::make_shared<State>(queue, interval, std::move(tick))) {
    const std::lock_guard lock(state_->mutex);
    state_->self = state_;
    state_->arm();
  }
  ~GrpcTimer() override {
    std::unique_lock lock(state_->mutex);
    state_->cancelled = true;
    state_->alarm.Cancel();
    // From within its own tick there is nothing to wait for.
    if (state_->running_on == std::this_thread::get_id()) return;
    state_->idle.wait(lock, [this] { return state_->running_on == std::thread::id(); });
  }

 private:
  // Lives until its alarm has come back for the last time.
  struct State final : Tag {
    State(grpc::CompletionQueue* q, Duration i, std::function<void(TimePoint)> t)
        : queue(q), interval(i), tick(std::move(t)) {}
    void arm() {
      alarm.Set(queue, std::chrono::system_clock::now() + interval, static_cast<Tag*>(this));
    }
    void proceed(bool ok) override {
      std::unique_lock lock(mutex);
      if (ok && !cancelled) {
        running_on = std::this_thread::get_id();
        lock.unlock();
        tick(Clock::now());
        lock.lock();
        running_on = {};
        idle.notify_all();
      }
      if (!cancelled) {
        arm();
        return;
      }
      const std::shared_ptr<State> last = std::move(self);
      lock.unlock();
    }
    grpc::CompletionQueue* const queue;
    const Duration interval;
    const std::function<void(TimePoint)> tick;
    std::mutex mutex;
    std::condition_variable idle;
    std::thread::id running_on;
    bool cancelled = false;
    grpc::Alarm alarm;
    std::shared_ptr<State> self;
  };
  const std::shared_ptr<State> state_;
};

/// Accepts calls on one of the server's queues; one is always waited for.
class Accept final : public Tag {
 public:
  Accept(DataService& service, grpc::ServerCompletionQueue* queue, Acceptor acceptor,
         std::shared_ptr<StreamSet> streams)
      : service_(service),
        queue_(queue),
        acceptor_(std::move(acceptor)),
        streams_(std::move(streams)) {
    wait();
  }

  void proceed(bool ok) override {
    if (!ok) {  // the server shuts down
      const std::unique_ptr<Accept> self(this);
      std::exchange(stream_, nullptr)->abandon();
      return;
    }
    const std::shared_ptr<ServerStream> stream = std::exchange(stream_, nullptr);
    wait();
    stream->setHandler(acceptor_(std::make_shared<GrpcConnection>(stream)));
    stream->start();
  }

 private:
  void wait() {
    stream_ = std::make_shared<ServerStream>(
        [streams = streams_](Stream* gone) { streams->remove(gone); });
    streams_->add(stream_.get());
    stream_->context().AsyncNotifyWhenDone(stream_->prepare());
    service_.RequestExchange(&stream_->context(), &stream_->call(), queue_, queue_,
                             static_cast<Tag*>(this));
  }

  DataService& service_;
  grpc::ServerCompletionQueue* const queue_;
  const Acceptor acceptor_;
  const std::shared_ptr<StreamSet> streams_;
  std::shared_ptr<ServerStream> stream_;
};

class GrpcListener final : public Listener {
 public:
  GrpcListener(std::unique_ptr<DataService> service, std::unique_ptr<grpc::Server> server,
               std::string address)
      : service_(std::move(service)), server_(std::move(server)), address_(std::move(address)) {}

  void accept(const std::vector<grpc::ServerCompletionQueue*>& queues, const Acceptor& acceptor) {
    for (grpc::ServerCompletionQueue* queue : queues) {
      new Accept(*service_, queue, acceptor, streams_);  // ends itself when the server does
    }
  }

  ~GrpcListener() override {
    server_->Shutdown(std::chrono::system_clock::now());  // cancels every call
    streams_->waitEmpty();
  }
  std::string address() const override { return address_; }

 private:
  const std::unique_ptr<DataService> service_;
  const std::unique_ptr<grpc::Server> server_;
  const std::string address_;
  const std::shared_ptr<StreamSet> streams_ = std::make_shared<StreamSet>();
};

class GrpcTransport final : public Transport {
 public:
  explicit GrpcTransport(GrpcOptions options) : options_(std::move(options)) {
    if (options_.threads < 1) options_.threads = 1;
    // Debian builds abseil with its search for deadlocks on: a graph update for every lock that
    // gRPC takes.
    absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
    // What gRPC logs of its own comes to the user as a Status from here.
    if (std::getenv("GRPC_VERBOSITY") == nullptr) {
      gpr_set_log_verbosity(static_cast<gpr_log_severity>(GPR_LOG_SEVERITY_ERROR + 1));
    }
  }

  ~GrpcTransport() override {
    streams_->closeAll(Status(Code::kAborted, "the transport ends"));
    streams_->waitEmpty();
    pollers_.clear();
  }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, Acceptor acceptor) override {
    if (Status status = checkListen(address); !status.ok()) return status;
    auto service = std::make_unique<DataService>();
    grpc::ServerBuilder builder;
    configure(builder);
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service.get());
    std::vector<std::unique_ptr<grpc::ServerCompletionQueue>> queues;
    for (int i = 0; i < options_.threads; ++i) queues.push_back(builder.AddCompletionQueue());
    if (options_.configure_server) options_.configure_server(builder);
    std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
    if (server == nullptr || port == 0) {
      for (auto& queue : queues) {
        queue->Shutdown();
        void* tag = nullptr;
        bool ok = false;
        while (queue->Next(&tag, &ok)) {
        }
      }
      return Status(Code::kUnavailable,
                    "cannot listen on " + address + ": another process took the port just now");
    }
    const std::size_t colon = address.rfind(':');
    auto listener = std::make_unique<GrpcListener>(
        std::move(service), std::move(server), address.substr(0, colon + 1) + std::to_string(port));
    std::vector<grpc::ServerCompletionQueue*> raw;
    {
      // From now on these threads do everything, connections to others included: one set of
      // pollers.
      const std::lock_guard lock(mutex_);
      serving_.clear();
      for (auto& queue : queues) {
        raw.push_back(queue.get());
        serving_.push_back(queue.get());
        pollers_.push_back(std::make_unique<Poller>(std::move(queue)));
      }
    }
    listener->accept(raw, acceptor);
    return std::unique_ptr<Listener>(std::move(listener));
  }

  std::shared_ptr<Connection> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                      Duration timeout) override {
    grpc::ChannelArguments arguments;
    configure(arguments);
    auto channel =
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
    const auto stream = std::make_shared<ClientStream>(
        address, [streams = streams_](Stream* gone) { streams->remove(gone); });
    streams_->add(stream.get());
    stream->setHandler(std::move(handler));
    stream->start(std::move(channel), nextQueue(), timeout);
    return std::make_shared<GrpcConnection>(stream);
  }

  std::unique_ptr<Timer> every(Duration interval, std::function<void(TimePoint)> tick) override {
    return std::make_unique<GrpcTimer>(nextQueue(), interval, std::move(tick));
  }

  TimePoint now() const override { return Clock::now(); }

  void post(std::function<void()> task) override { PostedTask::post(nextQueue(), std::move(task)); }

 private:
  grpc::CompletionQueue* nextQueue() {
    const std::lock_guard lock(mutex_);
    if (serving_.empty()) {
      for (int i = 0; i < options_.threads; ++i) {
        auto queue = std::make_unique<grpc::CompletionQueue>();
        serving_.push_back(queue.get());
        pollers_.push_back(std::make_unique<Poller>(std::move(queue)));
      }
    }
    return serving_[next_++ % serving_.size()];
  }

  GrpcOptions options_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Poller>> pollers_;
  std::vector<grpc::CompletionQueue*> serving_;  // those that get new work
  std::size_t next_ = 0;
  const std::shared_ptr<StreamSet> streams_ = std::make_shared<StreamSet>();
};

}  // namespace

std::unique_ptr<Transport> makeGrpcTransport(const GrpcOptions& options) {
  return std::make_unique<GrpcTransport>(options);
}

}  // namespace reducer::transport
