// What a worker process has once, whatever the number of its groups: the transport, and the reducer
// inside it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "collective/settings.h"
#include "common/status.h"
#include "recorder/dumper.h"
#include "recorder/recorder.h"
#include "server/server.h"
#include "server/tokens.h"
#include "transport/hosts/factory.h"
#include "transport/transport.h"

namespace reducer::runtime {

struct RuntimeOptions {
  std::string bind_host = "127.0.0.1";      ///< address on which other workers reach this process
  int threads = 1;                          ///< completion-queue threads
  std::string congestion_control = "auto";  ///< as in transport::GrpcOptions
  collective::Carrier carrier = collective::Carrier::kAuto;
  /// The flight recorder: how many calls it keeps (0: there is none), and how it is written.
  std::size_t recorder_entries = 0;
  recorder::Dumper::Options dumps;
  transport::TlsFiles tls;  ///< of both ends: workers serve each other
  std::string token_file;   ///< with the job's token; empty: it has none
};

/// Thread safety: any thread. Must not be destroyed while holding the GIL (joins threads).
class Runtime {
 public:
  /// The process' runtime for these options, made at first use and shared while somebody holds it.
  /// In a child forked after that, kAborted: a forked process must start its own.
  static Result<std::shared_ptr<Runtime>> acquire(const RuntimeOptions& options);

  ~Runtime();
  transport::Transport& transport() { return *transport_; }
  server::ReducerServer& server() { return *server_; }
  /// Null: there is none. It outlives the runtime.
  recorder::Recorder* recorder() { return recorder_; }
  /// "host:port" where other workers reach the reducer inside this process.
  std::string address() const { return server_->address(); }
  /// For a group that is made now; empty if there is no token file.
  Result<std::string> token();

 private:
  Runtime() = default;
  int owner_ = 0;  // the process that has the threads
  std::shared_ptr<server::TokenFile> tokens_;
  std::unique_ptr<transport::Transport> transport_;
  std::unique_ptr<server::ReducerServer> server_;
  recorder::Recorder* recorder_ = nullptr;
  std::unique_ptr<recorder::Dumper> dumper_;
};

/// What the flight recorder of this process holds, as JSON; empty: there was none yet, or it is
/// switched off.
std::string recorded(const std::string& reason);

/// "hostname:pid" of this process.
std::string hostLabel();

/// Equal for processes that can share memory: this start of this machine, its network namespace (in
/// which they meet) and the user. A text without meaning beyond that.
std::string hostIdentity();

/// The address of the interface `name_or_address`, or, when empty, that of the route to `peer_host`
/// (a loopback peer gives 127.0.0.1). kInvalidArgument lists the interfaces that exist.
Result<std::string> chooseBindHost(const std::string& name_or_address,
                                   const std::string& peer_host);

/// Replaces names by addresses: a DNS name with several addresses counts as several servers. Input
/// as from parseServers().
Result<std::vector<std::string>> resolveServers(const std::vector<std::string>& servers);

}  // namespace reducer::runtime
