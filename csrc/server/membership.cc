// Which owners a group has, and whom that is told: docs/protocol.md. Rank 0's reducer decides.
#include <algorithm>

#include "common/planted.h"
#include "engine/describe.h"
#include "server/session.h"

namespace reducer::server {
namespace {

/// For all workers to connect to an owner that comes back, and to hold.
constexpr Duration kReturnWithin = std::chrono::seconds(10);

/// Ranks that have not done the step that an attempt is at.
std::vector<std::string> missingFrom(const ServerState::GroupRecord& record) {
  std::vector<std::string> names;
  for (Rank rank = 0; rank < record.world_size; ++rank) {
    if (record.returning->said.contains(rank)) continue;
    const auto found = record.ranks.find(rank);
    names.push_back(engine::nameRank(rank, found == record.ranks.end() ? "" : found->second));
  }
  return names;
}

/// Why an attempt was of no use: a rank has lost the owner again, or never reached it.
std::string describeFailure(const ServerState::GroupRecord& record, const wire::Hello& hello,
                            const std::string& why) {
  std::string text = engine::nameRank(hello.rank, hello.host) + " says: " + why;
  if (record.returning->holding) return text;
  std::vector<std::string> others = missingFrom(record);
  std::erase(others, engine::nameRank(hello.rank, hello.host));
  if (!others.empty()) text += "; not connected to it yet: " + engine::list(others);
  return text;
}

/// The same where the time is up.
std::string describeExpiry(const ServerState::GroupRecord& record) {
  const std::string text = engine::list(missingFrom(record));
  return text +
         (record.returning->holding ? " did not hold the next collective"
                                    : " had no connection to it") +
         " within " + engine::seconds(kReturnWithin);
}

}  // namespace

std::vector<std::shared_ptr<Session>> ServerState::sessionsOf(const std::string& job) {
  std::vector<std::shared_ptr<Session>> all;
  {
    const std::lock_guard lock(registry_mutex);
    all.assign(sessions.begin(), sessions.end());
  }
  std::erase_if(all, [&](const auto& session) { return session->job() != job; });
  return all;
}

// ------------------------------------------------------------------ what is told

// What changes how pieces go has to reach every worker in one order, whoever brings it about. A
// word to the worker of this process may be answered before it returns.
void ServerState::tell(const std::string& job, wire::Frame frame,
                       std::shared_ptr<Session> session) {
  news.push_back({job, std::move(frame), std::move(session)});
}

void ServerState::told() {
  std::unique_lock lock(registry_mutex);
  if (telling) return;
  telling = true;
  while (!news.empty()) {
    const News next = std::move(news.front());
    news.pop_front();
    lock.unlock();
    if (next.session) {
      next.session->send(next.frame);
    } else {
      for (const auto& session : sessionsOf(next.job)) session->send(next.frame);
    }
    lock.lock();
  }
  telling = false;
}

wire::Frame ServerState::newsOf(const GroupRecord& record) {
  wire::Frame frame;
  frame.kind = wire::FrameKind::kEpoch;
  frame.epoch = record.epoch;
  frame.owners = record.lost;
  frame.text = record.why_lost;
  return frame;
}

void ServerState::tellLost(const std::shared_ptr<Session>& session, const wire::Hello& hello) {
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found == groups.end() || found->second.lost.empty()) return;
    tell(hello.job, newsOf(found->second), session);
  }
  told();
}

// ------------------------------------------------------------------ losses

void ServerState::lose(const wire::Hello& hello, const wire::Frame& frame) {
  if (!hello.failover) return;
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found == groups.end()) return;
    GroupRecord& record = found->second;
    const std::uint32_t epoch = record.epoch;
    std::string fruitless;
    bool changed = false;
    for (const std::uint32_t owner : frame.owners) {
      if (record.returning && record.returning->owner == owner) {
        // It was not to be. All hear that, and go on with those that they have.
        fruitless = describeFailure(record, hello, frame.text);
        record.returning.reset();
        changed = true;
      }
      const auto at = std::lower_bound(record.lost.begin(), record.lost.end(), owner);
      const bool known = at != record.lost.end() && *at == owner;
      if (known || owner < static_cast<std::uint32_t>(record.world_size)) continue;
      record.lost.insert(at, owner);
      ++record.epoch;
      record.why_lost = frame.text;
      changed = true;
    }
    if (!changed) return;
    record.returning.reset();  // begun in another epoch
    wire::Frame news = newsOf(record);
    if (record.epoch == epoch) news.text = fruitless;
    tell(hello.job, std::move(news));
  }
  told();
}

engine::Joined ServerState::joined(const std::string& job, Rank rank) const {
  engine::Joined joined;
  for (const auto& shard : shards) {
    const std::lock_guard lock(shard->mutex);
    joined.learn(shard->engine.joined(job, rank));
  }
  return joined;
}

void ServerState::loseConnection(GroupRecord& record, const wire::Hello& hello, const Status& why) {
  record.closing = true;
  // (Of one that was thrown out the engine tells the others.)
  if (why.code() != Code::kUnavailable || record.evict_at != TimePoint::max()) return;
  record.evict_at = transport.now() + options.evict_after;
  record.evict_why = "rank " + std::to_string(hello.rank) + " (" + hello.host + ") was lost (" +
                     why.message() + "), or has lost this reducer";
}

