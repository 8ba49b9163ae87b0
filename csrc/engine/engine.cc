#include "engine/engine.h"

#include <algorithm>

#include "common/check.h"
#include "common/limits.h"
#include "engine/describe.h"
#include "engine/slot.h"
#include "wire/lane.h"

namespace reducer::engine {
namespace {

// How long a mismatch waits for more ranks to show what they called before it is reported.
constexpr Duration kMismatchGrace = std::chrono::milliseconds(300);

// Empty slots kept for the next chunk, so that a chunk costs no allocation of its own.
constexpr std::size_t kSpareBytes = 256 << 10;

// What is told, and what fails, at one tick: the rest has to wait for the next.
constexpr int kLateATick = 64;
constexpr std::size_t kTimeoutsATick = 256;

// Of the words with which somebody left, each shard keeps as much.
constexpr std::size_t kGoneTextBytes = 256;

}  // namespace

bool Engine::ByOperation::operator()(const wire::SlotId& a, const wire::SlotId& b) const noexcept {
  if (a.seq != b.seq) return a.seq < b.seq;
  const std::uint64_t lane_a = wire::operationLane(a.lane);
  const std::uint64_t lane_b = wire::operationLane(b.lane);
  if (lane_a != lane_b) return lane_a < lane_b;
  return a.lane != b.lane ? a.lane < b.lane : a.chunk < b.chunk;
}

// ------------------------------------------------------------------ names for messages

std::string Engine::nameRank(const Group& group, Rank rank) {
  return engine::nameRank(rank, group.members[rank].host);
}

std::string Engine::nameOperation(const Group& group, const wire::Frame& head) {
  if (head.call.collective == Collective::kSendRecv) {
    return "group '" + group.name + "', send/recv from rank " + std::to_string(head.pusher) +
           " to rank " + std::to_string(head.puller) + " tag " +
           std::to_string(wire::tagOf(head.slot.lane)) + " #" + std::to_string(head.slot.seq);
  }
  if (wire::isStepLane(head.slot.lane)) {
    return "group '" + group.name + "', the second step of a collective";
  }
  return nameCollective(group.name, head.slot.seq);
}

std::string Engine::describeMismatch(const Group& group, const Slot& slot) {
  std::vector<const Arrival*> arrivals;
  for (const Arrival& arrival : slot.arrivals) arrivals.push_back(&arrival);
  std::sort(arrivals.begin(), arrivals.end(),
            [](const Arrival* a, const Arrival* b) { return a->rank < b->rank; });
  std::vector<Called> called;
  for (const Arrival* arrival : arrivals) {
    called.push_back({nameRank(group, arrival->rank), arrival->call});
  }
  return engine::describeMismatch(nameOperation(group, slot.head), called);
}

std::string Engine::describeWait(const Group& group, const Slot& slot, TimePoint now) {
  std::vector<std::string> missing;
  std::vector<std::string> here;
  for (Rank rank = 0; rank < static_cast<Rank>(group.members.size()); ++rank) {
    if (slot.arrived[rank]) {
      here.push_back(nameRank(group, rank));
    } else if (takesPart(group, slot, rank)) {
      missing.push_back(nameRank(group, rank));
    }
  }
  return engine::describeWait(nameOperation(group, slot.head), slot.head.call, now - slot.since,
                              missing, here);
}

Joined Engine::joined(const std::string& job, Rank rank) const {
  const auto group = groups_.find(job);
  if (group == groups_.end() || rank < 0) return {};
  const std::vector<Member>& members = group->second->members;
  return static_cast<std::size_t>(rank) < members.size() ? members[rank].joined : Joined();
}

// ------------------------------------------------------------------ membership

void Engine::join(const PeerRef& peer, const wire::Hello& hello,
                  const std::shared_ptr<MemoryAccount>& account, Actions& actions) {
  std::unique_ptr<Group>& group = groups_[hello.job];
  if (!group) {
    group = std::make_unique<Group>();
    group->name = hello.group;
    group->placement = hello.hosts.empty()
                           ? std::make_shared<const Placement>(static_cast<Rank>(hello.world_size))
                           : std::make_shared<const Placement>(hello.hosts);
    group->members.resize(hello.world_size);
    group->account = account;
  }
  REDUCER_CHECK(hello.rank >= 0 && hello.rank < static_cast<Rank>(group->members.size()));
  if (group->members[hello.rank].gone) --group->gone;
  group->members[hello.rank] =
      Member{.peer = peer, .host = hello.host, .gone_text = {}, .joined = {}};
  ++group->connected;
  places_[peer.get()] = {hello.job, Place{group.get(), hello.rank}};
  if (!peer->in_process) return;
  for (Rank rank = 0; rank < static_cast<Rank>(group->members.size()); ++rank) {
    if (group->members[rank].left) tellLeft(peer, rank, actions);
  }
  for (const auto& [id, slot] : group->slots) tellReceiver(*group, *slot, actions);
}

// A receive from any rank has to learn who sends. The receiver is in this process, so that costs no
// frame on the network.
void Engine::tellReceiver(const Group& group, const Slot& slot, Actions& actions) {
  const wire::SlotId& id = slot.head.slot;
  if (!wire::isPairLane(id.lane) || id.chunk != 0 || slot.head.puller == kAllRanks) return;
  const PeerRef& receiver = group.members[slot.head.puller].peer;
  if (!receiver || !receiver->in_process || slot.arrived[slot.head.puller]) return;
  wire::Frame notice;
  notice.kind = wire::FrameKind::kArrived;
  notice.slot = id;
  actions.sends.push_back(Outgoing{receiver, std::move(notice), {}, false});
}

// What does not go through a reducer waits for that rank, too.
void Engine::tellLeft(const PeerRef& peer, Rank left, Actions& actions) {
  wire::Frame notice;
  notice.kind = wire::FrameKind::kLeft;
  notice.pusher = left;
  actions.sends.push_back(Outgoing{peer, std::move(notice), {}, false});
}

void Engine::leave(const PeerRef& peer, const Status& why, Actions& actions) {
  const auto found = places_.find(peer.get());
  if (found == places_.end()) return;
  const auto [job, place] = found->second;
  places_.erase(found);
  Group& group = *place.group;
  Member& member = group.members[place.rank];
  member.peer.reset();
  member.left = why.ok();
  // Who was thrown out for what it sent has been told so, and comes no more.
  if (why.ok() || judges_ || why.code() != Code::kUnavailable) {
    member.gone = true;
    ++group.gone;
  }
  member.gone_text =
      why.ok() ? "left the group" : "was lost (" + why.message().substr(0, kGoneTextBytes) + ")";
  if (--group.connected == 0) {
    for (auto& [id, slot] : group.slots) drop(std::move(slot));
    groups_.erase(job);
    return;
  }
  if (member.left) {
    for (const Member& other : group.members) {
      if (other.peer && other.peer->in_process) tellLeft(other.peer, place.rank, actions);
    }
  }
  failHopeless(group, actions);
}

void Engine::failHopeless(Group& group, Actions& actions) {
  std::vector<wire::SlotId> ids;
  for (const auto& [id, slot] : group.slots) ids.push_back(id);
  for (const wire::SlotId& id : ids) {
    const auto slot = group.slots.find(id);  // failing one slot drops the others of its operation
    if (slot != group.slots.end()) failIfHopeless(group, *slot->second, actions);
  }
}

bool Engine::failIfHopeless(Group& group, Slot& slot, Actions& actions) {
  if (group.gone == 0) return false;  // asked at every push, of perhaps a thousand ranks
  if (slot.again_epoch > 0 || moving(group)) return false;
  for (Rank rank = 0; rank < static_cast<Rank>(group.members.size()); ++rank) {
    const Member& member = group.members[rank];
    if (!member.gone || slot.arrived[rank] || !takesPart(group, slot, rank)) continue;
    fail(group, slot.head, Code::kUnavailable,
         nameOperation(group, slot.head) + ", " + describe(slot.head.call) + ": " +
             nameRank(group, rank) + " " + member.gone_text + " before it joined in",
         actions, member.left ? kAllRanks : rank);
    return true;
  }
  return false;
}

// ------------------------------------------------------------------ slots

/// `ranks`: a frame's pusher or puller.
bool Engine::isAmong(const Group& group, Rank ranks, Rank rank) {
  if (isRail(ranks)) return group.placement->carries(rank, shareOf(ranks));
  return ranks == kAllRanks || ranks == rank;
}

bool Engine::takesPart(const Group& group, const Slot& slot, Rank rank) {
  return isAmong(group, slot.head.pusher, rank) || isAmong(group, slot.head.puller, rank);
}

std::size_t Engine::participantsOf(const Group& group, const wire::Frame& head) {
  if (head.pusher == kAllRanks || head.puller == kAllRanks) return group.members.size();
  if (!isRail(head.pusher) && !isRail(head.puller)) return head.pusher == head.puller ? 1 : 2;
  std::size_t participants = 0;
  for (Rank r = 0; r < static_cast<Rank>(group.members.size()); ++r) {
    participants += isAmong(group, head.pusher, r) || isAmong(group, head.puller, r) ? 1 : 0;
  }
  return participants;
}

Engine::Slot* Engine::slotFor(Group& group, const wire::Frame& frame, TimePoint now, bool* made) {
  *made = false;
  const auto place = group.slots.lower_bound(frame.slot);
  if (place != group.slots.end() && place->first == frame.slot) return place->second.get();
  std::size_t pushers = group.members.size();
  if (isRail(frame.pusher)) pushers = static_cast<std::size_t>(group.placement->hosts());
  if (hasOnePusher(frame)) pushers = 1;
  const std::size_t nbytes = sizeof(Slot) + pushers * sizeof(Payload) + group.members.size();
  Charge charge = Charge::ifPossible(group.account, nbytes, made);
  if (!*made && !group.failures.empty()) {
    group.failures.clear();
    group.failed.clear();
    charge = Charge::ifPossible(group.account, nbytes, made);
  }
  if (!*made) return nullptr;
  std::unique_ptr<Slot> slot;
  if (spare_.empty()) {
    slot = std::make_unique<Slot>();
  } else {
    slot = std::move(spare_.back());
    spare_.pop_back();
    spare_bytes_ -= spareBytes(*slot);
  }
  slot->charge = std::move(charge);
  slot->head = frame;
  slot->participants = participantsOf(group, frame);
  slot->contributions.resize(pushers);
  slot->arrived.assign(group.members.size(), 0);
  slot->parts = 0;
  slot->handed_on = false;
  slot->again_epoch = 0;
  slot->mismatch = false;
  slot->since = now;
  slot->deadline = TimePoint::max();
  slot->late_at = TimePoint::max();
  ++counters_.slots_open;
  return group.slots.emplace_hint(place, frame.slot, std::move(slot))->second.get();
}

void Engine::drop(std::unique_ptr<Slot> slot) {
  slot->contributions.clear();
  slot->handed = {};
  slot->arrivals.clear();
  slot->charge = {};
  --counters_.slots_open;
  const std::size_t nbytes = spareBytes(*slot);
  if (spare_bytes_ + nbytes > kSpareBytes) return;
  spare_bytes_ += nbytes;
  spare_.push_back(std::move(slot));
}

std::size_t Engine::spareBytes(const Slot& slot) {
  return sizeof(Slot) + slot.arrivals.capacity() * sizeof(Arrival) +
         slot.contributions.capacity() * sizeof(Payload) + slot.arrived.capacity();
}

Status Engine::checkPush(const Group& group, Rank rank, const wire::Frame& frame,
                         const Payload& payload) {
  const auto world = static_cast<Rank>(group.members.size());
  if (frame.pusher >= world || frame.puller >= world) {
    return broken("pusher " + std::to_string(frame.pusher) + " or puller " +
                  std::to_string(frame.puller) + " is not in a group of " + std::to_string(world));
  }
  for (const Rank ranks : {frame.pusher, frame.puller}) {
    if (!isRail(ranks) || shareOf(ranks) < group.placement->widest()) continue;
    return broken("share " + std::to_string(shareOf(ranks)) +
                  " of a rail, in a group that has at most " +
                  std::to_string(group.placement->widest()) + " ranks on one host");
  }
  const bool pushes = isAmong(group, frame.pusher, rank);
  if (!pushes && !isAmong(group, frame.puller, rank)) {
    return broken("rank " + std::to_string(rank) + " takes no part in the slot that it pushed");
  }
  // What comes again is the answer that a puller had, or else what it pushed.
  const std::size_t expected = pushes || frame.again ? frame.length : 0;
  if (payload.nbytes() != expected) {
    return broken("a push of " + std::to_string(frame.length) + " bytes came with " +
                  std::to_string(payload.nbytes()));
  }
  const std::size_t element = sizeOf(frame.call.dtype);
  if (element == 0 || frame.length % element != 0 || frame.length > kMaxChunkBytes) {
    return broken("a chunk of " + std::to_string(frame.length) + " bytes is not possible with " +
                  std::string(nameOf(frame.call.dtype)));
  }
  if (!hasOnePusher(frame) && frame.length > 0 &&
      (frame.call.op == ReduceOp::kNone || !supports(frame.call.op, frame.call.dtype))) {
    return broken(std::string(nameOf(frame.call.op)) + " has no meaning on " +
                  std::string(nameOf(frame.call.dtype)));
  }
  return {};
}

Status Engine::onPush(const PeerRef& peer, const wire::Frame& frame, Payload payload, TimePoint now,
                      Actions& actions) {
  const auto found = places_.find(peer.get());
  if (found == places_.end()) return broken("a push before the hello");
  Group& group = *found->second.second.group;
  const Rank rank = found->second.second.rank;
  if (Status status = checkPush(group, rank, frame, payload); !status.ok()) return status;

  if (frame.again) return onAgain(group, rank, frame, std::move(payload), now, actions);
  if (wire::operationLane(frame.slot.lane) == wire::kCollectiveLane) {
    group.members[rank].acked = frame.acked;
    group.members[rank].acked_epoch = frame.epoch;
  }

  if (const Failure* failure = findFailure(group, operationOf(frame.slot))) {
    wire::Frame reply;
    reply.kind = wire::FrameKind::kError;
    reply.slot = frame.slot;
    reply.length = frame.length;
    reply.code = failure->code;
    reply.text = failure->text;
    reply.pusher = failure->lost;
    actions.sends.push_back(Outgoing{peer, std::move(reply), {}, false});
    return {};
  }

  bool made = false;
  Slot* const place = slotFor(group, frame, now, &made);
  if (place == nullptr) return noMemory();
  Slot& slot = *place;
  if (made && frame.puller != rank) tellReceiver(group, slot, actions);
  if (slot.arrived[rank]) {
    return broken("rank " + std::to_string(rank) + " pushed chunk " +
                  std::to_string(frame.slot.chunk) + " of operation " +
                  std::to_string(frame.slot.seq) + " twice");
  }
  if (!sameShape(slot.head, frame) && !slot.mismatch) {
    slot.mismatch = true;
    slot.deadline = std::min(slot.deadline, now + kMismatchGrace);
  }
  if (frame.timeout_ms != 0) {
    const Duration timeout = std::chrono::milliseconds(frame.timeout_ms);
    slot.deadline = std::min(slot.deadline, now + timeout);
    // Of an operation's slots one speaks.
    const std::uint64_t lane = frame.slot.lane;
    if (frame.slot.chunk == 0 && (lane == wire::kCollectiveLane || wire::isPairLane(lane))) {
      slot.late_at = std::min(slot.late_at, now + timeout / 3);
    }
  }
  arrive(group, slot, peer, rank, frame, std::move(payload), actions);
  return {};
}

void Engine::arrive(Group& group, Slot& slot, const PeerRef& peer, Rank rank,
                    const wire::Frame& frame, Payload payload, Actions& actions) {
  slot.arrived[rank] = 1;
  ++slot.parts;
  slot.arrivals.push_back(Arrival{rank, peer, frame.call, frame.length, {}});
  if (wire::operationLane(frame.slot.lane) == wire::kCollectiveLane) {
    group.members[rank].joined.learn({frame.slot.seq + 1, frame.call});
  }
  if (slot.mismatch) {
    // Of a rail only carriers come, too few to say who called what: that is said at the slot where
    // all ranks show their calls. This one speaks up only if none of the others does.
    const bool all_come =
        wire::isEverybodys(frame.slot.lane) || isRail(slot.head.pusher) || isRail(slot.head.puller);
    const std::size_t all = all_come ? group.members.size() : 2;
    if (slot.arrivals.size() >= all) {
      fail(group, slot.head, Code::kMismatch, describeMismatch(group, slot), actions);
    }
    return;
  }
  if (isAmong(group, slot.head.pusher, rank)) {
    slot.head.has_checksum |= frame.has_checksum;
    hold(group, slot, rank, std::move(payload));
  } else {
    slot.arrivals.back().empty = std::move(payload);
  }
  if (slot.handed_on) return handOn(group, slot, actions);
  complete(group, slot, actions);
}

void Engine::hold(const Group& group, Slot& slot, Rank rank, Payload payload) {
  std::size_t place = 0;
  if (isRail(slot.head.pusher)) place = group.placement->hostOf(rank);
  if (slot.head.pusher == kAllRanks) place = rank;
  slot.contributions[place] = std::move(payload);
}

// Nobody is answered before all are there: as long as one rank may still show another call, no
// result may leave, or some ranks would have it and others an error.
void Engine::complete(Group& group, Slot& slot, Actions& actions) {
  if (slot.parts < slot.participants) {
    failIfHopeless(group, slot, actions);
    return;
  }
  finish(group, slot, actions);
  const auto node = group.slots.find(slot.head.slot);
  drop(std::move(node->second));
  group.slots.erase(node);
}

// ------------------------------------------------------------------ answers

void Engine::acknowledge(const Group& group, wire::Frame& result) {
  result.acked = group.members[0].acked;
  result.epoch = group.members[0].acked_epoch;
  for (const Member& member : group.members) {
    result.acked = std::min(result.acked, member.acked);
    result.epoch = std::min(result.epoch, member.acked_epoch);
  }
}

void Engine::finish(const Group& group, Slot& slot, Actions& actions) {
  ++counters_.slots_done;
  Ready ready;
  answerAll(group, slot, ready.replies);
  if (hasOnePusher(slot.head)) {
    for (Outgoing& reply : ready.replies) actions.sends.push_back(std::move(reply));
    return;
  }
  ready.call = slot.head.call;
  ready.nbytes = slot.head.length;
  ready.checksum = slot.head.has_checksum;
  ready.world_size = group.placement->worldSize();
  if (slot.head.pusher == kAllRanks && group.placement->levels()) ready.by_host = group.placement;
  ready.account = group.account;
  ready.contributions = std::move(slot.contributions);
  slot.contributions.clear();
  actions.ready.push_back(std::move(ready));
}

// The worker that this reducer lives in comes last: when its operation is done it may end, and the
// others' answers must have been handed on by then.
void Engine::answerAll(const Group& group, const Slot& slot, std::vector<Outgoing>& replies) {
  wire::Frame result;
  acknowledge(group, result);
  replies.reserve(replies.size() + slot.arrivals.size());
  for (const bool in_process : {false, true}) {
    for (const Arrival& arrival : slot.arrivals) {
      if (arrival.peer->in_process != in_process) continue;
      answer(group, slot, arrival, result, replies);
    }
  }
}

void Engine::answer(const Group& group, const Slot& slot, const Arrival& arrival,
                    const wire::Frame& result, std::vector<Outgoing>& replies) {
  Outgoing out;
  out.to = arrival.peer;
  out.frame = result;
  out.frame.kind = wire::FrameKind::kResult;
  out.frame.slot = slot.head.slot;
  out.frame.length = arrival.length;  // the head's, but for a mismatch
  const bool pulls = isAmong(group, slot.head.puller, arrival.rank);
  // What one rank pushes comes back to it only where it is the one that is asked for.
  const bool own = arrival.rank == slot.head.pusher && slot.head.puller != arrival.rank;
  if (!slot.handed_on && !hasOnePusher(slot.head)) {
    out.wants_result = pulls;
  } else if (pulls && !own) {
    out.payload = slot.handed_on ? slot.handed : slot.contributions[0];
    if (slot.head.has_checksum) {
      out.frame.has_checksum = true;
      out.frame.checksum = wire::crc32c(out.payload);
    }
  }
  replies.push_back(std::move(out));
}

// ------------------------------------------------------------------ time

/// All that are here get the text; one of them, `pusher`, is to say it aloud.
void Engine::tellLate(const Group& group, const Slot& slot, TimePoint now, Actions& actions) {
  if (slot.arrivals.empty()) return;
  std::vector<std::string> missing;
  for (Rank rank = 0; rank < static_cast<Rank>(group.members.size()); ++rank) {
    if (slot.arrived[rank] || !takesPart(group, slot, rank)) continue;
    if (group.members[rank].gone) return;  // of that the operation ends
    missing.push_back(nameRank(group, rank));
  }
  wire::Frame news;
  news.kind = wire::FrameKind::kLate;
  news.slot = slot.head.slot;
  news.pusher = slot.arrivals.front().rank;
  for (const Arrival& arrival : slot.arrivals) news.pusher = std::min(news.pusher, arrival.rank);
  news.text =
      engine::describeLate(nameOperation(group, slot.head), slot.head.call, now - slot.since,
                           std::chrono::milliseconds(slot.head.timeout_ms), missing);
  for (const Arrival& arrival : slot.arrivals) {
    actions.sends.push_back(Outgoing{arrival.peer, news, {}, false});
  }
}

void Engine::tick(TimePoint now, Actions& actions) {
  int told = 0;
  for (auto& [job, group] : groups_) {
    std::vector<wire::SlotId> late;
    for (const auto& [id, slot] : group->slots) {
      if (slot->deadline <= now && late.size() < kTimeoutsATick) late.push_back(id);
      if (slot->late_at > now || told >= kLateATick) continue;
      slot->late_at = TimePoint::max();
      if (slot->mismatch || slot->deadline <= now) continue;
      tellLate(*group, *slot, now, actions);
      ++told;
    }
    for (const wire::SlotId& id : late) {
      const auto found = group->slots.find(id);
      if (found == group->slots.end()) continue;  // went with another slot of its operation
      const Slot& slot = *found->second;
      if (slot.mismatch) {
        fail(*group, slot.head, Code::kMismatch, describeMismatch(*group, slot), actions);
      } else {
        fail(*group, slot.head, Code::kTimeout, describeWait(*group, slot, now), actions);
      }
    }
  }
}

}  // namespace reducer::engine
