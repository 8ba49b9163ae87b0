#include "runtime/runtime.h"

#include <unistd.h>

#include <mutex>

#include "transport/grpc/factory.h"

namespace reducer::runtime {
namespace {

// How long the end waits for the last answers to other workers to leave.
constexpr Duration kFinishTimeout = std::chrono::seconds(2);

struct Shared {
  std::mutex mutex;
  std::weak_ptr<Runtime> runtime;
  RuntimeOptions options;
  pid_t owner = 0;
};

/// What a carrier means between processes: shared memory is a matter of each group.
collective::Carrier networkOf(collective::Carrier carrier) {
  return carrier == collective::Carrier::kShm ? collective::Carrier::kAuto : carrier;
}

Shared& shared() {
  static auto* const instance = new Shared;  // outlives every static destructor
  return *instance;
}

}  // namespace

Result<std::shared_ptr<Runtime>> Runtime::acquire(const RuntimeOptions& options) {
  Shared& s = shared();
  const std::lock_guard lock(s.mutex);
  if (auto runtime = s.runtime.lock()) {
    if (s.owner != getpid()) {
      return Status(Code::kAborted,
                    "this process was forked from one that had a group already, and has none of "
                    "its threads; start "
                    "workers with 'spawn' or 'forkserver', or make groups only after the fork");
    }
    if (s.options.bind_host != options.bind_host) {
      return Status(Code::kInvalidArgument, "this process serves its groups on " +
                                                s.options.bind_host +
                                                " already; REDUCER_INTERFACE cannot ask for " +
                                                options.bind_host + " in the same process");
    }
    if (s.options.congestion_control != options.congestion_control) {
      return Status(Code::kInvalidArgument,
                    "this process' connections use the congestion control '" +
                        s.options.congestion_control +
                        "' already; REDUCER_CONGESTION_CONTROL cannot ask for '" +
                        options.congestion_control + "' in the same process");
    }
    if (networkOf(s.options.carrier) != networkOf(options.carrier)) {
      return Status(Code::kInvalidArgument, "this process' groups use the transport '" +
                                                std::string(collective::nameOf(s.options.carrier)) +
                                                "' already; REDUCER_TRANSPORT cannot ask for '" +
                                                std::string(collective::nameOf(options.carrier)) +
                                                "' in the same process");
    }
    return runtime;
  }
  std::shared_ptr<Runtime> runtime(new Runtime);
  runtime->owner_ = getpid();
  transport::GrpcOptions grpc;
  grpc.threads = options.threads;
  grpc.congestion_control = options.congestion_control;
  runtime->transport_ = transport::makeGrpcTransport(grpc);
  server::ServerOptions server;
  server.host = hostLabel();
  server.shards = 4 * options.threads;
  server.memory_limit_bytes = SIZE_MAX;  // a worker's own windows are the bound here
  runtime->server_ = std::make_unique<server::ReducerServer>(*runtime->transport_, server);
  const bool v6 = options.bind_host.find(':') != std::string::npos;
  const std::string host = v6 ? "[" + options.bind_host + "]" : options.bind_host;
  if (Status status = runtime->server_->listen(host + ":0"); !status.ok()) return status;
  s.runtime = runtime;
  s.options = options;
  s.owner = runtime->owner_;
  return runtime;
}

Runtime::~Runtime() {
  if (owner_ != getpid()) {  // a forked child: the threads to be joined are not here
    (void)server_.release();
    (void)transport_.release();
    return;
  }
  if (server_) server_->finish(kFinishTimeout);
  server_.reset();
  transport_.reset();
}

}  // namespace reducer::runtime
