// One rank's membership in a group, and the collectives it can join.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "collective/cost_model.h"
#include "collective/settings.h"
#include "common/clock.h"
#include "common/status.h"
#include "common/types.h"
#include "recorder/recorder.h"
#include "server/server.h"
#include "transport/transport.h"

namespace reducer::collective {

struct GroupConfig {
  std::string
      job;  ///< 16 random bytes, equal on all ranks of this group instance, new for each instance
  std::string name;  ///< readable, for messages
  Rank rank = 0;
  std::int32_t world_size = 1;
  std::vector<std::string> workers;  ///< address of the reducer inside each worker, by rank
  std::vector<std::string>
      servers;  ///< addresses of the standalone reducers, equal and in equal order on all ranks
  std::string host;                ///< "hostname:pid" of this rank, for messages
  std::vector<std::string> hosts;  ///< of all ranks, for messages; may be empty
  /// By rank: equal texts are ranks that share a host. Empty: every rank has a host of its own.
  std::vector<std::string> places;
  /// Bits per second of the NIC of each rank's host, and of each standalone reducer's; empty: all
  /// NICs are as fast. Ranks of one host share one, and have the same number.
  std::vector<std::uint64_t> worker_bandwidths;
  std::vector<std::uint64_t> server_bandwidths;
  std::string token;  ///< the job's secret, told to reducers in the hello and to nobody else
  Settings settings;
  recorder::Recorder* recorder = nullptr;  ///< null: nothing is recorded. Must outlive the group
};

/// Ends the operations of one call before their time. Thread safety: every method, from any thread.
class Canceller {
 public:
  /// For the group: how an operation is ended; at once, if cancel() has been called.
  void add(std::function<void(const Status&)> end);
  /// Ends what is under way, and what the call still starts, with `why`. Idempotent.
  void cancel(const Status& why);

 private:
  std::mutex mutex_;
  std::vector<std::function<void(const Status&)>> ends_;
  Status why_;  // Ok: not cancelled
};

struct CallOptions {
  std::chrono::milliseconds timeout{1'800'000};
  /// Kept until no byte of inputs and outputs is used any more (which may be after a failed call's
  /// `done`).
  std::shared_ptr<const void> keepalive;
  std::shared_ptr<Canceller> canceller;  ///< may be null
  /// The caller waits for the end at once: where that is faster, its own thread may do the work
  /// before the call returns.
  bool blocking = false;
  /// What the ranks compare and errors name, where a collective is made of another.
  std::optional<Collective> shown_as;
  /// Elements of the whole call, of which this operation is a part: compared among the ranks, too.
  std::optional<std::size_t> whole_count;
  /// Gets the operation's number before `done` is called: equal on all ranks that made the call.
  std::shared_ptr<std::atomic<std::uint64_t>> number;
  /// This is the second step of the collective with that number (which told its size): it may start
  /// at any time, and does not count as a call in the order of calls.
  std::optional<std::uint64_t> second_step;
  /// Of an all-reduce, whatever its size: one of those that the group may choose, else ignored. All
  /// ranks must name the same: the call goes as in a group that knows no other way, and ranks that
  /// disagree about it may not meet before the timeout.
  std::optional<Algorithm> algorithm;
};

/// The job of a group that is made out of another without a word between its ranks: equal on all
/// ranks that give the same parent and the same text, and different from all others.
std::string derivedJob(const std::string& parent, const std::string& text);

/// Called exactly once per operation, from any thread, perhaps before the call that started the
/// operation returns. Must not block and must not throw.
using Done = std::function<void(const Status&)>;
/// The same for a receive; `from` is valid if the status is Ok.
using Received = std::function<void(const Status&, Rank from)>;

struct GroupCounters {
  std::uint64_t operations = 0;
  std::uint64_t pushed_bytes = 0;  ///< payload bytes sent to owners, this process' own included
  std::uint64_t pulled_bytes = 0;
  std::uint64_t outstanding_bytes_max = 0;  ///< high-water mark of chunk bytes in flight
  std::uint64_t window_bytes = 0;           ///< its bound
  std::uint64_t owner_changes = 0;          ///< standalone reducers that were lost, or came back
  std::uint64_t servers = 0;                ///< standalone reducers that take part now
};

/// The collectives. Every call queues the operation and returns; `done` tells the end. All ranks
/// must make the same calls in the same order (send and recv: per pair and tag); when they do not,
/// every rank gets kMismatch naming who called what, inputs are as before, and the group goes on
/// with the next call. Counts are in elements of `dtype`; a zero count is a valid operation. `in`
/// may equal `out`; otherwise they must not overlap.
///
/// Thread safety: any thread; the order of concurrent calls is the order in which they get through.
/// Lifetime: transport and server must outlive the group.
class Group {
 public:
  static Result<std::shared_ptr<Group>> create(GroupConfig config, transport::Transport& transport,
                                               server::ReducerServer& local);
  virtual ~Group() = default;

