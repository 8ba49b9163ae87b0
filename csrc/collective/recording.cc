// GroupState, as the flight recorder sees it.
#include "collective/group_state.h"
#include "wire/lane.h"

namespace reducer::collective {

std::uint32_t GroupState::enroll(const GroupConfig& config) {
  if (config.recorder == nullptr) return 0;
  recorder::GroupInfo info;
  info.job = config.job;
  info.name = config.name;
  info.rank = config.rank;
  info.world_size = config.world_size;
  info.hosts = config.hosts;
  return config.recorder->add(std::move(info));
}

GroupState::~GroupState() {
  if (config_.recorder != nullptr) config_.recorder->remove(recorded_);
}

std::string_view GroupState::wayOf(const wire::Call& call, std::uint64_t lane,
                                   const CallOptions& options) const {
  if (options.algorithm) return nameOf(*options.algorithm);
  const bool mapped = call.collective == Collective::kAllReduce ||
                      call.collective == Collective::kReduce ||
                      call.collective == Collective::kBroadcast;
  if (!mapped || wire::isPairLane(lane)) return nameOf(Algorithm::kDirect);
  const Algorithm chosen = routes_.at(call.count * sizeOf(call.dtype)).range.algorithm;
  const bool turns = chosen != Algorithm::kRing || call.collective == Collective::kAllReduce;
  return nameOf(turns ? chosen : Algorithm::kDirect);
}

std::shared_ptr<recorder::Record> GroupState::recordReceive(Rank from, std::uint32_t tag,
                                                            const wire::Call& call) {
  return std::make_shared<recorder::Record>(config_.recorder, false, [&](recorder::Entry& entry) {
    entry.group = recorded_;
    entry.any_source = true;  // its number is not known, even where the sender is
    entry.lane = wire::pairLane(from == kAllRanks ? 0 : from, config_.rank, tag);
    entry.call = call;
    entry.algorithm = nameOf(Algorithm::kDirect);
    entry.queued = Clock::now();
  });
}

std::vector<std::string> GroupState::waitsFor(std::uint64_t lane, std::uint64_t seq) {
  std::shared_ptr<Operation> operation;
  {
    const std::lock_guard lock(mutex_);
    const auto found = operations_.find({lane, seq});
    if (found != operations_.end()) operation = found->second.lock();
  }
  std::vector<std::string> names;
  if (!operation) return names;
  for (const auto& link : links_) {
    const std::size_t pieces = link->waiting(*operation);
    if (pieces == 0) continue;
    names.push_back(link->name() + " (" + std::to_string(pieces) +
                    (pieces == 1 ? " chunk" : " chunks") +
                    (link->connected() ? ")" : ", not connected)"));
  }
  return names;
}

}  // namespace reducer::collective
