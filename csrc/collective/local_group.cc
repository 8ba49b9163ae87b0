#include "collective/local_group.h"

#include <algorithm>
#include <map>
#include <utility>

#include "collective/calls.h"
#include "collective/group_state.h"
#include "collective/local_operations.h"

namespace reducer::collective {
namespace {

using local::Part;
using local::Room;
using Sizes = std::span<const std::size_t>;

std::byte* raw(void* data) { return static_cast<std::byte*>(data); }
const std::byte* raw(const void* data) { return static_cast<const std::byte*>(data); }

std::uint64_t digest(Sizes counts) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  for (const std::size_t count : counts) {
    hash = (hash ^ count) * 0x9E3779B97F4A7C15ULL;
    hash ^= hash >> 32;
  }
  return hash;
}

template <class T>
std::vector<T> listOf(std::span<T const> items) {
  return {items.begin(), items.end()};
}

/// Each collective as a job of the team, and as a call of the network's group.
class LocalGroup final : public Group, private CallChecks {
 public:
  LocalGroup(std::shared_ptr<Group> network, std::shared_ptr<LocalOperations> operations)
      : CallChecks(network->rank(), network->worldSize()),
        rank_(network->rank()),
        n_(network->worldSize()),
        network_(std::move(network)),
        operations_(std::move(operations)) {}
  ~LocalGroup() override {
    operations_->close();
    operations_->join();
  }

