// How an operation fails for all, and what late ranks hear of it.
#include <utility>

#include "common/limits.h"
#include "engine/engine.h"
#include "engine/slot.h"

namespace reducer::engine {
namespace {

// Failed operations that are remembered for ranks that come late; of more, the oldest are
// forgotten.
constexpr std::size_t kFailuresKept = 1024;

}  // namespace

Engine::Failure* Engine::findFailure(Group& group, OperationId id) {
  const auto found = group.failures.find(id);
  return found == group.failures.end() ? nullptr : &found->second;
}

void Engine::fail(Group& group, const wire::Frame& head, Code code, const std::string& text,
                  Actions& actions, Rank lost) {
  const OperationId id = operationOf(head.slot);
  const std::string said = text.substr(0, kMaxTextBytes);
  remember(group, id,
           Failure{code, said, lost, std::vector<bool>(group.members.size()), 0, {}, {}});
  std::vector<bool> told(group.members.size());  // why; of their other chunks only that
  auto it = group.slots.lower_bound(wire::SlotId{id.first, id.second, 0});
  while (it != group.slots.end() && operationOf(it->first) == id) {
    Slot& slot = *it->second;
    for (const Arrival& arrival : slot.arrivals) {
      wire::Frame reply;
      reply.kind = wire::FrameKind::kError;
      reply.slot = it->first;
      reply.length = arrival.length;
      reply.code = code;
      if (!told[arrival.rank]) reply.text = said;
      told[arrival.rank] = true;
      reply.pusher = lost;
      actions.sends.push_back(Outgoing{arrival.peer, std::move(reply), {}, false});
    }
    ++counters_.slots_failed;
    drop(std::move(it->second));
    it = group.slots.erase(it);
  }
}

/// For ranks that come late. What there is no memory for is forgotten, the oldest first: they wait
/// until their own timeout then.
void Engine::remember(Group& group, OperationId id, Failure failure) {
  const std::size_t nbytes = 2 * sizeof(Failure) + failure.text.size() + group.members.size() / 8;
  bool kept = false;
  forget(group, id);
  while (true) {
    if (group.failed.size() < kFailuresKept) {
      failure.charge = Charge::ifPossible(group.account, nbytes, &kept);
    }
    if (kept || group.failed.empty()) break;
    forget(group, group.failed.front());
  }
  if (!kept) return;
  failure.place = group.failed.insert(group.failed.end(), id);
  group.failures.emplace(id, std::move(failure));
}

void Engine::forget(Group& group, OperationId id) {
  const auto found = group.failures.find(id);
  if (found == group.failures.end()) return;
  group.failed.erase(found->second.place);
  group.failures.erase(found);
}

Status Engine::onCancel(const PeerRef& peer, const wire::Frame& frame, Actions& actions) {
  const auto found = places_.find(peer.get());
  if (found == places_.end()) return broken("a cancel before the hello");
  Group& group = *found->second.second.group;
  const Rank rank = found->second.second.rank;
  const OperationId id = operationOf(frame.slot);
  if (findFailure(group, id) == nullptr) {
    // The one that cancels is answered too: it ignores that, but its window is counted by answers.
    const Code code = frame.code == Code::kOk ? Code::kAborted : frame.code;
    fail(group, frame, code, frame.text, actions);
  }
  Failure* failure = findFailure(group, id);
  if (failure == nullptr) return {};
  if (!failure->cancelled[rank]) {
    failure->cancelled[rank] = true;
    ++failure->cancels;
  }
  if (failure->cancels == group.members.size()) forget(group, id);
  return {};
}

}  // namespace reducer::engine
