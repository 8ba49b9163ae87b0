#include "collective/group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "collective/calls.h"
#include "collective/group_state.h"
#include "collective/local_group.h"
#include "common/limits.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

std::byte* bytes(void* data) { return static_cast<std::byte*>(data); }
const std::byte* bytes(const void* data) { return static_cast<const std::byte*>(data); }

/// `server` needs servers, for some sizes or all; `local` is for all sizes or none.
Status checkAlgorithm(const GroupConfig& config) {
  const Settings& settings = config.settings;
  std::string item;
  for (const SizeRange& range : settings.ranges) {
    if (range.algorithm == Algorithm::kServer) item = "'" + textOf({range}) + "'";
    if (range.algorithm == Algorithm::kLocal) {
      return invalid("the algorithm 'local' is for calls of every size, and not for '" +
                     textOf({range}) + "' only");
    }
  }
  if (!config.servers.empty()) return {};
  if (settings.ranges.empty() && settings.algorithm == Algorithm::kServer) item = "'server'";
  if (item.empty()) return {};
  return invalid("the algorithm " + item +
                 " needs standalone reducers, and REDUCER_SERVERS is empty; start some with "
                 "`reducer serve`, or use 'direct'");
}

/// One for every rank and every standalone reducer, or none at all.
Status checkBandwidths(const GroupConfig& config) {
  const std::vector<std::uint64_t>& workers = config.worker_bandwidths;
  const std::vector<std::uint64_t>& servers = config.server_bandwidths;
  if (workers.empty() && servers.empty()) return {};
  if (workers.size() != static_cast<std::size_t>(config.world_size) ||
      servers.size() != config.servers.size()) {
    return invalid("bandwidths are given for " + std::to_string(workers.size()) + " of " +
                   std::to_string(config.world_size) + " ranks and " +
                   std::to_string(servers.size()) + " of " + std::to_string(config.servers.size()) +
                   " standalone reducers; give all (REDUCER_BANDWIDTH, and host:port@10gbit in "
                   "REDUCER_SERVERS) or none");
  }
  for (const auto* all : {&workers, &servers}) {
    if (std::find(all->begin(), all->end(), 0) != all->end())
      return invalid("a bandwidth of 0 carries nothing; REDUCER_BANDWIDTH is as in 10gbit");
  }
  return {};
}

/// Each collective as transfers: who pushes, who pulls, who owns.
class GroupHandle final : public Group, private CallChecks {
 public:
  explicit GroupHandle(std::shared_ptr<GroupState> state)
      : CallChecks(state->config().rank, state->config().world_size),
        state_(std::move(state)),
        rank_(state_->config().rank),
        n_(state_->config().world_size) {}
  ~GroupHandle() override { state_->close(); }

