#include "collective/local_operations.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "collective/group_state.h"
#include "common/hexadecimal.h"
#include "engine/describe.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

// As in the engine: how long different calls wait for more ranks to show theirs.
constexpr Duration kMismatchGrace = std::chrono::milliseconds(300);
// What a deadline may be away at most, so that it can be added to the time.
constexpr auto kLongest = std::chrono::hours(24 * 365);

local::Team::Config teamOf(const GroupConfig& config, std::size_t area_bytes) {
  local::Team::Config team;
  team.name = hexadecimal(config.job);
  for (Rank rank = 0; rank < config.world_size; ++rank) team.ranks.push_back(rank);
  team.place = static_cast<std::uint32_t>(config.rank);
  team.host = config.host;
  team.area_bytes = area_bytes;
  return team;
}

local::CallWords wordsOf(const LocalCall& call) {
  const wire::Call& shown = call.shown;
  return {static_cast<std::uint64_t>(shown.collective) | static_cast<std::uint64_t>(shown.op) << 8 |
              static_cast<std::uint64_t>(shown.dtype) << 16 |
              static_cast<std::uint64_t>(static_cast<std::uint32_t>(shown.root)) << 32,
          shown.count, call.count, call.shape, 0};
}

wire::Call callOf(const local::CallWords& words) {
  wire::Call call;
  call.collective = static_cast<Collective>(words[0] & 0xFF);
  call.op = static_cast<ReduceOp>(words[0] >> 8 & 0xFF);
  call.dtype = static_cast<DataType>(words[0] >> 16 & 0xFF);
  call.root = static_cast<Rank>(static_cast<std::uint32_t>(words[0] >> 32));
  call.count = words[1];
  return call;
}

std::vector<std::string> namesOf(const local::Team& team,
                                 const std::vector<std::uint32_t>& places) {
  std::vector<std::string> names;
  for (const std::uint32_t place : places) names.push_back(team.name(place));
  return names;
}

}  // namespace

// ------------------------------------------------------------------ one operation

LocalOperation::LocalOperation(std::shared_ptr<LocalOperations> owner, const LocalCall& the_call,
                               CallOptions options, Done done)
    : call(the_call),
      timeout(options.timeout),
      owner_(std::move(owner)),
      deadline_(started_ + std::min<Duration>(timeout, kLongest)),
      late_at_(started_ + (deadline_ - started_) / 3),
      options_(std::move(options)),
      done_(std::move(done)) {}

bool LocalOperation::begin() {
  const std::lock_guard lock(mutex_);
  if (state_ != State::kWaiting) return false;
  state_ = State::kRunning;
  record_->started();
  return true;
}

void LocalOperation::enterRecord(recorder::Recorder* recorder, std::uint32_t group, bool here) {
  record_.emplace(recorder, here, [&](recorder::Entry& entry) {
    entry.group = group;
    entry.seq = number;
    entry.call = call.shown;
    entry.algorithm = nameOf(Algorithm::kLocal);
    entry.queued = started_;
    if (here) {
      entry.started = started_;
      entry.state = recorder::State::kStarted;
    }
  });
}

std::optional<std::pair<CallOptions, Done>> LocalOperation::release() {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kEnded) return std::nullopt;
  state_ = State::kEnded;
  if (record_) record_->passedOn();
  return std::pair(std::move(options_), std::move(done_));
}

Status LocalOperation::why() {
  const std::lock_guard lock(mutex_);
  return why_;
}

void LocalOperation::tellNumber() {
  if (options_.number) *options_.number = number;
}

void LocalOperation::end(const Status& status) {
  // Let go behind `done`: what keeps the memory knows on which thread it may be released.
  CallOptions options;
  Done done;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kEnded) return;
    state_ = State::kEnded;
    done = std::move(done_);
    options = std::move(options_);
  }
  if (record_) record_->ended(status);
  done(status);
}

void LocalOperation::cancel(const Status& why) {
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kEnded) return;
    if (why_.ok()) why_ = why;
    if (state_ == State::kRunning) {
      // The thread that runs it notices, and ends it.
      if (owner_->team().attached()) owner_->team().giveUp(number, why);
      return;
    }
  }
  end(why);
}

