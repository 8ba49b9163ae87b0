#include "collective/group_state.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <numeric>

#include "collective/ring.h"
#include "common/limits.h"
#include "common/placement.h"
#include "engine/describe.h"
#include "transport/address.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(50);

// A reducer reports a late rank when the operation's timeout has passed. The worker itself waits
// this much longer before it says that the reducer is silent, since the reducer's message says
// more.
constexpr Duration kGrace = std::chrono::milliseconds(1000);

// A worker that is lost may have had its part in calls whose answers are still on their way.
constexpr Duration kLostGrace = std::chrono::milliseconds(200);

// Of a standalone reducer. Nobody waits for its answers any more, and it may be stopped; what it is
// told goes on its way all the same.
constexpr Duration kServerGoodbye = std::chrono::milliseconds(500);

std::uint64_t fnv1a(const std::string& text) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ULL;
  return hash;
}

// A thousand of them would fill a message, and each of the worker's thousand links keeps this text:
// of many the first, how many, and a digest of all.
std::string namesOf(const std::vector<std::string>& items) {
  constexpr std::size_t kNamed = 16;
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ",") + item;
  if (items.size() <= kNamed) return text;
  char rest[64];
  std::snprintf(rest, sizeof rest, " ... (%zu, digest %016llx)", items.size(),
                static_cast<unsigned long long>(fnv1a(text)));
  std::size_t end = 0;
  for (std::size_t i = 0; i < kNamed; ++i) end = text.find(',', end + 1);
  return text.substr(0, end) + rest;
}

std::string bandwidthsText(const GroupConfig& config) {
  std::vector<std::string> all;
  for (const auto* some : {&config.worker_bandwidths, &config.server_bandwidths}) {
    for (const std::uint64_t bandwidth : *some) all.push_back(std::to_string(bandwidth));
  }
  return all.empty() ? "" : ", bandwidths " + namesOf(all);
}

std::string settingsText(const GroupConfig& config, const Routes& routes,
                         const Placement& placement) {
  std::string text = "algorithm " + textOf(routes.ranges()) +
                     (config.settings.measures ? ", to be measured" : "") + ", chunk " +
                     std::to_string(routes.map().chunkBytes()) + " B, window " +
                     std::to_string(routes.windowBytesTotal()) + " B, checksum " +
                     (config.settings.checksum ? "on" : "off") + ", failover " +
                     (config.settings.failover ? "on" : "off") + ", heartbeat " +
                     engine::seconds(config.settings.heartbeat) + ", servers '" +
                     namesOf(config.servers) + "'" + bandwidthsText(config);
  if (placement.hosts() < placement.worldSize()) {
    text += ", hosts " + describeHosts(placement.hostOfRanks()) + ", transport " +
            std::string(nameOf(config.settings.carrier));
  }
  return text;
}

Nics nicsOf(const GroupConfig& config, const Placement& placement) {
  Nics nics;
  nics.host_of_rank = placement.hostOfRanks();
  for (Rank host = 0; host < placement.hosts(); ++host) {
    const Rank first = placement.ranksOf(host)[0];
    nics.hosts.push_back(config.worker_bandwidths.empty() ? 1 : config.worker_bandwidths[first]);
  }
  nics.servers = config.server_bandwidths;
  nics.servers.resize(config.servers.size(), 1);
  return nics;
}

/// The owners of what goes from host to host, for each map of the routes, where that is a level of
/// its own. What takes part there are hosts.
std::vector<ShardMap> railsOf(const GroupConfig& config, const Routes& routes,
                              const Placement& placement) {
  const Carrier carrier = config.settings.carrier;
  const bool shared = carrier == Carrier::kAuto || carrier == Carrier::kShm;
  std::vector<ShardMap> rails;
  if (!shared || !placement.levels()) return rails;
  Nics hosts = nicsOf(config, placement);
  hosts.host_of_rank.resize(hosts.hosts.size());
  std::iota(hosts.host_of_rank.begin(), hosts.host_of_rank.end(), 0);
  for (const SizeRange& way : routes.mapWays())
    rails.emplace_back(ownerWeights(way.algorithm, hosts), way.chunk_bytes, way.window_bytes);
  return rails;
}

}  // namespace

