// What of a local group outlives its handle: the team, and the operations in their order.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collective/group.h"
#include "engine/describe.h"
#include "local/exchange.h"
#include "local/team.h"
#include "wire/frame.h"

namespace reducer::collective {

class GroupState;
class LocalOperations;

/// A call, and what all ranks compare of it.
struct LocalCall {
  wire::Call shown;
  std::uint64_t count = 0;  ///< elements of this operation, where `shown` has those of a larger one
  std::uint64_t shape = 0;  ///< digest of the parts' sizes
  std::uint64_t in_bytes = 0;
  std::uint64_t out_bytes = 0;
};

/// One operation under way, which is also what ends its waits early. Thread safety: end() and
/// cancel(), from any thread; look(), from the thread that runs it.
class LocalOperation final : public local::Watch {
 public:
  LocalOperation(std::shared_ptr<LocalOperations> owner, const LocalCall& call, CallOptions options,
                 Done done);

  Status look(TimePoint now, bool slept) override;
  TimePoint deadline() const override { return deadline_; }

  /// From waiting to running. False: it has been cancelled.
  bool begin();
  /// Tells the caller, once.
  void end(const Status& status);
  void cancel(const Status& why);

  /// Takes the caller's part back, for another group to run the call; nothing if it has ended.
  std::optional<std::pair<CallOptions, Done>> release();
  /// Why it was cancelled.
  Status why();
  void tellNumber();

  /// Places that have not come to this operation, and those that have, as far as is known. Before
  /// the ranks have met, from the thread that runs it.
  struct Presence {
    std::vector<std::uint32_t> missing;
    std::vector<std::uint32_t> here;
  };
  Presence presence() const;

  /// Its number is known: it is in the flight recorder from now on. `here`: it starts at once.
  void enterRecord(recorder::Recorder* recorder, std::uint32_t group, bool here);

  std::uint32_t number = 0;
  const LocalCall call;
  const std::chrono::milliseconds timeout;

 private:
  enum class State { kWaiting, kRunning, kEnded };

  std::string title() const;
  Status tooLate(TimePoint now);
  Status lacks(const local::Team::Gone& gone);
  void warnOfLate(TimePoint now);
  Status differs(TimePoint now);

  const std::shared_ptr<LocalOperations> owner_;
  const TimePoint started_ = Clock::now();
  const TimePoint deadline_;
  TimePoint late_at_;
  TimePoint differs_since_ = TimePoint::max();
  std::mutex mutex_;
  CallOptions options_;
  Done done_;
  State state_ = State::kWaiting;
  Status why_;                              // Ok: not cancelled
  std::optional<recorder::Record> record_;  // constant since it has its number
};

/// Thread safety: every method, from any thread.
class LocalOperations final : public recorder::Source,
                              public std::enable_shared_from_this<LocalOperations> {
 public:
  using OnNetwork = std::function<void(Group& network, CallOptions options, Done done)>;

  /// `state`: of the network's group.
  LocalOperations(const std::shared_ptr<GroupState>& state, std::shared_ptr<Group> network);
  ~LocalOperations() override;

  /// Numbers the call and runs it in its turn: `make` gives its Job, and is called before this
  /// returns; `on_network` runs it on the network, and is kept if that may become necessary.
  template <class Make, class Otherwise>
  void start(const LocalCall& call, CallOptions options, Done done, const Make& make,
             Otherwise on_network);

  /// Fails everything under way, and every later call.
  void breakWith(const Status& why);
  /// The same, and leaves: the other ranks are told.
  void close();
  /// A rank has left: those that have not met it never will. `who`: what is said of it.
  void left(const std::string& who);
  /// Empty: none has left.
  std::string whoLeft();
  /// Waits for the thread, unless this is it.
  void join();

  /// The last collective that a rank has joined here.
  engine::Joined joined(Rank rank) const;

  std::uint64_t called() override { return sequence(); }
  std::vector<std::string> waitsFor(std::uint64_t lane, std::uint64_t seq) override;

  std::uint64_t sequence();
  GroupCounters counters();
  bool onNetwork();

  const GroupConfig& config() const { return config_; }
  local::Team& team() { return team_; }
  const local::Exchange& exchange() const { return exchange_; }
  local::Seat seat() const { return {team_.place(), team_.size()}; }

 private:
  struct Item {
    std::shared_ptr<LocalOperation> operation;
    std::unique_ptr<local::Job> job;
    OnNetwork on_network;
  };

  /// With the lock held: what happens to a call.
  enum class Way { kBroken, kNetwork, kHere, kQueue };
  Way admit(LocalOperation& operation, bool blocking, Status& broken);
  void enqueue(Item item);
  static void listen(const std::shared_ptr<Canceller>& canceller,
                     const std::shared_ptr<LocalOperation>& operation);

  void work();
  void process(Item item);
  void perform(const std::shared_ptr<LocalOperation>& operation, local::Job& job);
  void passOn(Item item);
  void handOver(const Item& item);
  void spendOnNetwork();
  void idle();
  Status mismatch(const LocalOperation& operation) const;

  const GroupConfig config_;
  const std::uint32_t recorded_;
  const int pid_;
  const std::shared_ptr<Group> network_;
  const std::weak_ptr<GroupState> state_;  // of the network
  const local::Exchange::Layout layout_;
  local::Team team_;
  local::Exchange exchange_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::shared_ptr<LocalOperation> current_;
  bool busy_ = false;
  bool closing_ = false;
  bool on_network_ = false;  // the ranks cannot share memory
  std::uint64_t next_ = 0;
  std::uint64_t missed_ = 0;  // calls that ended before the team met
  GroupCounters counters_;
  Status broken_;
  std::string left_;  // the first rank that did
  std::thread thread_;
};

template <class Make, class Otherwise>
void LocalOperations::start(const LocalCall& call, CallOptions options, Done done, const Make& make,
                            Otherwise on_network) {
  const bool blocking = options.blocking;
  const auto canceller = options.canceller;
  const auto operation = std::make_shared<LocalOperation>(shared_from_this(), call,
                                                          std::move(options), std::move(done));
  Status broken;
  Way way;
  {
    const std::lock_guard lock(mutex_);
    way = admit(*operation, blocking, broken);
    if (way == Way::kHere) current_ = operation;
    if (way == Way::kQueue) {
      using Made = decltype(make());
      enqueue({operation, std::unique_ptr<local::Job>(new Made(make())), std::move(on_network)});
    }
  }
  if (way == Way::kBroken) return operation->end(broken);
  if (way == Way::kNetwork) {
    auto callers = operation->release();
    return on_network(*network_, std::move(callers->first), std::move(callers->second));
  }
  listen(canceller, operation);
  if (way != Way::kHere) return;
  if (operation->begin()) {
    auto job = make();
    perform(operation, job);
  } else {
    team_.giveUp(operation->number, operation->why());
  }
  idle();
}

}  // namespace reducer::collective