Status LocalOperation::look(TimePoint now, bool slept) {
  {
    const std::lock_guard lock(mutex_);
    if (!why_.ok()) return why_;
  }
  if (now >= deadline_) return tooLate(now);
  const local::Team& team = owner_->team();
  if (now >= late_at_) warnOfLate(now);
  if (!team.attached()) {
    const std::string who = owner_->whoLeft();
    return who.empty() ? Status() : Status(Code::kUnavailable, title() + ": " + who);
  }
  if (!slept) return {};
  if (const auto gone = team.gone()) return lacks(*gone);
  return differs(now);
}

std::string LocalOperation::title() const {
  return engine::nameCollective(owner_->config().name, number) + ", " +
         engine::describe(call.shown);
}

Status LocalOperation::lacks(const local::Team::Gone& gone) {
  const bool joined = owner_->exchange().callOf(gone.place, number).has_value();
  record_->waitedFor({owner_->team().name(gone.place)});
  std::string text = title() + ": " + gone.text + (joined ? " in it" : " before it joined in");
  if (gone.died) {
    text += engine::describeJoined(owner_->joined(owner_->team().rankAt(gone.place)));
  }
  return Status(Code::kUnavailable, text);
}

LocalOperation::Presence LocalOperation::presence() const {
  const local::Team& team = owner_->team();
  const std::vector<std::uint32_t> unmet =
      team.attached() ? std::vector<std::uint32_t>() : team.missing();
  Presence presence;
  for (std::uint32_t place = 0; place < team.size(); ++place) {
    const bool absent = team.attached()
                            ? !owner_->exchange().callOf(place, number)
                            : std::find(unmet.begin(), unmet.end(), place) != unmet.end();
    (absent ? presence.missing : presence.here).push_back(place);
  }
  return presence;
}

/// The lowest rank that is here says who is not. (Before the ranks have met they know of place 0
/// alone whether it is there.)
void LocalOperation::warnOfLate(TimePoint now) {
  late_at_ = TimePoint::max();
  const local::Team& team = owner_->team();
  const Presence presence = this->presence();
  if (presence.missing.empty()) return;
  const std::string text =
      engine::describeLate(engine::nameCollective(owner_->config().name, number), call.shown,
                           now - started_, deadline_ - started_, namesOf(team, presence.missing));
  record_->late(text);
  if (presence.here.front() != team.place() || !owner_->config().settings.warns) return;
  std::fprintf(stderr, "reducer: warning: %s\n", text.c_str());
}

Status LocalOperation::tooLate(TimePoint now) {
  const local::Team& team = owner_->team();
  const Presence presence = this->presence();
  if (presence.missing.empty()) {
    return Status(Code::kTimeout, title() + ": timeout after " + engine::seconds(now - started_) +
                                      ": all ranks are there, but one stopped on the way");
  }
  record_->waitedFor(namesOf(team, presence.missing));
  const std::string operation = engine::nameCollective(owner_->config().name, number);
  const std::string trouble = team.attached() ? "" : team.trouble();
  return Status(Code::kTimeout, engine::describeWait(operation, call.shown, now - started_,
                                                     namesOf(team, presence.missing),
                                                     namesOf(team, presence.here)) +
                                    (trouble.empty() ? "" : "; on this rank " + trouble));
}

/// Those who wait say soon that their calls differ, even if a rank never comes.
Status LocalOperation::differs(TimePoint now) {
  const local::CallWords own = wordsOf(call);
  const local::Team& team = owner_->team();
  std::vector<engine::Called> called;
  bool different = false;
  for (std::uint32_t place = 0; place < team.size(); ++place) {
    const auto words = owner_->exchange().callOf(place, number);
    if (!words) continue;
    different |= *words != own;
    called.push_back({team.name(place), collective::callOf(*words)});
  }
  if (!different) return {};
  if (differs_since_ == TimePoint::max()) differs_since_ = now;
  if (now - differs_since_ < kMismatchGrace) return {};
  return Status(
      Code::kMismatch,
      engine::describeMismatch(engine::nameCollective(owner_->config().name, number), called));
}

// ------------------------------------------------------------------ all of them

LocalOperations::LocalOperations(const std::shared_ptr<GroupState>& state,
                                 std::shared_ptr<Group> network)
    : config_(state->config()),
      recorded_(state->recorded()),
      pid_(getpid()),
      network_(std::move(network)),
      state_(state),
      layout_(local::Exchange::Layout::of(config_.world_size, config_.settings.chunk_bytes)),
      team_(teamOf(config_, layout_.areaBytes())),
      exchange_(team_, layout_) {}

