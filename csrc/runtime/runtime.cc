#include "runtime/runtime.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "transport/hosts/factory.h"

namespace reducer::runtime {
namespace {

// How long the end waits for the last answers to other workers to leave.
constexpr Duration kFinishTimeout = std::chrono::seconds(2);

struct Shared {
  std::mutex mutex;
  std::weak_ptr<Runtime> runtime;
  RuntimeOptions options;
  pid_t owner = 0;
  recorder::Recorder* recorder = nullptr;  // never destroyed: it is asked after the groups' end
};

/// The process' recorder; another one if it is to be of another size.
recorder::Recorder* recorderOf(Shared& shared, std::size_t entries) {
  if (entries == 0) {
    shared.recorder = nullptr;
  } else if (shared.recorder == nullptr || shared.recorder->entries() != entries) {
    shared.recorder = new recorder::Recorder(entries);
  }
  return shared.recorder;
}

/// What a carrier means between processes: shared memory is a matter of each group.
transport::Network networkOf(collective::Carrier carrier) {
  switch (carrier) {
    case collective::Carrier::kTcp:
      return transport::Network::kTcp;
    case collective::Carrier::kGrpc:
      return transport::Network::kGrpc;
    case collective::Carrier::kAuto:
    case collective::Carrier::kShm:
      break;
  }
  return transport::Network::kAuto;
}

/// Threads of a transport must not wait for Python, and so for its loggers.
bool informs() {
  const char* const level = std::getenv("REDUCER_LOG");
  return level != nullptr && (std::strcmp(level, "info") == 0 || std::strcmp(level, "debug") == 0);
}

Status checkSecurity(const RuntimeOptions& options) {
  if (options.tls.on() && options.carrier == collective::Carrier::kTcp) {
    return Status(
        Code::kInvalidArgument,
        "REDUCER_TRANSPORT is 'tcp', which has no TLS, and REDUCER_TLS_* asks for it; use "
        "'auto' or 'grpc'");
  }
  return transport::checkTls(options.tls, transport::TlsRole::kBoth);
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
    if (s.options.tls != options.tls || s.options.token_file != options.token_file) {
      return Status(
          Code::kInvalidArgument,
          "this process has groups with other TLS files or another token file already; "
          "REDUCER_TLS_* and REDUCER_TOKEN_FILE are the same for all groups of a process");
    }
    return runtime;
  }
  if (Status status = checkSecurity(options); !status.ok()) return status;
  std::shared_ptr<Runtime> runtime(new Runtime);
  runtime->owner_ = getpid();
  transport::HostsOptions hosts;
  hosts.network = networkOf(options.carrier);
  hosts.grpc.threads = options.threads;
  hosts.grpc.congestion_control = options.congestion_control;
  hosts.grpc.tls = options.tls;
  if (informs()) {
    hosts.inform = [](const std::string& text) {
      std::fprintf(stderr, "reducer: %s\n", text.c_str());
    };
  }
  runtime->transport_ = transport::makeHostsTransport(std::move(hosts));
  server::ServerOptions server;
  if (!options.token_file.empty()) {
    auto opened = server::TokenFile::open(options.token_file);
    if (!opened.ok()) return opened.status();
    runtime->tokens_ = std::move(opened).value();
    if (auto token = runtime->tokens_->only(); !token.ok()) return token.status();
  }
  server.tokens = runtime->tokens_;
  server.host = hostLabel();
  server.shards = 4 * options.threads;
  server.memory_limit_bytes = SIZE_MAX;  // a worker's own windows are the bound here
  runtime->server_ = std::make_unique<server::ReducerServer>(*runtime->transport_, server);
  const bool v6 = options.bind_host.find(':') != std::string::npos;
  const std::string host = v6 ? "[" + options.bind_host + "]" : options.bind_host;
  if (Status status = runtime->server_->listen(host + ":0"); !status.ok()) return status;
  runtime->recorder_ = recorderOf(s, options.recorder_entries);
  if (runtime->recorder_ != nullptr) {
    runtime->dumper_ = std::make_unique<recorder::Dumper>(*runtime->recorder_, options.dumps);
  }
  s.runtime = runtime;
  s.options = options;
  s.owner = runtime->owner_;
  return runtime;
}

Result<std::string> Runtime::token() {
  if (!tokens_) return std::string();
  return tokens_->only();
}

Runtime::~Runtime() {
  if (owner_ != getpid()) {  // a forked child: the threads to be joined are not here
    (void)dumper_.release();
    (void)server_.release();
    (void)transport_.release();
    return;
  }
  dumper_.reset();
  if (server_) server_->finish(kFinishTimeout);
  server_.reset();
  transport_.reset();
}

std::string recorded(const std::string& reason) {
  recorder::Recorder* recorder = nullptr;
  std::shared_ptr<Runtime> runtime;  // groups that are asked must not outlive it
  {
    Shared& s = shared();
    const std::lock_guard lock(s.mutex);
    if (s.owner != getpid()) return {};  // what a fork left of it may be locked for ever
    recorder = s.recorder;
    runtime = s.runtime.lock();
  }
  return recorder == nullptr ? std::string() : recorder->dump(reason);
}

}  // namespace reducer::runtime