GroupState::GroupState(GroupConfig config, transport::Transport& transport,
                       server::ReducerServer& local)
    : config_(std::move(config)),
      recorded_(enroll(config_)),
      transport_(transport),
      local_(local),
      placement_(Placement::fromPlaces(config_.places, config_.world_size)),
      routes_(config_.settings, nicsOf(config_, placement_)),
      rails_(railsOf(config_, routes_, placement_)) {
  for (std::size_t i = 0; i < 2 * routes_.mapWays().size(); ++i) {
    depths_.push_back(std::make_shared<Depth>());
  }
}

std::shared_ptr<Link> GroupState::makeLink(OwnerIndex owner, const std::string& settings_text) {
  const auto n = static_cast<OwnerIndex>(config_.world_size);
  Link::Config link;
  link.owner = owner;
  link.in_process = owner == static_cast<OwnerIndex>(config_.rank);
  link.window_bytes = routes_.windowBytes(owner);
  // One that may take over for a lost reducer gets chunks of every map.
  if (!config_.servers.empty()) {
    link.window_bytes = std::max(link.window_bytes, 2 * routes_.chunkBytesMax());
  }
  link.checksum = config_.settings.checksum;
  link.connect_timeout = config_.settings.connect_timeout;
  link.failover = failsOver();
  link.losable = losable(owner);
  link.hello.version = kProtocolVersion;
  link.hello.job = config_.job;
  link.hello.group = config_.name.substr(0, kMaxNameBytes);
  link.hello.rank = config_.rank;
  link.hello.world_size = config_.world_size;
  link.hello.host = config_.host.substr(0, kMaxNameBytes);
  link.hello.token = config_.token;
  link.hello.window_bytes = link.window_bytes;
  link.hello.heartbeat_ms = static_cast<std::uint32_t>(config_.settings.heartbeat.count());
  link.hello.failover = link.failover;
  link.hello.config_text = settings_text;
  link.hello.config = fnv1a(settings_text);
  if (placement_.hosts() < placement_.worldSize()) link.hello.hosts = placement_.hostOfRanks();
  const std::string& address = addressOf(owner);
  link.name =
      owner < n ? "rank " + std::to_string(owner) + " at " + address : "the reducer at " + address;
  link.connect = [this, address, local = link.in_process](
                     std::shared_ptr<transport::Handler> handler, Duration timeout, bool by_name) {
    if (local) return local_.connectLocal(std::move(handler));
    const std::string dialled = by_name ? transport::namedOf(address) : address;
    return transport_.connect(dialled, std::move(handler), timeout);
  };
  return std::make_shared<Link>(std::move(link), weak_from_this());
}

void GroupState::start() {
  const std::string text = settingsText(config_, routes_, placement_);
  started_ = transport_.now();
  standing_.assign(config_.world_size + config_.servers.size(), {});
  for (OwnerIndex owner = 0; owner < config_.world_size + config_.servers.size(); ++owner) {
    links_.push_back(makeLink(owner, text));
    const std::size_t window = routes_.windowBytes(owner);
    smallest_window_ = owner == 0 ? window : std::min(smallest_window_, window);
  }
  // All owners at once: a rank that dies is noticed by each of them. Own reducer too, for send and
  // recv.
  links_[config_.rank]->open();
  for (const OwnerIndex owner : routes_.owners()) links_[owner]->open();
  if (failsOver()) {
    links_[0]->open();  // that keeps the list of lost owners
    // One that has nothing to do yet may inherit, and has to be there then.
    for (OwnerIndex owner = config_.world_size; owner < links_.size(); ++owner) {
      links_[owner]->open();
    }
  }
  ticker_ = transport_.every(kTick, [weak = weak_from_this()](TimePoint now) {
    if (const auto self = weak.lock()) self->tick(now);
  });
}

Plan GroupState::planFor(OwnerIndex owner, std::uint64_t nbytes) const {
  Plan plan = routes_.map().planFor(owner, nbytes);
  plan.limit(routes_.windowBytes(owner));  // which may be that of another of the maps
  return plan;
}

std::uint64_t GroupState::nextNumber(std::uint64_t lane) {
  if (lane == wire::kCollectiveLane) return sequence_++;
  return wire::isStepLane(lane) ? 0 : pair_sequences_[lane]++;
}