  void allReduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op,
                 CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done)) return;
    const wire::Call call =
        makeCall(Collective::kAllReduce, op, dtype, options.whole_count.value_or(count));
    const Routes::Route& route =
        options.algorithm ? state_->routes().by(*options.algorithm) : routeOf(call);
    if (route.range.algorithm == Algorithm::kRing && n_ > 1) {
      ring(call, in, out, count, std::move(options), std::move(done));
      return;
    }
    const std::size_t nbytes = count * sizeOf(dtype);
    const bool measured = options.algorithm.has_value();
    if (const ShardMap* rails = state_->rails(route, nbytes, false)) {
      state_->runTwoLevel(
          call, *rails,
          sharedStrips(state_->placement(), bytes(in), bytes(out), nbytes, kAllRanks, kAllRanks),
          std::move(options), std::move(done));
      return;
    }
    state_->run(call, wire::kCollectiveLane, std::move(options), std::move(done),
                [&](std::uint64_t seq) {
                  std::vector<Transfer> transfers = mapped(route, nbytes, seq, measured);
                  Transfer& all = transfers.back();
                  all.depth = state_->depth(route, all.plan);
                  all.in = bytes(in);
                  all.out = bytes(out);
                  return transfers;
                });
  }

  void reduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op, Rank root,
              CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done) || !checkRank("root", root, done)) return;
    const wire::Call call =
        makeCall(Collective::kReduce, op, dtype, options.whole_count.value_or(count), root);
    if (const ShardMap* rails = state_->rails(routeOf(call), count * sizeOf(dtype), false)) {
      state_->runTwoLevel(
          call, *rails,
          sharedStrips(state_->placement(), bytes(in), rank_ == root ? bytes(out) : nullptr,
                       count * sizeOf(dtype), kAllRanks, root),
          std::move(options), std::move(done));
      return;
    }
    state_->run(
        call, wire::kCollectiveLane, std::move(options), std::move(done), [&](std::uint64_t seq) {
          std::vector<Transfer> transfers = mapped(routeOf(call), count * sizeOf(dtype), seq);
          Transfer& all = transfers.back();
          all.depth = std::make_shared<Depth>();  // not the all-reduce's: GroupState::depth()
          all.puller = root;
          all.in = bytes(in);
          if (rank_ == root) all.out = bytes(out);
          return transfers;
        });
  }

  void broadcast(void* data, std::size_t count, DataType dtype, Rank root, CallOptions options,
                 Done done) override {
    if (!checkRank("root", root, done)) return;
    const wire::Call call = makeCall(Collective::kBroadcast, ReduceOp::kNone, dtype,
                                     options.whole_count.value_or(count), root);
    if (const ShardMap* rails = state_->rails(routeOf(call), count * sizeOf(dtype), false)) {
      std::byte* const at = bytes(data);
      state_->runTwoLevel(
          call, *rails,
          sharedStrips(state_->placement(), rank_ == root ? at : nullptr,
                       rank_ == root ? nullptr : at, count * sizeOf(dtype), root, kAllRanks),
          std::move(options), std::move(done));
      return;
    }
    state_->run(
        call, wire::kCollectiveLane, std::move(options), std::move(done), [&](std::uint64_t seq) {
          std::vector<Transfer> transfers = mapped(routeOf(call), count * sizeOf(dtype), seq);
          Transfer& all = transfers.back();
          all.depth = std::make_shared<Depth>();
          all.pusher = root;
          if (rank_ == root) {
            all.in = bytes(data);
          } else {
            all.out = bytes(data);
          }
          return transfers;
        });
  }

  void barrier(CallOptions options, Done done) override {
    const wire::Call call = makeCall(Collective::kBarrier, ReduceOp::kNone, DataType::kUInt8, 0);
    state_->run(call, wire::kCollectiveLane, std::move(options), std::move(done),
                [&](std::uint64_t seq) { return compared(seq); });
  }

  void allGather(const void* in, std::span<void* const> outs, std::span<const std::size_t> counts,
                 DataType dtype, CallOptions options, Done done) override {
    if (!checkSize("outs", outs.size(), done) || !checkSize("counts", counts.size(), done)) return;
    const wire::Call call =
        makeCall(options.shown_as.value_or(Collective::kAllGather), ReduceOp::kNone, dtype,
                 options.whole_count.value_or(sum(counts)));
    const std::uint64_t lane =
        options.second_step ? wire::stepLane(*options.second_step) : wire::kCollectiveLane;
    // A second step keeps to workers' reducers, which cannot be lost one by one.
    const std::optional<std::uint64_t> step = options.second_step;
    if (counts[rank_] > 0) std::memcpy(outs[rank_], in, counts[rank_] * sizeOf(dtype));
    const ShardMap* const rails = state_->rails(routeOf(call), sum(counts) * sizeOf(dtype), true);
    if (rails != nullptr && lane == wire::kCollectiveLane) {
      std::vector<const std::byte*> ins(static_cast<std::size_t>(n_));
      std::vector<std::byte*> others;
      for (Rank r = 0; r < n_; ++r) others.push_back(r == rank_ ? nullptr : bytes(outs[r]));
      ins[rank_] = bytes(in);
      runOwned(call, *rails, ins, others, counts, std::move(options), std::move(done));
      return;
    }
    state_->run(call, lane, std::move(options), std::move(done), [&](std::uint64_t seq) {
      std::vector<Transfer> transfers =
          step ? comparedAt(static_cast<OwnerIndex>(*step % static_cast<std::uint64_t>(n_)))
               : compared(seq);
      for (Rank r = 0; r < n_; ++r) {
        if (counts[r] == 0) continue;
        Transfer part = owned(r, counts[r] * sizeOf(dtype));
        part.pusher = r;
        if (r == rank_) {
          part.in = bytes(in);
        } else {
          part.out = bytes(outs[r]);
        }
        transfers.push_back(std::move(part));
      }
      for (Transfer& transfer : transfers) transfer.lane = lane;
      return transfers;
    });
  }

  void reduceScatter(std::span<const void* const> ins, void* out,
                     std::span<const std::size_t> counts, DataType dtype, ReduceOp op,
                     CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done) || !checkSize("ins", ins.size(), done) ||
        !checkSize("counts", counts.size(), done)) {
      return;
    }
    const wire::Call call =
        makeCall(Collective::kReduceScatter, op, dtype, options.whole_count.value_or(sum(counts)));
    if (const ShardMap* rails = state_->rails(routeOf(call), sum(counts) * sizeOf(dtype), true)) {
      std::vector<const std::byte*> all;
      for (const void* in : ins) all.push_back(bytes(in));
      std::vector<std::byte*> outs(static_cast<std::size_t>(n_));
      outs[rank_] = bytes(out);
      runOwned(call, *rails, all, outs, counts, std::move(options), std::move(done));
      return;
    }
    state_->run(call, wire::kCollectiveLane, std::move(options), std::move(done),
                [&](std::uint64_t seq) {
                  std::vector<Transfer> transfers = compared(seq);
                  for (Rank r = 0; r < n_; ++r) {
                    if (counts[r] == 0) continue;
                    Transfer part = owned(r, counts[r] * sizeOf(dtype));
                    part.puller = r;
                    part.in = bytes(ins[r]);
                    if (r == rank_) part.out = bytes(out);
                    transfers.push_back(std::move(part));
                  }
                  return transfers;
                });
  }

  void gather(const void* in, std::span<void* const> outs, std::span<const std::size_t> counts,
              DataType dtype, Rank root, CallOptions options, Done done) override {
    if (!checkRank("root", root, done) || !checkSize("counts", counts.size(), done)) return;
    if (rank_ == root && !checkSize("outs", outs.size(), done)) return;
    const wire::Call call = makeCall(Collective::kGather, ReduceOp::kNone, dtype,
                                     options.whole_count.value_or(sum(counts)), root);
    state_->run(call, wire::kCollectiveLane, std::move(options), std::move(done),
                [&](std::uint64_t seq) {
                  std::vector<Transfer> transfers = compared(seq);
                  for (Rank r = 0; r < n_; ++r) {
                    if (rank_ != root && rank_ != r) continue;
                    addPart(transfers, r, root, root, counts[r] * sizeOf(dtype),
                            rank_ == r ? in : nullptr, rank_ == root ? outs[r] : nullptr);
                  }
                  return transfers;
                });
  }

  void scatter(std::span<const void* const> ins, void* out, std::span<const std::size_t> counts,
               DataType dtype, Rank root, CallOptions options, Done done) override {
    if (!checkRank("root", root, done) || !checkSize("counts", counts.size(), done)) return;
    if (rank_ == root && !checkSize("ins", ins.size(), done)) return;
    const wire::Call call = makeCall(Collective::kScatter, ReduceOp::kNone, dtype,
                                     options.whole_count.value_or(sum(counts)), root);
    state_->run(call, wire::kCollectiveLane, std::move(options), std::move(done),
                [&](std::uint64_t seq) {
                  std::vector<Transfer> transfers = compared(seq);
                  for (Rank r = 0; r < n_; ++r) {
                    if (rank_ != root && rank_ != r) continue;
                    addPart(transfers, root, r, r, counts[r] * sizeOf(dtype),
                            rank_ == root ? ins[r] : nullptr, rank_ == r ? out : nullptr);
                  }
                  return transfers;
                });
  }

  void allToAll(std::span<const void* const> ins, std::span<const std::size_t> in_counts,
                std::span<void* const> outs, std::span<const std::size_t> out_counts,
                DataType dtype, CallOptions options, Done done) override {
    if (!checkSize("ins", ins.size(), done) || !checkSize("in_counts", in_counts.size(), done) ||
        !checkSize("outs", outs.size(), done) ||
        !checkSize("out_counts", out_counts.size(), done)) {
      return;
    }
    if (!checkOwn(in_counts[rank_], out_counts[rank_], done)) return;
    // The ranks' counts differ by nature; each pair's are compared where they meet.
    const wire::Call call = makeCall(Collective::kAllToAll, ReduceOp::kNone, dtype, 0);
    state_->run(
        call, wire::kCollectiveLane, std::move(options), std::move(done), [&](std::uint64_t seq) {
          std::vector<Transfer> transfers = compared(seq);
          for (Rank r = 0; r < n_; ++r) {
            if (r == rank_) {
              addPart(transfers, r, r, r, in_counts[r] * sizeOf(dtype), ins[r], outs[r]);
              continue;
            }
            addPart(transfers, rank_, r, r, in_counts[r] * sizeOf(dtype), ins[r], nullptr);
            addPart(transfers, r, rank_, rank_, out_counts[r] * sizeOf(dtype), nullptr, outs[r]);
          }
          return transfers;
        });
  }

  void send(const void* in, std::size_t count, DataType dtype, Rank to, std::uint32_t tag,
            CallOptions options, Done done) override {
    if (!checkPeer(to, done)) return;
    pair(state_, rank_, to, count, dtype, tag, in, nullptr, std::move(options), std::move(done));
  }

  void recv(void* out, std::size_t count, DataType dtype, Rank from, std::uint32_t tag,
            CallOptions options, Done done) override {
    if (!checkPeer(from, done)) return;
    receive(from, out, count, dtype, tag, std::move(options),
            [done = std::move(done)](const Status& status, Rank) { done(status); });
  }

  void recvAny(void* out, std::size_t count, DataType dtype, std::uint32_t tag, CallOptions options,
               Received done) override {
    if (n_ == 1) return done(invalid("there is no other rank to receive from"), 0);
    receive(kAllRanks, out, count, dtype, tag, std::move(options), std::move(done));
  }

  Rank rank() const override { return rank_; }
  std::int32_t worldSize() const override { return n_; }
  std::uint64_t sequence() const override { return state_->sequence(); }
  GroupCounters counters() const override { return state_->counters(); }
  Algorithm algorithm() const override { return state_->routes().algorithm(); }
  std::vector<SizeRange> ranges() const override { return state_->routes().ranges(); }
  void adopt(const std::vector<Sample>& samples) override { state_->adopt(samples); }
  std::vector<Algorithm> choices() const override { return state_->routes().choices(); }
  std::vector<Estimate> explain(std::uint64_t nbytes) const override {
    return state_->routes().explain(nbytes);
  }
  void abort(const std::string& reason) override {
    state_->abort(Status(Code::kAborted, "the group was aborted: " + reason));
  }
  void close() override { state_->close(); }
  bool waitClosed(Duration timeout) override { return state_->waitClosed(timeout); }

 private:
  // First the ranks compare their calls, as for every collective: a ring sums in place, and when
  // they differ the inputs must be as before. Then it turns in a lane of its own: its later steps
  // must not stand behind operations that other ranks have not come to yet.
  void ring(const wire::Call& call, const void* in, void* out, std::size_t count,
            CallOptions options, Done done) {
    CallOptions turning = options;
    options.number = std::make_shared<std::atomic<std::uint64_t>>();
    const auto number = options.number;
    state_->run(
        call, wire::kCollectiveLane, std::move(options),
        [=, state = state_, done = std::move(done)](const Status& status) {
          if (!status.ok()) return done(status);
          wire::Call own = call;
          own.count = count;
          const std::size_t nbytes = count * sizeOf(call.dtype);
          if (in != out && nbytes > 0) std::memcpy(out, in, nbytes);
          state->runRing(own, bytes(out), *number, turning, done);
        },
        [&](std::uint64_t seq) { return compared(seq); });
  }

  /// By the bytes of the whole call: ranks that make the same call choose the same.
  const Routes::Route& routeOf(const wire::Call& call) const {
    return state_->routes().at(call.count * sizeOf(call.dtype));
  }

  /// Over all owners of a route, everybody pushes and pulls: the last of the transfers, which
  /// begins at the coordinator, or stands behind an empty chunk 0 there if its owners are others.
  /// `measured`: as if the group had no other way, with a coordinator among its own owners.
  std::vector<Transfer> mapped(const Routes::Route& route, std::size_t nbytes, std::uint64_t seq,
                               bool measured = false) const {
    const Routes& routes = state_->routes();
    const ShardMap& map = routes.mapOf(route);
    const OwnerIndex coordinator = measured ? map.coordinator(seq) : routes.coordinator(seq);
    const bool meets = map.owns(coordinator);
    std::vector<Transfer> transfers;
    if (!meets) transfers = compared(seq);
    Transfer transfer;
    transfer.plan = meets ? map.planFrom(coordinator, nbytes) : map.plan(nbytes, seq);
    transfer.first_chunk = meets ? 0 : 1;
    if (routes.several()) transfer.map = &map;
    transfers.push_back(std::move(transfer));
    return transfers;
  }

  /// In two levels, every rank the owner of its part: the all-gather's or the reduce-scatter's.
  void runOwned(const wire::Call& call, const ShardMap& rails,
                std::span<const std::byte* const> ins, std::span<std::byte* const> outs,
                std::span<const std::size_t> counts, CallOptions options, Done done) {
    std::vector<std::uint64_t> nbytes;
    for (const std::size_t count : counts) nbytes.push_back(count * sizeOf(call.dtype));
    state_->runTwoLevel(
        call, rails,
        ownedStrips(state_->placement(), ins, outs, nbytes, call.op != ReduceOp::kNone),
        std::move(options), std::move(done));
  }

  /// One owner, everybody pushes and pulls; behind chunk 0, where the calls are compared.
  Transfer owned(OwnerIndex owner, std::size_t nbytes) const {
    Transfer transfer;
    transfer.plan = state_->planFor(owner, nbytes);
    transfer.first_chunk = 1;
    return transfer;
  }

  /// The empty chunk 0 in which all ranks show what they call.
  std::vector<Transfer> compared(std::uint64_t seq) const {
    return comparedAt(state_->routes().coordinator(seq));
  }
  std::vector<Transfer> comparedAt(OwnerIndex owner) const {
    Transfer transfer;
    transfer.plan = state_->planFor(owner, 0);
    return {std::move(transfer)};
  }

  /// Bytes from one rank to one other.
  void addPart(std::vector<Transfer>& transfers, Rank pusher, Rank puller, OwnerIndex owner,
               std::size_t nbytes, const void* in, void* out) const {
    if (nbytes == 0) return;
    Transfer part = owned(owner, nbytes);
    part.lane = wire::partLane(pusher);
    part.pusher = pusher;
    part.puller = puller;
    part.in = bytes(in);
    part.out = bytes(out);
    transfers.push_back(std::move(part));
  }

  void receive(Rank from, void* out, std::size_t count, DataType dtype, std::uint32_t tag,
               CallOptions options, Received done) {
    const wire::Call call = makeCall(Collective::kSendRecv, ReduceOp::kNone, dtype, count);
    const auto timeout = options.timeout;
    auto shared = std::make_shared<Received>(std::move(done));
    state_->receive(
        from, tag, call, timeout,
        [=, state = state_, me = rank_](Rank sender, std::optional<std::uint64_t> number) {
          pair(
              state, sender, me, count, dtype, tag, nullptr, out, options,
              [shared, sender](const Status& status) { (*shared)(status, sender); }, number);
        },
        [shared](const Status& status) { (*shared)(status, 0); }, options.canceller);
  }

  // A receive may start after the handle's end.
  static void pair(const std::shared_ptr<GroupState>& state, Rank from, Rank to, std::size_t count,
                   DataType dtype, std::uint32_t tag, const void* in, void* out,
                   CallOptions options, Done done, std::optional<std::uint64_t> number = {}) {
    const wire::Call call = makeCall(Collective::kSendRecv, ReduceOp::kNone, dtype, count);
    const std::uint64_t lane = wire::pairLane(from, to, tag);
    state->run(
        call, lane, std::move(options), std::move(done),
        [&](std::uint64_t) {
          Transfer all;
          all.plan = state->planFor(to, count * sizeOf(dtype));
          all.lane = lane;
          all.pusher = from;
          all.puller = to;
          all.in = bytes(in);
          all.out = bytes(out);
          return std::vector<Transfer>{std::move(all)};
        },
        number);
  }

  const std::shared_ptr<GroupState> state_;
  const Rank rank_;
  const Rank n_;
};

}  // namespace

