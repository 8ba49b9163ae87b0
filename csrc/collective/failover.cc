// GroupState, where standalone reducers are lost: docs/protocol.md.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <map>
#include <numeric>

#include "collective/group_state.h"
#include "engine/describe.h"

namespace reducer::collective {
namespace {

/// Spreads evenly over owners, for any set of keys.
std::uint64_t affinity(std::uint64_t key, OwnerIndex owner) {
  std::uint64_t hash = (key + 1) * 0x9E3779B97F4A7C15ULL ^ (owner + 1) * 0xC2B2AE3D27D4EB4FULL;
  hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ULL;
  hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBULL;
  return hash ^ (hash >> 31);
}

}  // namespace

// The highest affinity: when an owner is lost, its pieces move and no others do (rendezvous
// hashing, Thaler and Ravishankar 1998).
OwnerIndex GroupState::heirOf(std::uint64_t key) const {
  const auto n = static_cast<OwnerIndex>(config_.world_size);
  const auto all = static_cast<OwnerIndex>(standing_.size());
  const auto best = [&](OwnerIndex begin, OwnerIndex end) {
    OwnerIndex found = end;
    std::uint64_t highest = 0;
    for (OwnerIndex owner = begin; owner < end; ++owner) {
      if (!isMember(owner, key >> kPlaceBits)) continue;
      const std::uint64_t own = affinity(key, owner);
      if (found != end && own <= highest) continue;
      highest = own;
      found = owner;
    }
    return found;
  };
  const OwnerIndex standalone = best(n, all);
  return standalone < all ? standalone : best(0, n);
}

GroupState::Queued GroupState::heirsOf(const Cursor& cursor) const {
  std::map<OwnerIndex, std::vector<std::uint64_t>> rounds;
  Cursor at = cursor;
  for (; at.round < at.end; ++at.round) {
    rounds[heirOf(at.operation->key(at))].push_back(at.at());
  }
  Queued queued;
  for (auto& [heir, picked] : rounds) {
    Cursor part = cursor;
    part.window_bytes = 0;
    part.round = 0;
    part.end = picked.size();
    part.picked = std::make_shared<const std::vector<std::uint64_t>>(std::move(picked));
    part.moved = true;
    queued.emplace_back(heir, std::move(part));
  }
  return queued;
}

// Where no standalone reducer has been a member since before all that may move, workers' reducers
// are heirs, too.
std::vector<OwnerIndex> GroupState::heirs() const {
  const auto n = static_cast<OwnerIndex>(config_.world_size);
  std::vector<OwnerIndex> all;
  bool enough = false;
  for (OwnerIndex owner = n; owner < standing_.size(); ++owner) {
    if (standing_[owner].lost) continue;
    all.push_back(owner);
    enough |= standing_[owner].since == 0;
  }
  for (OwnerIndex owner = 0; owner < n && !enough; ++owner) all.push_back(owner);
  return all;
}

void GroupState::pumpHeirs() {
  std::vector<OwnerIndex> all;
  {
    const std::lock_guard lock(mutex_);
    all = heirs();
  }
  for (const OwnerIndex heir : all) links_[heir]->pump(std::numeric_limits<std::size_t>::max());
}

GroupState::Queued GroupState::withHeirs(Queued queued) const {
  Queued all;
  for (auto& [owner, cursor] : queued) {
    if (isMember(owner, cursor.operation->info().seq)) {
      all.emplace_back(owner, std::move(cursor));
    } else {
      for (auto& moved : heirsOf(cursor)) all.push_back(std::move(moved));
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  return all;
}

void GroupState::reportLost(OwnerIndex owner, const Status& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok() || standing_[owner].lost) return;
  }
  const std::string why = reason.ok() ? "it has left" : reason.message();
  const std::string says =
      "rank " + std::to_string(config_.rank) + " (" + config_.host + ") says: " + why;
  if (!tellLeader(wire::FrameKind::kLost, owner, 0, says)) abortUndecided(owner, why);
}

void GroupState::abortUndecided(OwnerIndex owner, const std::string& why) {
  abort(Status(Code::kUnavailable, links_[owner]->name() + " is gone: " + why +
                                       "; and rank 0, which would have told where its work goes, "
                                       "has left the group"));
}

void GroupState::onLinkDown(OwnerIndex owner, const Status& reason) {
  const std::string& name = links_[owner]->name();
  const bool replaceable = reason.ok() || reason.code() == Code::kUnavailable;
  if (losable(owner) && isAway(owner)) return comebackFailed(owner, reason);
  if (losable(owner) && replaceable && (links_[owner]->wasConnected() || anyReachable())) {
    return reportLost(owner, reason);
  }
  if (reason.ok()) {
    // It left in good order: only what still needs it fails, now or later.
    std::vector<Receives::Request> unmatched;
    const bool worker = owner < static_cast<OwnerIndex>(config_.world_size);
    if (owner == 0) {
      for (OwnerIndex other = 0; other < links_.size(); ++other) {
        // Nobody will decide any more.
        if (losable(other) && links_[other]->isDown() && !isAway(other)) {
          return abortUndecided(other, "it was lost");
        }
      }
      releaseHold();
    }
    if (worker) {
      const std::lock_guard lock(mutex_);
      const bool was_last = ++workers_left_ == config_.world_size - 1;
      unmatched = receives_.left(static_cast<Rank>(owner), was_last);
    }
    if (worker) onLeft(static_cast<Rank>(owner));
    for (const Receives::Request& request : unmatched) {
      request.fail(Status(Code::kUnavailable, "recv: " + links_[owner]->hasLeft()));
    }
    for (const auto& operation : operations()) {
      if (links_[owner]->waiting(*operation) == 0) continue;
      fail(operation, Status(Code::kUnavailable, engine::describe(operation->info().call) + ": " +
                                                     links_[owner]->hasLeft()));
    }
    return;
  }
  if (reason.code() == Code::kUnavailable && !isServer(owner) && links_[owner]->wasConnected()) {
    const auto rank = static_cast<Rank>(owner);
    return loseWorker(
        rank,
        nameOfRank(rank) + " of group '" + config_.name + "' was lost (" + reason.message() + ")",
        {});
  }
  const bool told = reason.code() == Code::kUnavailable || reason.code() == Code::kInternal;
  abort(Status(reason.code(), told ? name + " is gone: " + reason.message() : reason.message()));
}

bool GroupState::anyReachable() {
  const std::lock_guard lock(mutex_);
  if (finished_.next > 0) return true;
  for (OwnerIndex owner = config_.world_size; owner < links_.size(); ++owner) {
    if (links_[owner]->wasConnected() || local_.absentees().contains(addressOf(owner))) return true;
    if (!links_[owner]->isDown() && !standing_[owner].lost) return true;
  }
  return false;
}

// Nobody will end it any more.
void GroupState::releaseHold() {
  Change change;  // is let go at the end, without the lock
  {
    const std::lock_guard lock(mutex_);
    if (!holding_) return;
    endHold(change);
  }
  for (const auto& [operation, why_not] : change.orphans) fail(operation, why_not);
  for (const auto& link : links_) link->pump(std::numeric_limits<std::size_t>::max());
}

// What a rank's news say: all that are lost. Who was lost and is no more takes part again.
void GroupState::onEpoch(const wire::Frame& frame) {
  Change change;  // is let go at the end, without the lock
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
    if (!frame.owners.empty() && !isServer(frame.owners.front())) {
      // A worker: its part is gone, and the group with it. What it had its part in may still come.
      if (worker_lost_.rank != kAllRanks) return;
      worker_lost_ = {static_cast<Rank>(frame.owners.front()),
                      frame.text,
                      {frame.slot.seq, frame.call},
                      transport_.now()};
      return;
    }
    if (frame.epoch < epoch_ || !failsOver()) return;
    adoptMembers(frame, change);
  }
  if (config_.rank == 0 && config_.settings.warns) warn(change, frame.text);
  for (const Link::Taken& one : change.taken) one.leave();
  for (const auto& [operation, why_not] : change.orphans) fail(operation, why_not);
  for (const OwnerIndex owner : change.waiting) tellBack(owner, 0);
  for (const auto& link : links_) link->pump(std::numeric_limits<std::size_t>::max());
}

