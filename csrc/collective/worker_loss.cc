// GroupState, where a worker is lost, or does not come.
#include <cstdio>

#include "collective/group_state.h"
#include "wire/lane.h"

namespace reducer::collective {

std::string GroupState::nameOfRank(Rank rank) const {
  return engine::nameRank(rank,
                          config_.hosts.empty() ? config_.workers[rank] : config_.hosts[rank]);
}

// A reducer knows only of the pushes that went to it. What is done here every rank has joined.
engine::Joined GroupState::joined(Rank rank) {
  if (rank < 0 || rank >= config_.world_size) return {};  // a peer may say anything
  engine::Joined joined = local_.joined(config_.job, rank);
  if (joined_by_) joined.learn(joined_by_(rank));
  const std::lock_guard lock(mutex_);
  joined.learn(finished_);
  return joined;
}

void GroupState::loseWorker(Rank rank, const std::string& what, engine::Joined told) {
  told.learn(joined(rank));
  abort(Status(Code::kUnavailable, what + engine::describeJoined(told) +
                                       "; make a new group without it, or restart it"));
}

void GroupState::onLate(const wire::Frame& frame) {
  std::shared_ptr<Operation> operation;
  {
    const std::lock_guard lock(mutex_);
    const auto found = operations_.find({wire::operationLane(frame.slot.lane), frame.slot.seq});
    if (found != operations_.end()) operation = found->second.lock();
  }
  if (!operation) return;
  operation->record().late(frame.text);
  if (frame.pusher != config_.rank || !config_.settings.warns) return;
  std::fprintf(stderr, "reducer: warning: %s\n", frame.text.c_str());
}

}  // namespace reducer::collective