  void allReduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op,
                 CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done)) return;
    LocalCall call = shown(Collective::kAllReduce, op, dtype, count, options);
    call.in_bytes = call.out_bytes = count * sizeOf(dtype);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] { return local::SumJob(seat(), dtype, op, in, out, count); },
        [=](Group& network, CallOptions o, Done d) {
          network.allReduce(in, out, count, dtype, op, std::move(o), std::move(d));
        });
  }

  void reduce(const void* in, void* out, std::size_t count, DataType dtype, ReduceOp op, Rank root,
              CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done) || !checkRank("root", root, done)) return;
    LocalCall call = shown(Collective::kReduce, op, dtype, count, options, root);
    call.in_bytes = count * sizeOf(dtype);
    call.out_bytes = rank_ == root ? call.in_bytes : 0;
    operations_->start(
        call, std::move(options), std::move(done),
        [&] { return local::SumJob(seat(), dtype, op, in, rank_ == root ? out : nullptr, count); },
        [=](Group& network, CallOptions o, Done d) {
          network.reduce(in, out, count, dtype, op, root, std::move(o), std::move(d));
        });
  }

  void broadcast(void* data, std::size_t count, DataType dtype, Rank root, CallOptions options,
                 Done done) override {
    if (!checkRank("root", root, done)) return;
    LocalCall call = shown(Collective::kBroadcast, ReduceOp::kNone, dtype, count, options, root);
    const std::size_t nbytes = count * sizeOf(dtype);
    (rank_ == root ? call.in_bytes : call.out_bytes) = nbytes;
    operations_->start(
        call, std::move(options), std::move(done),
        [&] {
          std::vector<Room> outs(n_);
          outs[root] = {raw(data), nbytes};
          return local::SpreadJob(seat(), data, std::move(outs));
        },
        [=](Group& network, CallOptions o, Done d) {
          network.broadcast(data, count, dtype, root, std::move(o), std::move(d));
        });
  }

  void barrier(CallOptions options, Done done) override {
    const LocalCall call =
        shown(Collective::kBarrier, ReduceOp::kNone, DataType::kUInt8, 0, options);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] { return local::SpreadJob(seat(), nullptr, std::vector<Room>(n_)); },
        [](Group& network, CallOptions o, Done d) { network.barrier(std::move(o), std::move(d)); });
  }

  void allGather(const void* in, std::span<void* const> outs, Sizes counts, DataType dtype,
                 CallOptions options, Done done) override {
    if (options.second_step) {
      return network_->allGather(in, outs, counts, dtype, std::move(options), std::move(done));
    }
    if (!checkSize("outs", outs.size(), done) || !checkSize("counts", counts.size(), done)) return;
    LocalCall call = shown(options.shown_as.value_or(Collective::kAllGather), ReduceOp::kNone,
                           dtype, sum(counts), options);
    call.shape = digest(counts);
    call.in_bytes = counts[rank_] * sizeOf(dtype);
    call.out_bytes = sum(counts) * sizeOf(dtype);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] { return local::SpreadJob(seat(), in, rooms(outs, counts, dtype)); },
        [in, dtype, outs = listOf(outs), counts = listOf(counts)](Group& network, CallOptions o,
                                                                  Done d) {
          network.allGather(in, outs, counts, dtype, std::move(o), std::move(d));
        });
  }

  void reduceScatter(std::span<const void* const> ins, void* out, Sizes counts, DataType dtype,
                     ReduceOp op, CallOptions options, Done done) override {
    if (!checkOp(op, dtype, done) || !checkSize("ins", ins.size(), done) ||
        !checkSize("counts", counts.size(), done)) {
      return;
    }
    LocalCall call = shown(Collective::kReduceScatter, op, dtype, sum(counts), options);
    call.shape = digest(counts);
    call.in_bytes = sum(counts) * sizeOf(dtype);
    call.out_bytes = counts[rank_] * sizeOf(dtype);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] { return local::SumShareJob(seat(), dtype, op, parts(ins, counts, dtype), out); },
        [out, dtype, op, ins = listOf(ins), counts = listOf(counts)](Group& network, CallOptions o,
                                                                     Done d) {
          network.reduceScatter(ins, out, counts, dtype, op, std::move(o), std::move(d));
        });
  }

  void gather(const void* in, std::span<void* const> outs, Sizes counts, DataType dtype, Rank root,
              CallOptions options, Done done) override {
    if (!checkRank("root", root, done) || !checkSize("counts", counts.size(), done)) return;
    if (rank_ == root && !checkSize("outs", outs.size(), done)) return;
    LocalCall call = shown(Collective::kGather, ReduceOp::kNone, dtype, sum(counts), options, root);
    call.shape = digest(counts);
    call.in_bytes = counts[rank_] * sizeOf(dtype);
    call.out_bytes = rank_ == root ? sum(counts) * sizeOf(dtype) : 0;
    operations_->start(
        call, std::move(options), std::move(done),
        [&] {
          return local::SpreadJob(seat(), in,
                                  rooms(rank_ == root ? outs : decltype(outs)(), counts, dtype));
        },
        [in, dtype, root, outs = listOf(outs), counts = listOf(counts)](Group& network,
                                                                        CallOptions o, Done d) {
          network.gather(in, outs, counts, dtype, root, std::move(o), std::move(d));
        });
  }

  void scatter(std::span<const void* const> ins, void* out, Sizes counts, DataType dtype, Rank root,
               CallOptions options, Done done) override {
    if (!checkRank("root", root, done) || !checkSize("counts", counts.size(), done)) return;
    if (rank_ == root && !checkSize("ins", ins.size(), done)) return;
    LocalCall call =
        shown(Collective::kScatter, ReduceOp::kNone, dtype, sum(counts), options, root);
    call.shape = digest(counts);
    call.in_bytes = rank_ == root ? sum(counts) * sizeOf(dtype) : 0;
    call.out_bytes = counts[rank_] * sizeOf(dtype);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] {
          std::vector<Part> all(n_);
          if (rank_ == root) all = parts(ins, counts, dtype);
          std::vector<Room> room(n_);
          room[root] = {raw(out), call.out_bytes};
          return local::DealJob(seat(), std::move(all), std::move(room));
        },
        [out, dtype, root, ins = listOf(ins), counts = listOf(counts)](Group& network,
                                                                       CallOptions o, Done d) {
          network.scatter(ins, out, counts, dtype, root, std::move(o), std::move(d));
        });
  }

  void allToAll(std::span<const void* const> ins, Sizes in_counts, std::span<void* const> outs,
                Sizes out_counts, DataType dtype, CallOptions options, Done done) override {
    if (!checkSize("ins", ins.size(), done) || !checkSize("in_counts", in_counts.size(), done) ||
        !checkSize("outs", outs.size(), done) ||
        !checkSize("out_counts", out_counts.size(), done) ||
        !checkOwn(in_counts[rank_], out_counts[rank_], done)) {
      return;
    }
    // The ranks' counts differ by nature; the job compares each pair's.
    LocalCall call = shown(Collective::kAllToAll, ReduceOp::kNone, dtype, 0, options);
    call.shown.count = 0;
    call.in_bytes = sum(in_counts) * sizeOf(dtype);
    call.out_bytes = sum(out_counts) * sizeOf(dtype);
    operations_->start(
        call, std::move(options), std::move(done),
        [&] {
          return local::DealJob(seat(), parts(ins, in_counts, dtype),
                                rooms(outs, out_counts, dtype));
        },
        [dtype, ins = listOf(ins), in_counts = listOf(in_counts), outs = listOf(outs),
         out_counts = listOf(out_counts)](Group& network, CallOptions o, Done d) {
          network.allToAll(ins, in_counts, outs, out_counts, dtype, std::move(o), std::move(d));
        });
  }

  void send(const void* in, std::size_t count, DataType dtype, Rank to, std::uint32_t tag,
            CallOptions options, Done done) override {
    network_->send(in, count, dtype, to, tag, std::move(options), std::move(done));
  }
  void recv(void* out, std::size_t count, DataType dtype, Rank from, std::uint32_t tag,
            CallOptions options, Done done) override {
    network_->recv(out, count, dtype, from, tag, std::move(options), std::move(done));
  }
  void recvAny(void* out, std::size_t count, DataType dtype, std::uint32_t tag, CallOptions options,
               Received done) override {
    network_->recvAny(out, count, dtype, tag, std::move(options), std::move(done));
  }

  Rank rank() const override { return rank_; }
  std::int32_t worldSize() const override { return n_; }
  std::uint64_t sequence() const override { return operations_->sequence(); }
  GroupCounters counters() const override { return operations_->counters(); }
  Algorithm algorithm() const override {
    return operations_->onNetwork() ? Algorithm::kDirect : Algorithm::kLocal;
  }
  /// The network tells the operations here.
  void abort(const std::string& reason) override { network_->abort(reason); }
  void close() override {
    operations_->close();
    network_->close();
  }
  bool waitClosed(Duration timeout) override { return network_->waitClosed(timeout); }

 private:
  static LocalCall shown(Collective collective, ReduceOp op, DataType dtype, std::size_t count,
                         const CallOptions& options, Rank root = kAllRanks) {
    LocalCall call;
    call.shown = makeCall(collective, op, dtype, options.whole_count.value_or(count), root);
    call.count = count;
    return call;
  }
  static std::vector<Part> parts(std::span<const void* const> ins, Sizes counts, DataType dtype) {
    std::vector<Part> all;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      all.push_back({raw(ins[r]), counts[r] * sizeOf(dtype)});
    }
    return all;
  }
  /// Without `outs`: sizes only.
  static std::vector<Room> rooms(std::span<void* const> outs, Sizes counts, DataType dtype) {
    std::vector<Room> all;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      all.push_back({outs.empty() ? nullptr : raw(outs[r]), counts[r] * sizeOf(dtype)});
    }
    return all;
  }
  local::Seat seat() const { return operations_->seat(); }

  const Rank rank_;
  const Rank n_;
  const std::shared_ptr<Group> network_;
  const std::shared_ptr<LocalOperations> operations_;
};

}  // namespace

