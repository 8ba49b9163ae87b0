// GroupState, where a standalone reducer that was lost is taken in again: docs/protocol.md.
//
// Rank 0 looks for it. When it has a connection, rank 0's reducer asks all workers for theirs; when
// all have one, it asks them to hold their next collective and to tell its number, and says then
// from which on the reducer takes part: the largest. So no piece has two owners.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <utility>

#include "collective/group_state.h"
#include "engine/describe.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

constexpr Duration kLastPatience = std::chrono::seconds(2);

// Of rank 0, to all: look its name up. (Where only rank 0 knows the name, its address must do.)
constexpr const char* kByName = "name";

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

void GroupState::tellBack(OwnerIndex owner, std::uint32_t attempt) {
  if (attempt != 0) {
    tellLeader(wire::FrameKind::kBack, owner, attempt, links_[owner]->reached());
    return;
  }
  bool by_name = false;
  {
    const std::lock_guard lock(mutex_);
    by_name = standing_[owner].by_name;
  }
  tellLeader(wire::FrameKind::kBack, owner, 0, by_name ? kByName : "");
}

// ------------------------------------------------------------------ a connection

void GroupState::lookForLost(TimePoint now) {
  if (config_.rank != 0) return;
  struct Opening {
    OwnerIndex owner;
    std::uint64_t generation;
    bool by_name;
  };
  std::vector<Opening> opening;
  std::vector<OwnerIndex> waiting;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok() || workers_left_ > 0 || epoch_ == 0) return;
    for (OwnerIndex owner = config_.world_size; owner < standing_.size(); ++owner) {
      Standing& standing = standing_[owner];
      if (!standing.lost || standing.attempt != 0 || now < standing.retry_at) continue;
      if (standing.link == Standing::Link::kNone) {
        standing.link = Standing::Link::kOpening;
        standing.by_name = !standing.by_name;
        opening.push_back({owner, links_[owner]->rearm(), standing.by_name});
      } else if (standing.link == Standing::Link::kOpen) {
        // Rank 0's reducer was busy with another, or waits for ranks that have not joined yet.
        standing.retry_at = now + kFirstPatience;
        waiting.push_back(owner);
      }
    }
  }
  for (const Opening& one : opening) links_[one.owner]->connect(one.generation, one.by_name);
  for (const OwnerIndex owner : waiting) tellBack(owner, 0);
}

void GroupState::onBack(const wire::Frame& frame) {
  const OwnerIndex owner = frame.owners.front();
  bool connected = false;
  std::optional<std::uint64_t> opening;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok() || !losable(owner) || owner >= standing_.size()) return;
    Standing& standing = standing_[owner];
    if (!standing.lost) return;
    standing.attempt = frame.epoch;
    connected = standing.link == Standing::Link::kOpen;
    if (standing.link == Standing::Link::kNone) {
      standing.link = Standing::Link::kOpening;
      opening = links_[owner]->rearm();
    }
  }
  if (opening) links_[owner]->connect(*opening, frame.text == kByName);
  if (connected) tellBack(owner, frame.epoch);
}

void GroupState::onWelcome(OwnerIndex owner) {
  if (!losable(owner)) return;
  local_.absentees().remove(addressOf(owner));
  std::uint32_t attempt = 0;
  {
    const std::lock_guard lock(mutex_);
    Standing& standing = standing_[owner];
    // (It may have been left while its welcome came.)
    if (!standing.lost || standing.link != Standing::Link::kOpening ||
        !links_[owner]->connected()) {
      return;
    }
    standing.link = Standing::Link::kOpen;
    standing.retry_at = transport_.now() + kFirstPatience;
    attempt = standing.attempt;
  }
  if (attempt == 0 && config_.rank != 0) return;
  tellBack(owner, attempt);
}

void GroupState::comebackFailed(OwnerIndex owner, const Status& reason) {
  std::uint32_t attempt = 0;
  bool tells = false;
  bool member = false;
  {
    const std::lock_guard lock(mutex_);
    if (!links_[owner]->closed()) return;  // it was opened once more meanwhile
    Standing& standing = standing_[owner];
    member = !standing.lost;
    standing.link = Standing::Link::kNone;
    tryLater(standing, kLastPatience);
    attempt = standing.attempt;
    // That nobody answers is usual; that somebody answers with an error, somebody should know.
    const bool refused = !reason.ok() && reason.code() != Code::kUnavailable;
    tells = refused && config_.rank == 0 && config_.settings.warns &&
            !std::exchange(standing.told, true);
  }
  if (member) return reportLost(owner, reason);
  if (tells) {
    std::fprintf(stderr,
                 "reducer: warning: group '%s': %s, which was lost, is there and does not take the "
                 "group in again: %s\n",
                 config_.name.c_str(), links_[owner]->name().c_str(), reason.message().c_str());
  }
  if (attempt != 0) tellLeader(wire::FrameKind::kLost, owner, 0, reason.message());
}

void GroupState::tryLater(Standing& standing, Duration longest) {
  standing.patience = std::min(standing.patience, longest);
  standing.retry_at = transport_.now() + standing.patience;
  standing.patience = std::min(2 * standing.patience, longest);
}

void GroupState::giveUpComeback(OwnerIndex owner, std::vector<Link::Taken>& taken) {
  Standing& standing = standing_[owner];
  if (standing.link == Standing::Link::kNone) return;
  standing.link = Standing::Link::kNone;
  tryLater(standing, standing.fruitless < kFruitlessMax ? kLastPatience : kFruitlessPatience);
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
    Queued live;
    for (auto& entry : queued) {
      (entry.second.operation->finished() ? change.rest : live).push_back(std::move(entry));
    }
    if (live.empty()) continue;
    // It may be done as soon as its pieces are queued, and must not end under the lock.
    const std::shared_ptr<Operation>& operation =
        change.started.emplace_back(live.front().second.operation);
    Status status = enqueue(std::move(live), owners);
    if (!status.ok()) change.orphans.emplace_back(operation, std::move(status));
  }
  held_.clear();
}

}  // namespace reducer::collective