template <class Make>
void GroupState::launch(const wire::Call& call, std::uint64_t lane, CallOptions options, Done done,
                        std::optional<std::uint64_t> number, Make make) {
  std::shared_ptr<Operation> operation;
  Status status;
  std::vector<OwnerIndex> owners;
  const std::shared_ptr<Canceller> canceller = options.canceller;
  {
    const std::lock_guard lock(mutex_);
    status = broken_;
    if (status.ok()) {
      const std::uint64_t seq = number ? *number : nextNumber(lane);
      if (wire::isPairLane(lane)) receives_.taken(wire::tagOf(lane), wire::senderOf(lane), seq);
      if (options.number) *options.number = seq;
      const OperationId id{lane, seq};
      Operation::Info info;
      info.call = call;
      info.lane = lane;
      info.seq = seq;
      info.started = transport_.now();
      info.recorder = config_.recorder;
      info.group = recorded_;
      if (info.recorder != nullptr) info.way = wayOf(call, lane, options);
      info.options = std::move(options);
      info.done = [weak = weak_from_this(), id, call,
                   user = std::move(done)](const Status& result) {
        if (const auto self = weak.lock()) {
          const std::lock_guard state_lock(self->mutex_);
          self->operations_.erase(id);
          if (result.ok() && id.first == wire::kCollectiveLane) {
            self->finished_.learn({id.second + 1, call});
          }
        }
        user(result);
      };
      Queued queued = make(std::move(info), operation);
      operations_[id] = operation;
      if (holding_ && lane == wire::kCollectiveLane) {
        held_.push_back(std::move(queued));
      } else {
        status = enqueue(std::move(queued), owners);
      }
    }
  }
  if (!operation) {
    done(status);
  } else if (!status.ok()) {
    fail(operation, status);
  } else {
    if (canceller) {
      canceller->add(
          [state = weak_from_this(), weak = std::weak_ptr(operation)](const Status& why) {
            const auto self = state.lock();
            const auto under_way = weak.lock();
            if (self && under_way) self->fail(under_way, why);
          });
    }
    pump(owners);
  }
}

Status GroupState::enqueue(Queued queued, std::vector<OwnerIndex>& owners) {
  Status status;
  if (epoch_ > 0) queued = withHeirs(std::move(queued));
  for (auto first = queued.begin(); first != queued.end();) {
    const OwnerIndex owner = first->first;
    const auto last = std::find_if(first, queued.end(),
                                   [owner](const auto& entry) { return entry.first != owner; });
    Status one = links_[owner]->enqueue({first, last});
    if (!one.ok()) status = std::move(one);
    if (std::find(owners.begin(), owners.end(), owner) == owners.end()) owners.push_back(owner);
    first = last;
  }
  return status;
}

// A piece to each owner in turn, beginning behind this rank's own, so that at the start of an
// operation no owner's NIC is every worker's first.
void GroupState::pump(const std::vector<OwnerIndex>& owners) {
  if (owners.empty()) return;
  const std::size_t shift = (static_cast<std::size_t>(config_.rank) + 1) % owners.size();
  bool more = true;
  while (more) {
    more = false;
    for (std::size_t i = 0; i < owners.size(); ++i) {
      more |= links_[owners[(i + shift) % owners.size()]]->pump(1);
    }
  }
  if (epoch_ == 0) return;
  pumpHeirs();
}

void GroupState::run(const wire::Call& call, std::uint64_t lane, CallOptions options, Done done,
                     const Cut& cut, std::optional<std::uint64_t> number) {
  launch(call, lane, std::move(options), std::move(done), number,
         [&](Operation::Info info, std::shared_ptr<Operation>& operation) {
           std::vector<Transfer> transfers = cut(info.seq);
           const auto exchange =
               std::make_shared<Exchange>(std::move(info), std::move(transfers), weak_from_this());
           operation = exchange;
           Queued queued;
           for (std::uint32_t t = 0; t < exchange->transfers().size(); ++t) {
             const Transfer& transfer = exchange->transfers()[t];
             const Plan& plan = transfer.plan;
             for (std::uint32_t position = 0; position < plan.owners.size(); ++position) {
               const OwnerIndex owner = plan.owners[position];
               const std::size_t window = transfer.map ? transfer.map->windowBytes(owner) : 0;
               queued.emplace_back(owner, Cursor{exchange, t, position, 0, plan.rounds, window});
             }
           }
           return queued;
         });
}

