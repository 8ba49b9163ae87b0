// GroupState, where a standalone reducer that was lost is taken in again: docs/protocol.md.
//
// Rank 0 looks for it. When it has a connection, rank 0's reducer asks all workers for theirs; when
// all have one, it asks them to hold their next collective and to tell its number, and says then
// from which on the reducer takes part: the largest. So no piece has two owners.
#include <algorithm>
#include <limits>
#include <utility>

#include "collective/group_state.h"
#include "engine/describe.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

constexpr Duration kLastPatience = std::chrono::seconds(2);

}  // namespace

bool GroupState::isAway(OwnerIndex owner) {
  const std::lock_guard lock(mutex_);
  return standing_[owner].lost;
}

bool GroupState::tellLeader(wire::FrameKind kind, OwnerIndex owner, std::uint32_t attempt,
                            const std::string& text) {
  wire::Frame frame;
  frame.kind = kind;
  frame.owners = {owner};
  frame.epoch = attempt;
  frame.text = text;
  if (!links_[0]->tell(std::move(frame))) return false;
  links_[0]->pump(std::numeric_limits<std::size_t>::max());
  return true;
}

void GroupState::onNews(const wire::Frame& frame) {
  if (frame.kind == wire::FrameKind::kBack) {
    onBack(frame);
  } else if (frame.kind == wire::FrameKind::kHold) {
    onHold(frame);
  } else {
    onEpoch(frame);
  }
}

// ------------------------------------------------------------------ a connection

void GroupState::lookForLost(TimePoint now) {
  if (config_.rank != 0) return;
  const std::lock_guard lock(mutex_);
  if (!broken_.ok() || workers_left_ > 0 || epoch_ == 0) return;
  for (OwnerIndex owner = config_.world_size; owner < standing_.size(); ++owner) {
    Standing& standing = standing_[owner];
    if (!standing.lost || standing.link != Standing::Link::kNone || now < standing.retry_at) {
      continue;
    }
    standing.link = Standing::Link::kOpening;
    links_[owner]->reopen();
  }
}

void GroupState::onBack(const wire::Frame& frame) {
  const OwnerIndex owner = frame.owners.front();
  bool connected = false;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok() || !isServer(owner) || owner >= standing_.size()) return;
    Standing& standing = standing_[owner];
    if (!standing.lost) return;
    standing.attempt = frame.epoch;
    connected = standing.link == Standing::Link::kOpen;
    if (standing.link == Standing::Link::kNone) {
      standing.link = Standing::Link::kOpening;
      links_[owner]->reopen();
    }
  }
  if (connected) tellLeader(wire::FrameKind::kBack, owner, frame.epoch, "");
}

void GroupState::onWelcome(OwnerIndex owner) {
  std::uint32_t attempt = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!losable(owner) || !standing_[owner].lost) return;
    standing_[owner].link = Standing::Link::kOpen;
    attempt = standing_[owner].attempt;
  }
  if (attempt == 0 && config_.rank != 0) return;
  tellLeader(wire::FrameKind::kBack, owner, attempt, "");
}

void GroupState::comebackFailed(OwnerIndex owner, const Status& reason) {
  std::uint32_t attempt = 0;
  {
    const std::lock_guard lock(mutex_);
    Standing& standing = standing_[owner];
    standing.link = Standing::Link::kNone;
    standing.retry_at = transport_.now() + standing.patience;
    standing.patience = std::min(2 * standing.patience, kLastPatience);
    attempt = standing.attempt;
  }
  if (attempt != 0) tellLeader(wire::FrameKind::kLost, owner, 0, reason.message());
}

void GroupState::giveUpComeback(OwnerIndex owner, std::vector<Link::Taken>& taken) {
  Standing& standing = standing_[owner];
  if (standing.link == Standing::Link::kNone) return;
  standing.link = Standing::Link::kNone;
  standing.retry_at = transport_.now() + standing.patience;
  standing.patience = std::min(2 * standing.patience, kLastPatience);
  taken.push_back(links_[owner]->takeAway());
}

// ------------------------------------------------------------------ other groups' losses

// At the start, reducers have as long as the user says. Where one is there, the others count as
// lost after a heartbeat: they are taken in when they come.
void GroupState::missAbsentees(TimePoint now) {
  const Duration patience = config_.settings.heartbeat;
  const bool some = std::any_of(links_.begin() + config_.world_size, links_.end(),
                                [](const auto& link) { return link->wasConnected(); });
  const bool late = some && patience > Duration::zero() && now - started_ >= patience;
  for (OwnerIndex owner = config_.world_size; owner < links_.size(); ++owner) {
    if (!losable(owner) || links_[owner]->wasConnected() || isAway(owner)) continue;
    const bool absent = local_.absentees().contains(addressOf(owner));
    if (!absent && !late) continue;
    reportLost(owner, Status(Code::kUnavailable,
                             absent ? "another group of this process has lost it"
                                    : "it did not answer within " + engine::seconds(patience)));
  }
}

void GroupState::stopLooking() {
  std::vector<Link::Taken> taken;  // is let go without the lock
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(stopped_looking_, true)) return;
    for (OwnerIndex owner = config_.world_size; owner < standing_.size(); ++owner) {
      if (!standing_[owner].lost) continue;
      // What is begun there has nobody to say goodbye to.
      giveUpComeback(owner, taken);
    }
  }
  for (const Link::Taken& one : taken) one.leave();
}

// ------------------------------------------------------------------ a number

void GroupState::onHold(const wire::Frame& frame) {
  wire::Frame reply;
  reply.kind = wire::FrameKind::kHold;
  reply.epoch = frame.epoch;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
    holding_ = true;
    reply.slot.seq = sequence_;
  }
  if (!links_[0]->tell(std::move(reply))) return;
  links_[0]->pump(std::numeric_limits<std::size_t>::max());
}

void GroupState::endHold(Change& change) {
  holding_ = false;
  std::vector<OwnerIndex> owners;
  for (Queued& queued : held_) {
    std::erase_if(queued, [](const auto& entry) { return entry.second.operation->finished(); });
    if (queued.empty()) continue;
    const std::shared_ptr<Operation> operation = queued.front().second.operation;
    Status status = enqueue(std::move(queued), owners);
    if (!status.ok()) change.orphans.emplace_back(operation, std::move(status));
  }
  change.held.swap(held_);
}

}  // namespace reducer::collective
