// A reducer: the engine behind a transport. The same class runs standalone and inside every worker.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "engine/engine.h"
#include "server/absentees.h"
#include "transport/transport.h"

namespace reducer::server {

class TokenFile;

struct ServerOptions {
  std::size_t memory_limit_bytes = std::size_t{4} << 30;  ///< for all that is held for workers
  int shards = 16;   ///< independent parts of the slot table; more than the threads that serve it
  std::string host;  ///< "hostname:pid", for messages
  bool standalone = false;  ///< serves the collectives only: send and recv go from worker to worker
  Duration hello_within = std::chrono::seconds(10);  ///< after which a silent connection is closed
  std::size_t silent_max = 1024;  ///< connections that have not said hello; more are closed at once
  Duration tick = std::chrono::milliseconds(100);  ///< how often deadlines are looked at
  /// Standalone: how long after a worker's connection broke the group's other connections are
  /// closed, too: either that worker is lost, and the group with it, or this reducer is to it, and
  /// then to all.
  Duration evict_after = std::chrono::seconds(1);
  /// Workers that do not read what they are answered are closed before that and what they push are
  /// more than their promise. For transports that release a payload when its bytes have left (on
  /// `sim` it is the receiver's own).
  bool counts_unread = false;
  /// Whom a hello's token lets in; null: everybody.
  std::shared_ptr<TokenFile> tokens;
};

/// One group of one job, as `Stats` shows it.
struct GroupStats {
  std::string job;  ///< hexadecimal
  std::string group;
  std::int32_t world_size = 0;
  std::int32_t connected = 0;
  std::uint64_t reserved_bytes = 0;
};

struct ServerStats {
  std::uint64_t memory_limit_bytes = 0;
  std::uint64_t reserved_bytes = 0;  ///< promised to the groups that joined
  std::uint64_t taken_bytes = 0;     ///< that, and what groups hold beyond it: at most the limit
  /// For workers of other processes: what they pushed, results on their way out, and what keeping
  /// account of it takes.
  std::uint64_t held_bytes = 0;
  std::uint64_t held_bytes_max = 0;
  std::uint64_t pushed_bytes = 0;  ///< since the start
  std::uint64_t result_bytes = 0;
  std::uint64_t slots_done = 0;
  std::uint64_t slots_failed = 0;
  std::uint64_t slots_open = 0;
  std::uint64_t connections = 0;
  std::uint64_t refused = 0;  ///< connections and operations answered by an error
  std::uint64_t damaged = 0;  ///< chunks that came with a wrong checksum and were sent again
  bool draining = false;
  double uptime_s = 0;
  std::vector<GroupStats> groups;
};

struct ServerState;

/// Thread safety: every method, from any thread. Destroy before the transport.
class ReducerServer {
 public:
  ReducerServer(transport::Transport& transport, ServerOptions options);
  ~ReducerServer();
  ReducerServer(const ReducerServer&) = delete;
  ReducerServer& operator=(const ReducerServer&) = delete;

  /// Serves "host:port" (port 0 picks one). Once. kUnavailable says why it cannot ("address in
  /// use").
  Status listen(const std::string& address);

  /// The address with the real port; empty before listen().
  std::string address() const;

  /// A connection from this process, without a transport: frames go straight to the engine, on the
  /// caller's thread.
  std::shared_ptr<transport::Connection> connectLocal(std::shared_ptr<transport::Handler> handler);

  /// `token`: of the groups, those of this token only; all else is of the whole reducer.
  ServerStats stats(std::optional<std::string_view> token = {}) const;

  /// The last collective of which a push of that rank came here; for what is said of it when it
  /// dies.
  engine::Joined joined(const std::string& job, Rank rank) const;

  /// From now on no new group is taken in; the groups at work go on.
  void drain();

  /// Standalone reducers that groups of this process have lost.
  Absentees& absentees();

  /// True if no worker is connected.
  bool idle() const;

  /// Closes every connection once its last answers have left, and waits for that up to `timeout`
  /// (real time). For an end in good order, before the destructor, which does not wait.
  void finish(Duration timeout);

 private:
  std::shared_ptr<ServerState> state_;
  std::unique_ptr<transport::Listener> listener_;
  std::unique_ptr<transport::Timer> ticker_;
};

}  // namespace reducer::server
