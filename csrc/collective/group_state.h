// What a group shares between its calls: owners, sequence numbers, operations under way, and their
// failure.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collective/group.h"
#include "collective/host_stage.h"
#include "collective/link.h"
#include "collective/operation.h"
#include "collective/receives.h"
#include "collective/routes.h"
#include "common/placement.h"
#include "engine/describe.h"

namespace reducer::collective {

/// Thread safety: every method, from any thread.
class GroupState final : public LinkEvents,
                         public Links,
                         public recorder::Source,
                         public std::enable_shared_from_this<GroupState> {
 public:
  GroupState(GroupConfig config, transport::Transport& transport, server::ReducerServer& local);
  ~GroupState() override;

  /// Told once, when nothing more can work in this group, and why. To be set before start().
  void whenBroken(std::function<void(const Status&)> told) { when_broken_ = std::move(told); }
  /// Told what is said of a rank that has left in good order, once or more. To be set before
  /// start().
  void whenLeft(std::function<void(const std::string&)> told) { when_left_ = std::move(told); }

  /// Asked for the last collective that a rank has joined in another way than over links. To be set
  /// before start().
  void joinedBy(std::function<engine::Joined(Rank)> asked) { joined_by_ = std::move(asked); }

  /// Connects to the owners and starts the clock. Once, right after construction.
  void start();

  /// Cuts one operation: gets its number, returns its transfers.
  using Cut = std::function<std::vector<Transfer>(std::uint64_t seq)>;

  /// Numbers the operation in its lane (or takes the number that is given) and starts it.
  void run(const wire::Call& call, std::uint64_t lane, CallOptions options, Done done,
           const Cut& cut, std::optional<std::uint64_t> number = {});
  /// Starts a receive from rank `from`, or kAllRanks: from the rank whose send comes first. A
  /// receive with a sender starts at once, unless one from any rank waits before it. `start` gets
  /// the sender and the number in the pair's lane, none: it is to be numbered as usual.
  void receive(Rank from, std::uint32_t tag, const wire::Call& call, Duration timeout,
               std::function<void(Rank from, std::optional<std::uint64_t> number)> start,
               std::function<void(const Status&)> fail,
               const std::shared_ptr<Canceller>& canceller);
  /// The ring of the all-reduce with that number.
  void runRing(const wire::Call& call, std::byte* out, std::uint64_t number, CallOptions options,
               Done done);

  /// What a collective of so many bytes goes by in two levels; null: in one. `owned`: with a strip
  /// for each rank. Equal on all ranks.
  const ShardMap* rails(const Routes::Route& route, std::size_t nbytes, bool owned) const;
  const Placement& placement() const { return placement_; }
  void runTwoLevel(const wire::Call& call, const ShardMap& rails, std::vector<Strip> strips,
                   CallOptions options, Done done);

  void onOperationError(const wire::SlotId& slot, const Status& status, Rank lost) override;
  void onLate(const wire::Frame& frame) override;
  void onLinkDown(OwnerIndex owner, const Status& reason) override;
  void onArrived(const wire::SlotId& slot) override;
  void onLeft(Rank rank) override;
  void onNews(const wire::Frame& frame) override;
  void onWelcome(OwnerIndex owner) override;
  void onLinkClosed() override;

  std::uint64_t called() override { return sequence_; }
  std::vector<std::string> waitsFor(std::uint64_t lane, std::uint64_t seq) override;
  /// In the flight recorder.
  std::uint32_t recorded() const { return recorded_; }

  void pump(const std::vector<OwnerIndex>& owners) override;
  TimePoint now() const override { return transport_.now(); }

  /// Rounds under way in an all-reduce over a route's map that is cut like this. (What does not
  /// push or pull everywhere is answered sooner, and must not be learned from.)
  std::shared_ptr<Depth> depth(const Routes::Route& route, const Plan& plan) const {
    return depths_[2 * route.map + (plan.full_chunks ? 1 : 0)];
  }

  /// Group::adopt().
  void adopt(const std::vector<Sample>& samples) { routes_.adopt(samples); }
  void abort(const Status& reason);
  void close();
  bool waitClosed(Duration timeout);

  const GroupConfig& config() const { return config_; }
  const Routes& routes() const { return routes_; }
  /// A transfer that one owner has to itself.
  Plan planFor(OwnerIndex owner, std::uint64_t nbytes) const;
  std::uint64_t sequence() const { return sequence_; }
  GroupCounters counters();

 private:
  using OperationId = std::pair<std::uint64_t, std::uint64_t>;  // lane, seq
  using Queued = std::vector<std::pair<OwnerIndex, Cursor>>;

  static std::uint32_t enroll(const GroupConfig& config);
  std::shared_ptr<Link> makeLink(OwnerIndex owner, const std::string& settings_text);
  std::shared_ptr<HostStage> makeStage();
  std::shared_ptr<HostStage> stage();
  /// Makes the operation with its number and queues its pieces; all under one lock, so that every
  /// link has the operations in the order of their numbers.
  template <class Make>
  void launch(const wire::Call& call, std::uint64_t lane, CallOptions options, Done done,
              std::optional<std::uint64_t> number, Make make);
  /// To the owners that stand for the plan's now. Called with the lock held.
  Status enqueue(Queued queued, std::vector<OwnerIndex>& owners);

  // Failover (failover.cc, comeback.cc; docs/protocol.md).
  /// An owner's, as this rank knows it.
  struct Standing {
    enum class Link { kNone, kOpening, kOpen };
    bool lost = false;
    std::uint64_t since = 0;  // operations before this one are none of its business
    // While it is lost:
    Link link = Link::kNone;
    std::uint32_t attempt = 0;  // of rank 0's reducer, to take it in again; 0: none
    TimePoint retry_at;         // rank 0 looks for it
    Duration patience{};
    bool by_name = false;  // it is looked for where its name points to now
    bool told = false;     // that it refuses the group
    int fruitless = 0;     // attempts in a row that some worker could not follow
  };
  /// What a change of owners leaves to be done without the lock.
  struct Change {
    std::vector<OwnerIndex> lost;
    std::vector<OwnerIndex> back;
    std::vector<OwnerIndex> waiting;    // rank 0 has a connection to them, and nobody has asked
    std::vector<OwnerIndex> unreached;  // by some worker, time and again
    std::size_t left = 0;               // standalone reducers that take part now
    std::vector<Link::Taken> taken;
    /// What cannot go on, and why.
    std::vector<std::pair<std::shared_ptr<Operation>, Status>> orphans;
    std::vector<std::shared_ptr<Operation>> started;  // that were held
    Queued rest;                                      // of those that are over
  };
  static constexpr Duration kFirstPatience = std::chrono::milliseconds(500);
  /// Attempts after which somebody should know, and less is to be spent on them.
  static constexpr int kFruitlessMax = 3;
  static constexpr Duration kFruitlessPatience = std::chrono::seconds(30);

  // All of these are called with the lock held.
  bool isMember(OwnerIndex owner, std::uint64_t seq) const {
    return !standing_[owner].lost && standing_[owner].since <= seq;
  }
  std::size_t serversLeft() const;
  void adoptMembers(const wire::Frame& frame, Change& change);
  /// When rank 0 looks for a lost owner again.
  void tryLater(Standing& standing, Duration longest);
  /// Leaves a lost owner again, whatever had been achieved.
  void giveUpComeback(OwnerIndex owner, std::vector<Link::Taken>& taken);
  /// What waited starts.
  void endHold(Change& change);
  /// The first owner of a piece's preference that is a member.
  OwnerIndex heirOf(std::uint64_t key) const;
  /// Where the rounds of a cursor go instead of to a lost owner.
  Queued heirsOf(const Cursor& cursor) const;
  Queued withHeirs(Queued queued) const;
  /// Moves what the owners had that are lost now, in the epoch that has begun.
  void move(Change& change);
  /// Whom pieces may move to.
  std::vector<OwnerIndex> heirs() const;
  // These without it.
  bool isServer(OwnerIndex owner) const {
    return owner >= static_cast<OwnerIndex>(config_.world_size);
  }
  bool failsOver() const { return config_.settings.failover && !config_.servers.empty(); }
  bool losable(OwnerIndex owner) const { return isServer(owner) && failsOver(); }
  bool isAway(OwnerIndex owner);
  const std::string& addressOf(OwnerIndex owner) const {
    return isServer(owner) ? config_.servers[owner - static_cast<OwnerIndex>(config_.world_size)]
                           : config_.workers[owner];
  }
  /// Does not wait to connect to what another group of the process has lost.
  void missAbsentees(TimePoint now);
  /// This group looks for nobody any more.
  void stopLooking();
  /// False: no standalone reducer ever was, and the group has done nothing yet, which is a mistake
  /// in their addresses.
  bool anyReachable();
  void pumpHeirs();
  void releaseHold();
  void reportLost(OwnerIndex owner, const Status& reason);
  void abortUndecided(OwnerIndex owner, const std::string& why);
  void onEpoch(const wire::Frame& frame);
  void onBack(const wire::Frame& frame);
  void onHold(const wire::Frame& frame);
  /// A lost owner that was connected to again is gone once more, or could not be reached.
  void comebackFailed(OwnerIndex owner, const Status& reason);
  /// Rank 0: tries to connect to those that are lost.
  void lookForLost(TimePoint now);
  /// To rank 0's reducer.
  bool tellLeader(wire::FrameKind kind, OwnerIndex owner, std::uint32_t attempt,
                  const std::string& text);
  /// That this rank has a connection to it.
  void tellBack(OwnerIndex owner, std::uint32_t attempt);
  void warn(const Change& change, const std::string& why) const;

  // A worker is lost (worker_loss.cc). Without the lock.
  std::string nameOfRank(Rank rank) const;
  /// The last collective that a rank has joined, as far as is known here.
  engine::Joined joined(Rank rank);
  /// Ends the group. `what`: "rank 2 (c:97) of group 'default' was lost (...)".
  void loseWorker(Rank rank, const std::string& what, engine::Joined told);

  /// For the flight recorder (recording.cc): how a call goes.
  std::string_view wayOf(const wire::Call& call, std::uint64_t lane,
                         const CallOptions& options) const;
  /// A receive that waits to learn who sends, or behind one that does.
  std::shared_ptr<recorder::Record> recordReceive(Rank from, std::uint32_t tag,
                                                  const wire::Call& call);

  /// Of an operation that starts now. Called with the lock held.
  std::uint64_t nextNumber(std::uint64_t lane);
  /// Called with the lock held; its result is to be started without.
  std::vector<Receives::Match> matchReceives(std::uint32_t tag);
  void fail(const std::shared_ptr<Operation>& operation, const Status& status);
  void tick(TimePoint now);
  std::string describeWait(const Operation& operation, TimePoint now);
  std::vector<std::shared_ptr<Operation>> operations();

  const GroupConfig config_;
  const std::uint32_t recorded_;
  transport::Transport& transport_;
  server::ReducerServer& local_;
  const Placement placement_;
  Routes routes_;                               // changes in adopt() only
  const std::vector<ShardMap> rails_;           // by Route::map; empty: there is one level
  std::vector<std::shared_ptr<Depth>> depths_;  // two by Route::map; constant
  std::vector<std::shared_ptr<Link>> links_;    // by OwnerIndex; constant after start()
  std::size_t smallest_window_ = 0;             // of the links

  std::mutex mutex_;
  std::map<OperationId, std::weak_ptr<Operation>> operations_;
  std::map<std::uint64_t, std::uint64_t> pair_sequences_;  // next number, by lane
  Receives receives_;
  struct WorkerLost {
    Rank rank = kAllRanks;
    std::string text;
    engine::Joined joined;
    TimePoint at;
  };
  WorkerLost worker_lost_;   // as rank 0's reducer says
  engine::Joined finished_;  // the last collective that was done, and so joined by all
  TimePoint started_;
  std::vector<Standing> standing_;       // by OwnerIndex
  std::atomic<std::uint32_t> epoch_{0};  // changes of owners
  bool stopped_looking_ = false;
  bool holding_ = false;              // no collective starts
  std::vector<Queued> held_;          // what would have, in order
  std::shared_ptr<HostStage> stage_;  // since the first operation that needs it
  std::int32_t workers_left_ = 0;     // said goodbye
  std::atomic<std::uint64_t> sequence_{0};
  Status broken_;
  std::function<void(const Status&)> when_broken_;
  std::function<void(const std::string&)> when_left_;
  std::function<engine::Joined(Rank)> joined_by_;
  std::condition_variable link_closed_;
  std::unique_ptr<transport::Timer> ticker_;
};

}  // namespace reducer::collective
