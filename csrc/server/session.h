// One worker's connection to a reducer: hello, then pushes; answers leave through it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"
#include "server/server.h"
#include "transport/pulse.h"
#include "transport/transport.h"

namespace reducer::server {

class Session;

/// An attempt to take a lost owner in again: all workers are to have a connection to it, then all
/// are to hold their next operation.
struct Comeback {
  std::uint32_t owner = 0;
  std::uint32_t attempt = 0;
  bool holding = false;
  std::set<Rank> said;          // of the step
  std::uint64_t first_seq = 0;  // the largest of those held
  std::string reached;          // the reducer that all are connected to, as the first has said
  TimePoint deadline;
};

/// What all sessions of a reducer share. The slot table is split in shards, each with its own lock;
/// the group registry's lock is taken at hello and goodbye only.
struct ServerState : std::enable_shared_from_this<ServerState> {
  struct Shard {
    explicit Shard(bool judges) : engine(judges) {}
    std::mutex mutex;
    engine::Engine engine;
  };
  struct GroupRecord {
    std::string name;
    std::int32_t world_size = 0;
    std::uint64_t config = 0;
    std::string config_text;
    std::vector<std::uint32_t> hosts;  // of its ranks
    std::string config_host;           // who set it
    std::uint64_t window_bytes = 0;    // of each worker
    std::string token;                 // of whoever made it
    std::shared_ptr<MemoryAccount> account;
    Charge places;
    std::unordered_map<Rank, std::string> ranks;  // connected: rank -> host
    bool leads = false;                           // this is rank 0's reducer, which keeps:
    std::vector<std::uint32_t> lost;              // owners, rising
    std::uint32_t epoch = 0;                      // changes of `lost`
    std::string why_lost;                         // the latest
    std::optional<Comeback> returning;
    std::uint32_t attempts = 0;
    bool complete = true;  // nobody has left
    // Standalone:
    bool closing = false;  // a worker is lost to it, so all others leave
    TimePoint evict_at = TimePoint::max();
    std::string evict_why;
  };

  ServerState(transport::Transport& transport, ServerOptions options);

  /// A connection that has not said who it is.
  std::shared_ptr<Session> open(std::shared_ptr<transport::Connection> connection, bool local);
  using Account = Result<std::shared_ptr<MemoryAccount>>;
  /// Takes the worker in, and gives its group's account, or says why not.
  Account join(const std::shared_ptr<Session>& session, const wire::Hello& hello);
  /// The part of join() that needs the registry's lock.
  Account admit(const std::shared_ptr<Session>& session, const wire::Hello& hello,
                engine::Actions& actions);
  void leave(const std::shared_ptr<Session>& session, const wire::Hello& hello, const Status& why);
  Status push(const std::shared_ptr<Session>& session, const wire::Frame& frame, Payload payload);
  Status cancel(const std::shared_ptr<Session>& session, const wire::Frame& frame);
  Status settled(const std::shared_ptr<Session>& session, const wire::Frame& frame);
  /// What concerns an operation or a rank, and so any slot.
  template <class Call>
  Status everyShard(const Call& call);
  // Which owners a group has (membership.cc, docs/protocol.md).
  /// A worker has lost owners: that is told to all workers of the group, once.
  void lose(const wire::Hello& hello, const wire::Frame& frame);
  /// A worker has a connection to a lost owner.
  void back(const wire::Hello& hello, const wire::Frame& frame);
  /// A worker holds its next operation.
  void held(const wire::Hello& hello, const wire::Frame& frame);
  /// Standalone: a worker's connection broke, and the others of its group have to leave, too.
  /// Called with the registry's lock held.
  void loseConnection(GroupRecord& record, const wire::Hello& hello, const Status& why);
  /// Rank 0's: a worker is lost, and the others of its group are told.
  void loseWorker(const wire::Hello& hello, const Status& why);
  engine::Joined joined(const std::string& job, Rank rank) const;
  void evict(TimePoint now);
  void expireReturns(TimePoint now);
  /// Closes the connections of the groups that go on without this reducer.
  void handOver();
  std::vector<std::shared_ptr<Session>> sessionsOf(const std::string& job);
  /// What is kept for sending again has to make room.
  void forgetAnswers(const std::string& job);
  static wire::Frame newsOf(const GroupRecord& record);
  /// To one that has just joined.
  void tellLost(const std::shared_ptr<Session>& session, const wire::Hello& hello);
  /// Queues a word to a session, or to all of a job; told() sends it. Called with the registry's
  /// lock held.
  void tell(const std::string& job, wire::Frame frame, std::shared_ptr<Session> session = nullptr);
  /// All that is queued, in order. Called without locks.
  void told();
  void beat(TimePoint now);
  void tick(TimePoint now);
  /// Sums what is ready and sends all answers. No lock is held.
  void perform(engine::Actions actions);
  void deliver(engine::Outgoing out);

  transport::Transport& transport;
  const ServerOptions options;
  const TimePoint started;
  std::vector<std::unique_ptr<Shard>> shards;
  const std::shared_ptr<MemoryLimit> memory;
  const std::shared_ptr<engine::BufferPool> pool = engine::BufferPool::create();