void GroupState::runRing(const wire::Call& call, std::byte* out, std::uint64_t number,
                         CallOptions options, Done done) {
  launch(call, wire::stepLane(number), std::move(options), std::move(done), std::nullopt,
         [&](Operation::Info info, std::shared_ptr<Operation>& operation) {
           const OwnerIndex next = (config_.rank + 1) % config_.world_size;
           const auto ring = std::make_shared<RingAllReduce>(
               std::move(info), out, config_.rank, config_.world_size, routes_.map().chunkBytes(),
               links_[next]);
           operation = ring;
           Queued queued;
           for (Cursor& cursor : ring->pulls())
             queued.emplace_back(config_.rank, std::move(cursor));
           queued.emplace_back(next, ring->firstPushes());
           return queued;
         });
}

void GroupState::runTwoLevel(const wire::Call& call, const ShardMap& rails,
                             std::vector<Strip> strips, CallOptions options, Done done) {
  launch(call, wire::kCollectiveLane, std::move(options), std::move(done), std::nullopt,
         [&](Operation::Info info, std::shared_ptr<Operation>& operation) {
           const std::uint64_t seq = info.seq;
           TwoLevel::Shape shape;
           info.two_levels = true;
           shape.placement = &placement_;
           shape.rank = config_.rank;
           shape.rails = &rails;
           const std::size_t chunk_bytes = config_.settings.chunk_bytes;
           shape.segment_bytes = strips[0].owner == kAllRanks
                                     ? segmentBytes(placement_, chunk_bytes)
                                     : ownedSegmentBytes(placement_, chunk_bytes);
           shape.window_bytes = smallest_window_;
           const auto levels =
               std::make_shared<TwoLevel>(std::move(info), shape, std::move(strips));
           operation = levels;
           if (placement_.ranksOf(placement_.hostOf(config_.rank)).size() > 1) {
             if (!stage_) stage_ = makeStage();
             stage_->start(levels);
           }
           return levels->cursors(routes_.coordinator(seq));
         });
}

// ------------------------------------------------------------------ failure

std::vector<std::shared_ptr<Operation>> GroupState::operations() {
  std::vector<std::shared_ptr<Operation>> all;
  const std::lock_guard lock(mutex_);
  for (const auto& [id, weak] : operations_) {
    if (auto operation = weak.lock()) all.push_back(std::move(operation));
  }
  return all;
}

void GroupState::fail(const std::shared_ptr<Operation>& operation, const Status& status) {
  if (operation->record() && !operation->finished()) {
    operation->record().waitedFor(waitsFor(operation->info().lane, operation->info().seq));
  }
  if (!operation->fail(status)) return;
  if (const auto stage = this->stage(); stage && operation->info().lane == wire::kCollectiveLane) {
    stage->failed(operation->info().seq, status);
  }
  for (const auto& link : links_) {
    link->cancel(*operation, status);
    link->pump(std::numeric_limits<std::size_t>::max());  // others may have waited for its place in
                                                          // the window
  }
}

void GroupState::onOperationError(const wire::SlotId& slot, const Status& status, Rank lost) {
  std::shared_ptr<Operation> operation;
  {
    const std::lock_guard lock(mutex_);
    const auto found = operations_.find({wire::operationLane(slot.lane), slot.seq});
    if (found != operations_.end()) operation = found->second.lock();
  }
  if (!operation) return;
  fail(operation,
       lost < 0 ? status
                : Status(status.code(), status.message() + engine::describeJoined(joined(lost))));
}

void GroupState::onLeft(Rank rank) {
  if (when_left_ && rank >= 0 && rank < config_.world_size) when_left_(links_[rank]->hasLeft());
}