LocalOperations::~LocalOperations() {
  // In a forked child there is no such thread; and one that runs holds this object.
  if (!thread_.joinable()) return;
  if (getpid() != pid_) {
    static_cast<void>(new std::thread(std::move(thread_)));
  } else {
    thread_.detach();
  }
}

LocalOperations::Way LocalOperations::admit(LocalOperation& operation, bool blocking,
                                            Status& broken) {
  if (!broken_.ok()) {
    broken = broken_;
    return Way::kBroken;
  }
  if (on_network_) return Way::kNetwork;
  operation.number = static_cast<std::uint32_t>(next_++);
  operation.tellNumber();
  const bool here = blocking && !busy_ && queue_.empty() && team_.attached();
  operation.enterRecord(config_.recorder, recorded_, here);
  counters_.pushed_bytes += operation.call.in_bytes;
  counters_.pulled_bytes += operation.call.out_bytes;
  if (!here) return Way::kQueue;
  busy_ = true;
  return Way::kHere;
}

void LocalOperations::enqueue(Item item) {
  queue_.push_back(std::move(item));
  if (!thread_.joinable()) {
    thread_ = std::thread([self = shared_from_this()] { self->work(); });
  }
  changed_.notify_one();
}

void LocalOperations::listen(const std::shared_ptr<Canceller>& canceller,
                             const std::shared_ptr<LocalOperation>& operation) {
  if (!canceller) return;
  canceller->add([weak = std::weak_ptr(operation)](const Status& why) {
    if (const auto under_way = weak.lock()) under_way->cancel(why);
  });
}

void LocalOperations::work() {
  while (true) {
    Item item;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return (closing_ || !queue_.empty()) && !busy_; });
      if (queue_.empty()) return;
      item = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      current_ = item.operation;
    }
    process(std::move(item));
    idle();
  }
}

void LocalOperations::idle() {
  const std::lock_guard lock(mutex_);
  busy_ = false;
  current_.reset();
  if (closing_ || !queue_.empty()) changed_.notify_one();
}

void LocalOperations::process(Item item) {
  LocalOperation& operation = *item.operation;
  if (!operation.begin()) {  // cancelled while it waited; its number is spent on all ranks
    team_.giveUp(operation.number, operation.why());
    if (!team_.attached()) ++missed_;
    return;
  }
  if (!team_.attached()) {
    if (Status status = team_.attach(operation); !status.ok()) {
      team_.giveUp(operation.number, status);
      ++missed_;
      operation.end(status);
      return;
    }
    if (!team_.attached()) return passOn(std::move(item));
  }
  perform(item.operation, *item.job);
}

void LocalOperations::perform(const std::shared_ptr<LocalOperation>& operation, local::Job& job) {
  Status status = exchange_.run(operation->number, wordsOf(operation->call), job, *operation);
  if (status.code() == Code::kMismatch && status.message().empty()) status = mismatch(*operation);
  // A rank that died is needed by every call to come; one that left only by those it has to join.
  if (status.code() == Code::kUnavailable) {
    if (const auto gone = team_.gone(); gone && gone->died) {
      operation->end(status);
      breakWith(status);
      if (const auto state = state_.lock()) state->abort(status);
      return;
    }
  }
  operation->end(status);
}

Status LocalOperations::mismatch(const LocalOperation& operation) const {
  std::vector<engine::Called> called;
  for (std::uint32_t place = 0; place < team_.size(); ++place) {
    const auto words = exchange_.callOf(place, operation.number);
    if (!words) {
      return Status(Code::kMismatch,
                    "ranks made different calls in " +
                        engine::nameCollective(config_.name, operation.number) +
                        ", which are not known any more: some have given up what followed");
    }
    called.push_back({team_.name(place), callOf(*words)});
  }
  return Status(
      Code::kMismatch,
      engine::describeMismatch(engine::nameCollective(config_.name, operation.number), called));
}

