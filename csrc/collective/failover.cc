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
  const auto all = static_cast<OwnerIndex>(lost_.size());
  const auto best = [&](OwnerIndex begin, OwnerIndex end) {
    OwnerIndex found = end;
    std::uint64_t highest = 0;
    for (OwnerIndex owner = begin; owner < end; ++owner) {
      if (lost_[owner] != 0) continue;
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

// What moved goes to the standalone reducers that are left, or else to workers.
std::vector<OwnerIndex> GroupState::heirs() {
  std::vector<OwnerIndex> all;
  const std::lock_guard lock(mutex_);
  for (OwnerIndex owner = config_.world_size; owner < lost_.size(); ++owner) {
    if (lost_[owner] == 0) all.push_back(owner);
  }
  if (!all.empty()) return all;
  all.resize(static_cast<std::size_t>(config_.world_size));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

GroupState::Queued GroupState::withHeirs(Queued queued) const {
  Queued all;
  for (auto& [owner, cursor] : queued) {
    if (lost_[owner] == 0) {
      all.emplace_back(owner, std::move(cursor));
    } else {
      for (auto& moved : heirsOf(cursor)) all.push_back(std::move(moved));
    }
  }
  return all;
}

void GroupState::reportLost(OwnerIndex owner, const Status& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok() || lost_[owner] != 0) return;
  }
  const std::string why = reason.ok() ? "it has left" : reason.message();
  wire::Frame frame;
  frame.kind = wire::FrameKind::kLost;
  frame.owners = {owner};
  frame.text = "rank " + std::to_string(config_.rank) + " (" + config_.host + ") says: " + why;
  if (!links_[0]->tell(std::move(frame))) return abortUndecided(owner, why);
  links_[0]->pump(std::numeric_limits<std::size_t>::max());
}

void GroupState::abortUndecided(OwnerIndex owner, const std::string& why) {
  abort(Status(Code::kUnavailable, links_[owner]->name() + " is gone: " + why +
                                       "; and rank 0, which would have told where its work goes, "
                                       "has left the group"));
}

void GroupState::onEpoch(const wire::Frame& frame) {
  std::vector<OwnerIndex> lost;
  std::vector<Link::Taken> taken;  // is let go at the end, without the lock
  std::vector<std::shared_ptr<Operation>> orphans;
  std::size_t left = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
    for (const OwnerIndex owner : frame.owners) {
      if (owner >= lost_.size() || !losable(owner) || lost_[owner] != 0) continue;
      lost_[owner] = 1;
      lost.push_back(owner);
    }
    if (!lost.empty()) {
      epoch_ += static_cast<std::uint32_t>(lost.size());
      taken = move(lost, orphans);
      left =
          static_cast<std::size_t>(std::count(lost_.begin() + config_.world_size, lost_.end(), 0));
    }
  }
  if (std::any_of(frame.owners.begin(), frame.owners.end(),
                  [this](OwnerIndex owner) { return !losable(owner); })) {
    // A worker: its part is gone, and the group with it. What it had its part in may still come.
    const std::lock_guard lock(mutex_);
    if (worker_lost_.rank == kAllRanks) {
      worker_lost_ = {static_cast<Rank>(frame.owners.front()),
                      frame.text,
                      {frame.slot.seq, frame.call},
                      transport_.now()};
    }
  }
  if (lost.empty()) return;
  if (config_.rank == 0 && config_.settings.warns) warnLost(lost, left, frame.text);
  for (const Link::Taken& one : taken) one.leave();
  for (const auto& operation : orphans) {
    fail(operation, Status(Code::kUnavailable,
                           engine::describe(operation->info().call) +
                               ": the last standalone reducer is lost, and a rank that would take "
                               "its place has left the group"));
  }
  for (const auto& link : links_) link->pump(std::numeric_limits<std::size_t>::max());
}

std::vector<Link::Taken> GroupState::move(const std::vector<OwnerIndex>& lost,
                                          std::vector<std::shared_ptr<Operation>>& orphans) {
  std::vector<Link::Taken> all;
  std::vector<Link::Heritage> heritage(links_.size());
  for (const OwnerIndex owner : lost) {
    Link::Taken taken = links_[owner]->takeAway();
    for (const Cursor& cursor : taken.unanswered) {
      for (auto& [heir, part] : heirsOf(cursor)) {
        heritage[heir].unanswered.push_back(std::move(part));
      }
    }
    for (Link::Kept& kept : taken.kept) {
      heritage[heirOf(kept.key)].kept.push_back(std::move(kept));
    }
    all.push_back(std::move(taken));
  }
  const bool any = std::find(lost_.begin() + config_.world_size, lost_.end(), 0) != lost_.end();
  for (OwnerIndex owner = 0; owner < links_.size(); ++owner) {
    // Workers inherit only when no standalone reducer is left, and enter all epochs then.
    if (lost_[owner] != 0 || (any && !losable(owner))) continue;
    std::vector<std::shared_ptr<Operation>> heirs;
    for (const Cursor& cursor : heritage[owner].unanswered) heirs.push_back(cursor.operation);
    const Status status =
        links_[owner]->inherit(std::move(heritage[owner]), epoch_, losable(owner) == any);
    if (!status.ok()) orphans.insert(orphans.end(), heirs.begin(), heirs.end());
  }
  return all;
}

void GroupState::warnLost(const std::vector<OwnerIndex>& lost, std::size_t left,
                          const std::string& why) const {
  std::string names;
  for (const OwnerIndex owner : lost) {
    names += (names.empty() ? "" : ", ") + links_[owner]->name();
  }
  const std::string heirs =
      left > 0 ? "the " + std::to_string(left) + " that are left" : "the workers themselves";
  std::fprintf(stderr,
               "reducer: warning: group '%s': lost %s (%s); what it did is done by %s from now on, "
               "and nothing else is lost\n",
               config_.name.c_str(), names.c_str(), why.c_str(), heirs.c_str());
}

}  // namespace reducer::collective