void GroupState::abort(const Status& reason) {
  std::vector<Receives::Request> unmatched;
  std::vector<Queued> held;  // is let go without the lock
  bool first = false;
  {
    const std::lock_guard lock(mutex_);
    first = broken_.ok();
    if (first) broken_ = reason;
    unmatched = receives_.clear();
    held.swap(held_);
  }
  if (first && when_broken_) when_broken_(reason);
  if (first && config_.recorder != nullptr) config_.recorder->trouble(recorded_, reason);
  for (const Receives::Request& request : unmatched) request.fail(reason);
  for (const auto& operation : operations()) fail(operation, reason);
}

std::string GroupState::describeWait(const Operation& operation, TimePoint now) {
  std::string text = engine::describe(operation.info().call) + ", collective #" +
                     std::to_string(wire::isStepLane(operation.info().lane)
                                        ? wire::stepNumber(operation.info().lane)
                                        : operation.info().seq) +
                     ": timeout after " + engine::seconds(now - operation.info().started) +
                     ", no answer";
  std::string from;
  for (const auto& link : links_) {
    const std::size_t pieces = link->waiting(operation);
    if (pieces == 0) continue;
    from += (from.empty() ? " from " : ", ") + link->name() + " (" + std::to_string(pieces) +
            (pieces == 1 ? " chunk" : " chunks") + (link->connected() ? ")" : ", not connected)");
  }
  if (const auto* levels = dynamic_cast<const TwoLevel*>(&operation)) {
    const auto stage = this->stage();
    const std::string missing = stage ? stage->waitsFor(*levels) : "";
    if (!missing.empty()) return text + (from.empty() ? "" : from + ";") + " " + missing;
  }
  return text + (from.empty() ? ": data is still being sent" : from);
}

void GroupState::tick(TimePoint now) {
  std::vector<Receives::Request> expired;
  std::vector<std::function<void(TimePoint)>> late;
  WorkerLost lost;
  {
    const std::lock_guard lock(mutex_);
    expired = receives_.expired(now);
    late = receives_.late(now);
    if (broken_.ok() && now - worker_lost_.at >= kLostGrace) lost = worker_lost_;
  }
  if (lost.rank != kAllRanks) loseWorker(lost.rank, lost.text, lost.joined);
  for (const auto& link : links_) link->beat(now);
  missAbsentees(now);
  lookForLost(now);
  for (const auto& warn : late) warn(now);
  for (const Receives::Request& request : expired) request.fail(Status());
  for (const auto& operation : operations()) {
    const auto& info = operation->info();
    if (now - info.started < info.options.timeout + kGrace) continue;
    fail(operation, Status(Code::kTimeout, describeWait(*operation, now)));
  }
}

// ------------------------------------------------------------------ the end

void GroupState::close() {
  abort(Status(Code::kAborted, "the group was destroyed (destroy_process_group) or closed"));
  std::unique_ptr<transport::Timer> ticker;
  {
    const std::lock_guard lock(mutex_);
    ticker = std::move(ticker_);
  }
  ticker.reset();
  if (const auto stage = this->stage()) stage->stop();
  stopLooking();
  for (const auto& link : links_) link->close();
}

void GroupState::onLinkClosed() {
  const std::lock_guard lock(mutex_);
  link_closed_.notify_all();
}

bool GroupState::waitClosed(Duration timeout) {
  const auto closed = [](const auto& link) { return link->closed(); };
  const auto servers = links_.begin() + config_.world_size;
  const auto all = [&] { return std::all_of(links_.begin(), links_.end(), closed); };
  const auto workers = [&] { return std::all_of(links_.begin(), servers, closed); };
  const Duration first = std::min(timeout, kServerGoodbye);
  std::unique_lock lock(mutex_);
  if (link_closed_.wait_for(lock, first, all)) return true;
  link_closed_.wait_for(lock, timeout - first, workers);
  return all();
}

GroupCounters GroupState::counters() {
  GroupCounters counters;
  counters.operations = sequence_;
  for (const auto& link : links_) {
    counters.pushed_bytes += link->pushedBytes();
    counters.pulled_bytes += link->pulledBytes();
    counters.outstanding_bytes_max += link->outstandingBytesMax();
  }
  counters.window_bytes = routes_.windowBytesTotal();
  const std::lock_guard lock(mutex_);
  counters.owner_changes = epoch_;
  counters.servers = serversLeft();
  return counters;
}

}  // namespace reducer::collective