/// The ranks have found that they cannot share memory. All that is queued goes to the network, in
/// its order, and so does all that comes.
void LocalOperations::passOn(Item item) {
  const std::string why = team_.refusal().message();
  if (config_.settings.carrier == Carrier::kShm) {
    const Status status(Code::kUnavailable,
                        "REDUCER_TRANSPORT is 'shm', and the ranks of this host cannot share "
                        "memory: " +
                            why + "; mend that, or allow the network with 'auto'");
    item.operation->end(status);
    return breakWith(status);
  }
  if (config_.rank == 0 && config_.settings.warns) {
    std::fprintf(stderr,
                 "reducer: warning: group '%s': the ranks of this host cannot share memory (%s); "
                 "their collectives go over the network\n",
                 config_.name.c_str(), why.c_str());
  }
  // Numbers that were spent here before are spent there, too.
  for (std::uint64_t i = 0; i < missed_; ++i) spendOnNetwork();
  handOver(item);
  while (true) {
    Item next;
    {
      const std::lock_guard lock(mutex_);
      if (queue_.empty()) {
        on_network_ = true;
        return;
      }
      next = std::move(queue_.front());
      queue_.pop_front();
    }
    handOver(next);
  }
}

void LocalOperations::spendOnNetwork() {
  CallOptions options;
  options.canceller = std::make_shared<Canceller>();
  options.canceller->cancel(
      Status(Code::kTimeout, "the call was given up on " + team_.name(team_.place())));
  network_->barrier(std::move(options), [](const Status&) {});
}

void LocalOperations::handOver(const Item& item) {
  auto callers = item.operation->release();
  if (!callers) return spendOnNetwork();
  item.on_network(*network_, std::move(callers->first), std::move(callers->second));
}

// ------------------------------------------------------------------ the end

void LocalOperations::breakWith(const Status& why) {
  std::deque<Item> queued;
  std::shared_ptr<LocalOperation> current;
  {
    const std::lock_guard lock(mutex_);
    if (broken_.ok()) broken_ = why;
    queued.swap(queue_);
    current = current_;
  }
  if (current) current->cancel(why);
  for (const Item& item : queued) {
    item.operation->cancel(why);
    // The others may be waiting for this rank there.
    team_.giveUp(item.operation->number, why);
  }
}

void LocalOperations::close() {
  breakWith(Status(Code::kAborted, "the group was destroyed (destroy_process_group) or closed"));
  team_.leave();
  const std::lock_guard lock(mutex_);
  closing_ = true;
  changed_.notify_one();
}

void LocalOperations::left(const std::string& who) {
  const std::lock_guard lock(mutex_);
  if (left_.empty()) left_ = who;
}

std::string LocalOperations::whoLeft() {
  const std::lock_guard lock(mutex_);
  return left_;
}

void LocalOperations::join() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable() || thread_.get_id() == std::this_thread::get_id()) return;
    thread = std::move(thread_);
  }
  thread.join();
}

std::vector<std::string> LocalOperations::waitsFor(std::uint64_t lane, std::uint64_t seq) {
  std::shared_ptr<LocalOperation> current;
  bool on_network = false;
  {
    const std::lock_guard lock(mutex_);
    current = current_;
    on_network = on_network_;
  }
  if (lane != wire::kCollectiveLane || on_network) {
    const auto state = state_.lock();
    return state ? state->waitsFor(lane, seq) : std::vector<std::string>();
  }
  // Before the ranks have met only the thread that meets them may ask who is there.
  if (!current || current->number != seq || !team_.attached()) return {};
  return namesOf(team_, current->presence().missing);
}

engine::Joined LocalOperations::joined(Rank rank) const {
  if (!team_.attached()) return {};
  const auto last = exchange_.lastOf(static_cast<std::uint32_t>(rank));  // all ranks are places
  return last ? engine::Joined{std::uint64_t{last->number} + 1, callOf(last->call)}
              : engine::Joined();
}

std::uint64_t LocalOperations::sequence() {
  const std::lock_guard lock(mutex_);
  return on_network_ ? network_->sequence() : next_;
}

GroupCounters LocalOperations::counters() {
  GroupCounters all = network_->counters();
  const std::lock_guard lock(mutex_);
  if (!on_network_) all.operations = next_;
  all.pushed_bytes += counters_.pushed_bytes;
  all.pulled_bytes += counters_.pulled_bytes;
  return all;
}

bool LocalOperations::onNetwork() {
  const std::lock_guard lock(mutex_);
  return on_network_;
}

}  // namespace reducer::collective