  virtual void allReduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op,
                         CallOptions options, Done done) = 0;
  /// `out` is used at the root only (elsewhere null is fine).
  virtual void reduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op,
                      Rank root, CallOptions options, Done done) = 0;
  /// In place: read at the root, written elsewhere.
  virtual void broadcast(void* data, std::size_t count, DataType dtype, Rank root,
                         CallOptions options, Done done) = 0;
  virtual void barrier(CallOptions options, Done done) = 0;
  /// outs[r]: room for counts[r] elements, the part of rank r; counts equal on all ranks; `in` has
  /// counts[rank].
  virtual void allGather(const void* in, std::span<void* const> outs,
                         std::span<const std::size_t> counts, DataType dtype, CallOptions options,
                         Done done) = 0;
  /// ins[r]: the counts[r] elements that go into rank r's result; `out` has room for counts[rank].
  virtual void reduceScatter(std::span<const void* const> ins, void* out,
                             std::span<const std::size_t> counts, DataType dtype, ReduceOp op,
                             CallOptions options, Done done) = 0;
  /// outs is used at the root only (empty elsewhere); counts equal on all ranks.
  virtual void gather(const void* in, std::span<void* const> outs,
                      std::span<const std::size_t> counts, DataType dtype, Rank root,
                      CallOptions options, Done done) = 0;
  /// ins is used at the root only (empty elsewhere); counts equal on all ranks.
  virtual void scatter(std::span<const void* const> ins, void* out,
                       std::span<const std::size_t> counts, DataType dtype, Rank root,
                       CallOptions options, Done done) = 0;
  /// ins[r] has in_counts[r] elements for rank r; outs[r] gets out_counts[r] from rank r.
  virtual void allToAll(std::span<const void* const> ins, std::span<const std::size_t> in_counts,
                        std::span<void* const> outs, std::span<const std::size_t> out_counts,
                        DataType dtype, CallOptions options, Done done) = 0;
  /// Done once the receiver has asked for it and the bytes have left. Sending to oneself is
  /// refused.
  virtual void send(const void* in, std::size_t count, DataType dtype, Rank to, std::uint32_t tag,
                    CallOptions options, Done done) = 0;
  virtual void recv(void* out, std::size_t count, DataType dtype, Rank from, std::uint32_t tag,
                    CallOptions options, Done done) = 0;
  /// From the rank whose send of this tag comes first. Receives of one tag get sends in their
  /// order, as in MPI.
  virtual void recvAny(void* out, std::size_t count, DataType dtype, std::uint32_t tag,
                       CallOptions options, Received done) = 0;

  virtual Rank rank() const = 0;
  virtual std::int32_t worldSize() const = 0;
  /// Number of collectives started so far (send and recv not counted).
  virtual std::uint64_t sequence() const = 0;
  virtual GroupCounters counters() const = 0;
  /// The algorithm in use after `auto` was resolved; kAuto: it depends on the size.
  virtual Algorithm algorithm() const = 0;
  /// The algorithm by size, `auto` resolved.
  virtual std::vector<SizeRange> ranges() const { return {{.algorithm = algorithm()}}; }
  /// What `auto` goes by from the next call on, in a group that was made with Settings::measures.
  /// All ranks must call it at the same place in their order of calls, with equal samples, while no
  /// call is under way or made.
  virtual void adopt(const std::vector<Sample>& /*samples*/) {}
  /// What `auto` may choose, in a group that was made with Settings::measures, else empty.
  virtual std::vector<Algorithm> choices() const { return {}; }
  /// What is expected of an all-reduce of so many bytes, each way; empty if nothing was measured.
  virtual std::vector<Estimate> explain(std::uint64_t /*nbytes*/) const { return {}; }

  /// Fails everything outstanding, and every later call, with kAborted and `reason`. Idempotent.
  virtual void abort(const std::string& reason) = 0;
  /// Leaves in good order: fails what is outstanding with kAborted, says goodbye to the owners and
  /// starts to close the connections. Idempotent; the destructor does it too.
  virtual void close() = 0;
  /// Waits (real time) until every connection is closed, for those to standalone reducers half a
  /// second at most. False if not all are.
  virtual bool waitClosed(Duration timeout) = 0;
};

}  // namespace reducer::collective