Result<bool> sharesMemory(const GroupConfig& config) {
  const Settings& settings = config.settings;
  const bool allowed = settings.carrier == Carrier::kAuto || settings.carrier == Carrier::kShm;
  const bool together =
      !config.places.empty() && std::all_of(config.places.begin(), config.places.end(),
                                            [&](const auto& p) { return p == config.places[0]; });
  if (!settings.ranges.empty()) return false;  // each size has an algorithm of its own
  if (settings.algorithm == Algorithm::kAuto) return allowed && together;
  if (settings.algorithm != Algorithm::kLocal) return false;
  if (!allowed) {
    return invalid("the algorithm 'local' is shared memory, and REDUCER_TRANSPORT is '" +
                   std::string(nameOf(settings.carrier)) + "'; use 'auto' or 'shm' there");
  }
  if (together) return true;
  std::map<std::string, std::string> ranks_of;
  for (std::size_t rank = 0; rank < config.places.size(); ++rank) {
    std::string& ranks = ranks_of[config.places[rank]];
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  }
  std::string text;
  for (const auto& [place, ranks] : ranks_of) {
    text += (text.empty() ? "" : "; ") + ("ranks " + ranks) + " on " + place;
  }
  return invalid(
      "the algorithm 'local' wants all ranks on one host, in one network namespace, and "
      "of one user; here are " +
      (text.empty() ? "ranks of unknown hosts" : text) + "; use REDUCER_ALGORITHM=auto");
}

std::shared_ptr<Group> makeLocalGroup(std::shared_ptr<Group> network,
                                      const std::shared_ptr<GroupState>& state) {
  const auto operations = std::make_shared<LocalOperations>(state, network);
  state->whenBroken([weak = std::weak_ptr(operations)](const Status& why) {
    if (const auto alive = weak.lock()) alive->breakWith(why);
  });
  if (recorder::Recorder* const recorder = state->config().recorder) {
    recorder->setSource(state->recorded(), operations);
  }
  state->joinedBy([weak = std::weak_ptr(operations)](Rank rank) {
    const auto alive = weak.lock();
    return alive ? alive->joined(rank) : engine::Joined();
  });
  state->whenLeft([weak = std::weak_ptr(operations)](const std::string& who) {
    if (const auto alive = weak.lock()) alive->left(who);
  });
  return std::make_shared<LocalGroup>(std::move(network), operations);
}

}  // namespace reducer::collective