void Canceller::add(std::function<void(const Status&)> end) {
  Status why;
  {
    const std::lock_guard lock(mutex_);
    why = why_;
    if (why.ok()) ends_.push_back(end);
  }
  if (!why.ok()) end(why);
}

void Canceller::cancel(const Status& why) {
  std::vector<std::function<void(const Status&)>> ends;
  {
    const std::lock_guard lock(mutex_);
    if (!why_.ok()) return;
    why_ = why;
    ends.swap(ends_);
  }
  for (const auto& end : ends) end(why);
}

std::string derivedJob(const std::string& parent, const std::string& text) {
  std::string job(16, '\0');
  for (int half = 0; half < 2; ++half) {
    // FNV-1a with two offsets, then a finalizer that spreads every input bit over all 64.
    std::uint64_t hash =
        0xCBF29CE484222325ULL + static_cast<std::uint64_t>(half) * 0x9E3779B97F4A7C15ULL;
    for (const std::string* part : {&parent, &text}) {
      for (const char c : *part) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ULL;
    }
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ULL;
    hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBULL;
    hash ^= hash >> 31;
    std::memcpy(job.data() + half * sizeof hash, &hash, sizeof hash);
  }
  return job;
}

Result<std::shared_ptr<Group>> Group::create(GroupConfig config, transport::Transport& transport,
                                             server::ReducerServer& local) {
  const std::int32_t n = config.world_size;
  if (n < 1 || n > kMaxWorldSize || config.rank < 0 || config.rank >= n) {
    return invalid("rank " + std::to_string(config.rank) + " of a world of " + std::to_string(n) +
                   " is not possible (at most " + std::to_string(kMaxWorldSize) + " ranks)");
  }
  if (config.workers.size() != static_cast<std::size_t>(n)) {
    return invalid("one address per worker is needed: " + std::to_string(n) + ", not " +
                   std::to_string(config.workers.size()));
  }
  if (Status status = checkBandwidths(config); !status.ok()) return status;
  if (!config.places.empty() && config.places.size() != config.workers.size()) {
    return invalid("a place for each rank is needed, or none: " + std::to_string(n) + ", not " +
                   std::to_string(config.places.size()));
  }
  if (config.job.size() != 16) return invalid("a job's identity is 16 bytes");
  if (Status status = checkAlgorithm(config); !status.ok()) return status;
  if (config.workers.size() + config.servers.size() > wire::kMaxOwners) {
    return invalid(std::to_string(config.servers.size()) + " standalone reducers are too many: a " +
                   "group has at most " + std::to_string(wire::kMaxOwners) + " of them and ranks");
  }
  if (config.settings.chunk_bytes != 0 && (config.settings.chunk_bytes < kMinChunkBytes ||
                                           config.settings.chunk_bytes > kMaxChunkBytes)) {
    return invalid("REDUCER_CHUNK_BYTES is " + std::to_string(config.settings.chunk_bytes) +
                   ", outside of 4KiB to 16MiB");
  }
  Result<bool> shared = sharesMemory(config);
  if (!shared.ok()) return shared.status();
  if (shared.value()) config.settings.algorithm = Algorithm::kLocal;
  const auto state = std::make_shared<GroupState>(std::move(config), transport, local);
  if (recorder::Recorder* const recorder = state->config().recorder) {
    recorder->setSource(state->recorded(), state);
  }
  std::shared_ptr<Group> group = std::make_shared<GroupHandle>(state);
  if (shared.value()) group = makeLocalGroup(std::move(group), state);
  state->start();
  return group;
}

}  // namespace reducer::collective