  std::mutex registry_mutex;
  std::condition_variable session_gone;
  std::unordered_map<std::string, GroupRecord> groups;  // by job
  std::unordered_set<std::shared_ptr<Session>> sessions;
  std::unordered_map<std::shared_ptr<Session>, TimePoint> silent;  // no hello yet: since when
  bool draining = false;
  Absentees absentees;
  struct News {
    std::string job;
    wire::Frame frame;
    std::shared_ptr<Session> session;  // null: all of the job
  };
  std::deque<News> news;
  bool telling = false;

  std::atomic<std::uint64_t> pushed_bytes{0};
  std::atomic<std::uint64_t> result_bytes{0};
  std::atomic<std::uint64_t> refused{0};
  std::atomic<std::uint64_t> damaged{0};
};

/// Thread safety: as transport::Handler; answer() from any thread.
class Session final : public transport::Handler,
                      public engine::Peer,
                      public std::enable_shared_from_this<Session> {
 public:
  Session(std::shared_ptr<ServerState> state, std::shared_ptr<transport::Connection> connection,
          bool local)
      : state_(std::move(state)), connection_(std::move(connection)) {
    in_process = local;
  }

  void onFrame(wire::Frame frame, Payload payload) override;
  void onClosed(const Status& reason) override;

  void answer(const wire::Frame& frame, Payload payload);
  /// Answers with an error and closes.
  void refuse(Code code, const std::string& text);
  void close(const Status& reason, bool flush) { connection_->close(reason, flush); }
  void send(const wire::Frame& frame) { connection_->send(frame, {}); }
  /// Of its hello; empty before.
  std::string job();
  /// False: its group does not go on without this reducer.
  bool failsOver();
  void forgetAnswers();
  /// Says that this end lives, and closes if the worker has been silent for too long.
  void beat(TimePoint now);

 private:
  /// What has been answered and has not left this process, because the worker does not read it.
  struct Unread {
    std::atomic<std::int64_t> bytes{0};
    std::atomic<std::int64_t> text_bytes{0};
    std::atomic<std::int64_t> frames{0};
  };
  /// A result, for the case that it comes damaged.
  struct Answered {
    wire::Frame frame;
    Payload payload;
    Charge charge;
  };
  void deliver(const wire::Frame& frame, Payload payload);
  /// A frame that waits for a damaged one before it, or that one's place.
  struct Held {
    wire::Frame frame;
    Payload payload;
    bool missing = false;
    Charge charge;
  };
  static bool isDamaged(const wire::Frame& frame, const Payload& payload);
  Status holdBack(const wire::Frame& frame, Payload payload);
  std::deque<Held>::iterator findMissing(const wire::SlotId& slot, std::optional<bool> again);
  Status workOff();
  void remember(const wire::Frame& frame, const Payload& payload);
  Status resend(const wire::SlotId& slot);
  /// The payload of an answer, counted until its bytes have left.
  Payload counted(const wire::Frame& frame, const Payload& payload, Charge charge);
  /// What the worker has pushed and what it has not read are what was promised to it: its window,
  /// twice (as long as bytes have been received, and this end is about to hear of it, they count
  /// here, and the worker may have pushed as many anew).
  bool withinPromise() const;
  Status dispatch(const wire::Frame& frame, Payload payload);
  Status handle(const wire::Frame& frame, Payload payload);
  Status onMembership(const wire::Frame& frame);
  Status push(const wire::Frame& frame, Payload payload);
  Status pushed(const wire::Frame& frame, Payload payload);
  Status again(const wire::Frame& frame, Payload payload);
  /// What a push takes up is on the group's account.
  Status charge(const wire::Frame& frame, Payload& payload);
  Status noMemory() const;
  /// Windows that the worker may have outstanding: one more for each change of owners that it has
  /// not got over.
  std::uint64_t windows() const;
  Status hello(const wire::Hello& hello);
  /// Bytes of the frame that count against the worker's window.
  std::int64_t windowed(const wire::Frame& frame) const;

  const std::shared_ptr<ServerState> state_;
  const std::shared_ptr<transport::Connection> connection_;
  std::mutex mutex_;  // membership against a local connection's concurrent frames
  wire::Hello hello_;
  bool joined_ = false;
  std::shared_ptr<MemoryAccount> account_;  // set with it, never changed
  bool refused_ = false;
  std::atomic<bool> said_bye_{false};
  std::atomic<std::int64_t> outstanding_bytes_{0};
  std::atomic<std::int64_t> outstanding_frames_{0};
  const std::shared_ptr<Unread> unread_ = std::make_shared<Unread>();
  std::atomic<std::uint32_t> epoch_{0};  // the latest of its frames
  /// Nothing that moved here before this one is outstanding.
  std::atomic<std::uint32_t> settled_epoch_{0};
  std::atomic<std::uint32_t> calm_epoch_{0};
  transport::Pulse pulse_;
  // Frames come one at a time but for those of this process, of which none is damaged.
  int damaged_in_row_ = 0;
  std::deque<Held> backlog_;
  std::size_t backlog_bytes_ = 0;
  std::mutex answered_mutex_;
  std::deque<Answered> answered_;  // with checksums: the latest
  std::size_t answered_bytes_ = 0;
  // Of what came again since it last settled.
  std::atomic<std::uint64_t> again_bytes_{0};
  std::atomic<std::uint64_t> again_frames_{0};
};

}  // namespace reducer::server
