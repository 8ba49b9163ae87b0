// What a reducer that is lost had answered comes again: docs/protocol.md.
#include <algorithm>

#include "engine/engine.h"
#include "engine/slot.h"

namespace reducer::engine {

Status Engine::onAgain(Group& group, Rank rank, const wire::Frame& frame, Payload payload,
                       TimePoint now, Actions& actions) {
  if (findFailure(group, operationOf(frame.slot)) != nullptr) return {};
  bool made = false;
  Slot* const place = slotFor(group, frame, now, &made);
  if (place == nullptr) return noMemory();
  Slot& slot = *place;
  if (slot.mismatch) return {};  // it is about to fail
  if (!sameShape(slot.head, frame)) {
    return broken("what rank " + std::to_string(rank) + " was answered is of another shape than " +
                  "what others push");
  }
  slot.again_epoch = std::max(slot.again_epoch, frame.epoch);
  slot.head.has_checksum |= frame.has_checksum;
  if (isAmong(group, frame.puller, rank)) {
    if (slot.handed_on) return {};  // any result is the result
    slot.handed_on = true;
    slot.handed = std::move(payload);
    handOn(group, slot, actions);
    return {};
  }
  if (slot.arrived[rank]) return {};
  slot.arrived[rank] = 1;
  ++slot.parts;
  hold(group, slot, rank, std::move(payload));
  if (slot.handed_on) {
    handOn(group, slot, actions);
  } else {
    complete(group, slot, actions);
  }
  return {};
}

/// Answers all who wait for what was handed on. The slot stays: others may ask, until all have
/// settled.
void Engine::handOn(const Group& group, Slot& slot, Actions& actions) {
  for (Payload& held : slot.contributions) held = {};
  answerAll(group, slot, actions.sends);
  slot.arrivals.clear();
  slot.deadline = TimePoint::max();
}

bool Engine::moving(const Group& group) {
  std::uint32_t latest = 0;
  for (const Member& member : group.members) {
    latest = std::max({latest, member.acked_epoch, member.settled});
  }
  return std::any_of(group.members.begin(), group.members.end(), [latest](const Member& member) {
    return !member.gone && member.settled < latest;
  });
}

Status Engine::onSettled(const PeerRef& peer, const wire::Frame& frame, Actions& actions) {
  const auto found = places_.find(peer.get());
  if (found == places_.end()) return broken("a word on an epoch before the hello");
  Group& group = *found->second.second.group;
  Member& member = group.members[found->second.second.rank];
  member.acked = frame.acked;
  member.acked_epoch = frame.epoch;
  member.settled = std::max(member.settled, frame.epoch);
  std::uint32_t epoch = member.settled;
  for (const Member& other : group.members) {
    if (!other.gone) epoch = std::min(epoch, other.settled);
  }
  for (auto it = group.slots.begin(); it != group.slots.end();) {
    Slot& slot = *it->second;
    // (All who still asked were answered: no slot with a result has arrivals that wait.)
    if (slot.again_epoch == 0 || slot.again_epoch > epoch || !slot.arrivals.empty()) {
      ++it;
      continue;
    }
    drop(std::move(it->second));
    it = group.slots.erase(it);
  }
  if (group.gone > 0) failHopeless(group, actions);
  return {};
}

}  // namespace reducer::engine