std::size_t GroupState::serversLeft() const {
  return static_cast<std::size_t>(
      std::count_if(standing_.begin() + config_.world_size, standing_.end(),
                    [](const Standing& standing) { return !standing.lost; }));
}

void GroupState::adoptMembers(const wire::Frame& frame, Change& change) {
  const TimePoint now = transport_.now();
  for (OwnerIndex owner = config_.world_size; owner < standing_.size(); ++owner) {
    Standing& standing = standing_[owner];
    const bool lost = std::binary_search(frame.owners.begin(), frame.owners.end(), owner);
    if (lost && !standing.lost) {
      change.lost.push_back(owner);
      local_.absentees().add(addressOf(owner));
      standing.lost = true;
      standing.link = Standing::Link::kNone;
      standing.patience = kFirstPatience;
      standing.told = false;
      standing.fruitless = 0;
      standing.by_name = false;
      standing.retry_at = now + standing.patience;
    } else if (!lost && standing.lost) {
      change.back.push_back(owner);
      local_.absentees().remove(addressOf(owner));
      standing.lost = false;
      standing.since = frame.slot.seq;
      links_[owner]->enterEpoch(frame.epoch);
    } else if (lost && standing.attempt != 0) {
      // (Where another change of owners came between, the attempt was not to blame.)
      const bool fruitless = frame.epoch == epoch_;
      if (fruitless && ++standing.fruitless == kFruitlessMax) change.unreached.push_back(owner);
      giveUpComeback(owner, change.taken);
    } else if (lost && standing.link == Standing::Link::kOpen) {
      change.waiting.push_back(owner);
    }
    standing.attempt = 0;
  }
  epoch_ = frame.epoch;
  if (!change.lost.empty()) move(change);
  change.left = serversLeft();
  endHold(change);
}