void ServerState::loseWorker(const wire::Hello& hello, const Status& why) {
  if (options.standalone) return;
  const engine::Joined last = joined(hello.job, hello.rank);
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found == groups.end()) return;
    GroupRecord& record = found->second;
    const std::string who = "rank " + std::to_string(hello.rank) + " (" + hello.host + ")";
    if (!record.leads) return;  // who has a connection to it notices; rank 0 tells the others
    wire::Frame frame;
    frame.kind = wire::FrameKind::kEpoch;
    frame.epoch = record.epoch;
    frame.owners = {static_cast<std::uint32_t>(hello.rank)};
    frame.text = who + " of group '" + hello.group + "' was lost (" + why.message() + ")";
    frame.slot.seq = last.next;
    frame.call = last.call;
    tell(hello.job, std::move(frame));
  }
  told();
}

void ServerState::evict(TimePoint now) {
  std::vector<std::pair<std::string, std::string>> jobs;  // and why
  {
    const std::lock_guard lock(registry_mutex);
    for (auto& [job, record] : groups) {
      if (record.evict_at > now) continue;
      record.evict_at = TimePoint::max();
      jobs.emplace_back(job, record.evict_why);
    }
  }
  for (const auto& [job, why] : jobs) {
    for (const auto& session : sessionsOf(job)) {
      session->close(Status(Code::kUnavailable, why), /*flush=*/true);
    }
  }
}

void ServerState::handOver() {
  std::vector<std::shared_ptr<Session>> all;
  {
    const std::lock_guard lock(registry_mutex);
    all.assign(sessions.begin(), sessions.end());
  }
  for (const auto& session : all) {
    if (!session->failsOver()) continue;
    session->close(Status(Code::kUnavailable, "the reducer was told to stop"), /*flush=*/true);
  }
}

// ------------------------------------------------------------------ returns

void ServerState::back(const wire::Hello& hello, const wire::Frame& frame) {
  if (!hello.failover || (frame.epoch == 0 && hello.rank != 0)) return;
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found == groups.end()) return;
    GroupRecord& record = found->second;
    const bool whole =
        record.complete && record.ranks.size() == static_cast<std::size_t>(record.world_size);
    const std::uint32_t owner = frame.owners.front();
    std::optional<Comeback>& returning = record.returning;
    if (frame.epoch == 0) {
      const bool lost = std::binary_search(record.lost.begin(), record.lost.end(), owner);
      if (!lost || !whole || returning) return;  // rank 0 asks again after the next change
      returning.emplace();
      returning->owner = owner;
      returning->attempt = ++record.attempts;
      returning->deadline = transport.now() + kReturnWithin;
      wire::Frame ask;
      ask.kind = wire::FrameKind::kBack;
      ask.owners = {owner};
      ask.epoch = returning->attempt;
      ask.text = frame.text;
      tell(hello.job, std::move(ask));
    } else if (returning && returning->attempt == frame.epoch && !returning->holding) {
      if (returning->said.empty()) returning->reached = frame.text;
      returning->said.insert(hello.rank);
      if (returning->reached != frame.text) {
        // A name that has two addresses, or is known to some hosts with an old one.
        wire::Frame news = newsOf(record);
        news.text = engine::nameRank(hello.rank, hello.host) + " reached the reducer " +
                    frame.text + " there, another rank " + returning->reached;
        returning.reset();
        tell(hello.job, std::move(news));
      } else if (whole && returning->said.size() == record.ranks.size()) {
        returning->said.clear();
        returning->holding = true;
        wire::Frame hold;
        hold.kind = wire::FrameKind::kHold;
        hold.epoch = returning->attempt;
        tell(hello.job, std::move(hold));
      }
    }
  }
  told();
}

void ServerState::held(const wire::Hello& hello, const wire::Frame& frame) {
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found == groups.end()) return;
    GroupRecord& record = found->second;
    std::optional<Comeback>& returning = record.returning;
    if (!returning || !returning->holding || returning->attempt != frame.epoch) return;
    const std::uint64_t seq = frame.slot.seq;
    const bool beyond =
        planted(Planted::kEarlyReturn) ? seq < returning->first_seq : seq > returning->first_seq;
    if (returning->said.empty() || beyond) returning->first_seq = seq;
    returning->said.insert(hello.rank);
    if (returning->said.size() < static_cast<std::size_t>(record.world_size)) return;
    std::erase(record.lost, returning->owner);
    ++record.epoch;
    wire::Frame epoch = newsOf(record);
    epoch.slot.seq = returning->first_seq;
    returning.reset();
    tell(hello.job, std::move(epoch));
  }
  told();
}

void ServerState::expireReturns(TimePoint now) {
  {
    const std::lock_guard lock(registry_mutex);
    for (auto& [job, record] : groups) {
      if (!record.returning || now < record.returning->deadline) continue;
      wire::Frame news = newsOf(record);
      news.text = describeExpiry(record);
      record.returning.reset();
      tell(job, std::move(news));
    }
  }
  told();
}

// ------------------------------------------------------------------ heartbeat

void ServerState::beat(TimePoint now) {
  std::vector<std::shared_ptr<Session>> all;
  {
    const std::lock_guard lock(registry_mutex);
    all.assign(sessions.begin(), sessions.end());
  }
  for (const auto& session : all) session->beat(now);
}

}  // namespace reducer::server