void GroupState::move(Change& change) {
  std::vector<Link::Heritage> heritage(links_.size());
  for (const OwnerIndex owner : change.lost) {
    Link::Taken taken = links_[owner]->takeAway();
    for (const Cursor& cursor : taken.unanswered) {
      for (auto& [heir, part] : heirsOf(cursor)) {
        heritage[heir].unanswered.push_back(std::move(part));
      }
    }
    for (Link::Kept& kept : taken.kept) {
      heritage[heirOf(kept.key)].kept.push_back(std::move(kept));
    }
    change.taken.push_back(std::move(taken));
  }
  for (const OwnerIndex heir : heirs()) {
    std::vector<std::shared_ptr<Operation>> operations;
    for (const Cursor& cursor : heritage[heir].unanswered) operations.push_back(cursor.operation);
    if (links_[heir]->inherit(std::move(heritage[heir]), epoch_).ok()) continue;
    for (auto& operation : operations) {
      const std::string what = engine::describe(operation->info().call);
      change.orphans.emplace_back(
          std::move(operation),
          Status(Code::kUnavailable, what + ": the last standalone reducer is lost, and " +
                                         links_[heir]->name() +
                                         ", which would take its place, has left the group"));
    }
  }
}

void GroupState::warn(const Change& change, const std::string& why) const {
  const auto names = [this](const std::vector<OwnerIndex>& owners) {
    std::string text;
    for (const OwnerIndex owner : owners)
      text += (text.empty() ? "" : ", ") + links_[owner]->name();
    return text;
  };
  if (!change.lost.empty()) {
    const std::string heirs = change.left > 0
                                  ? "the " + std::to_string(change.left) + " that are left"
                                  : "the workers themselves";
    std::fprintf(stderr,
                 "reducer: warning: group '%s': lost %s (%s); what it did is done by %s from now "
                 "on, and nothing else is lost\n",
                 config_.name.c_str(), names(change.lost).c_str(), why.c_str(), heirs.c_str());
  }
  if (!change.unreached.empty()) {
    std::fprintf(
        stderr,
        "reducer: warning: group '%s': %s is there again, and %d attempts in a row to take "
        "it in have failed (%s); the job goes on without it, and tries again, less and "
        "less often, at least every %.0f s\n",
        config_.name.c_str(), names(change.unreached).c_str(), kFruitlessMax, why.c_str(),
        std::chrono::duration<double>(kFruitlessPatience).count());
  }
  if (!change.back.empty()) {
    std::fprintf(stderr, "reducer: warning: group '%s': %s is back, and takes part again\n",
                 config_.name.c_str(), names(change.back).c_str());
  }
}

}  // namespace reducer::collective
