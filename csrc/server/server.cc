#include "server/server.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "common/hexadecimal.h"
#include "common/limits.h"
#include "server/local.h"
#include "server/session.h"
#include "server/tokens.h"

namespace reducer::server {
namespace {

// Of each worker beside its windows: its places in up to 64 shards, and some hundred frames with
// what slots say of them.
constexpr std::uint64_t kWorkerBytes = 128 << 10;

// Of each worker in each shard: Engine::Member with its names.
constexpr std::uint64_t kPlaceBytes = 768;

// No limit is as large.
constexpr std::uint64_t kWindowBytesMax = std::uint64_t{1} << 48;

std::string mebibytes(std::uint64_t nbytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(nbytes) / (1 << 20));
  return text;
}

std::size_t shardOf(const wire::SlotId& id, std::size_t shards) {
  return (id.seq * 7 + id.chunk + id.lane * 0x9E3779B97F4A7C15ULL) % shards;
}

}  // namespace

ServerState::ServerState(transport::Transport& t, ServerOptions o)
    : transport(t),
      options(std::move(o)),
      started(t.now()),
      memory(std::make_shared<MemoryLimit>(options.memory_limit_bytes)) {
  for (int i = 0; i < std::max(1, options.shards); ++i) {
    shards.push_back(std::make_unique<Shard>(/*judges=*/!options.standalone));
  }
}

ServerState::Account ServerState::join(const std::shared_ptr<Session>& session,
                                       const wire::Hello& hello) {
  engine::Actions actions;
  Account account = admit(session, hello, actions);
  perform(std::move(actions));
  return account;
}

ServerState::Account ServerState::admit(const std::shared_ptr<Session>& session,
                                        const wire::Hello& hello, engine::Actions& actions) {
  const std::lock_guard lock(registry_mutex);
  silent.erase(session);
  const auto found = groups.find(hello.job);
  // Whoever may not be here learns nothing else.
  if (found != groups.end() && !sameSecret(found->second.token, hello.token)) return notAdmitted();
  if (hello.host.size() > kMaxNameBytes || hello.group.size() > kMaxNameBytes) {
    return Status(Code::kInvalidArgument, "rank " + std::to_string(hello.rank) +
                                              " has a host's or a group's name of more than " +
                                              std::to_string(kMaxNameBytes) + " bytes");
  }
  const std::string who = "rank " + std::to_string(hello.rank) + " (" + hello.host + ")";
  if (hello.job.size() != kJobBytes) {
    return Status(Code::kInvalidArgument, who + " named its job with " +
                                              std::to_string(hello.job.size()) +
                                              " bytes; a job has " + std::to_string(kJobBytes));
  }
  if (hello.window_bytes == 0) {
    return Status(Code::kInvalidArgument, who + " announced a window of 0 bytes");
  }
  if (found == groups.end()) {
    if (draining) {
      return Status(Code::kUnavailable,
                    "the reducer " + options.host +
                        " is shutting down and takes in no new group; leave it out "
                        "of REDUCER_SERVERS");
    }
    // A slot holds a push of every rank, or its result: the window of each rank counts twice.
    const std::uint64_t of_each = 2 * std::min<std::uint64_t>(hello.window_bytes, kWindowBytesMax) +
                                  (options.standalone ? kWorkerBytes : 0);
    const std::uint64_t needed = static_cast<std::uint64_t>(hello.world_size) * of_each;
    auto account = MemoryAccount::open(memory, needed);
    if (!account) {
      return Status(
          Code::kResourceExhausted,
          "the reducer " + options.host + " has no memory for group '" + hello.group + "' of " +
              std::to_string(hello.world_size) + " workers: it needs " + mebibytes(needed) +
              " (workers x (2 x window + " + mebibytes(kWorkerBytes) + ")), and of the limit of " +
              mebibytes(memory->limit()) + " " + mebibytes(memory->taken()) +
              " are taken by other groups; raise --memory-limit or lower REDUCER_WINDOW_BYTES");
    }
    GroupRecord record;
    record.name = hello.group;
    record.world_size = hello.world_size;
    record.config = hello.config;
    record.config_text = hello.config_text;
    record.hosts = hello.hosts;
    record.config_host = who;
    record.window_bytes = hello.window_bytes;
    record.token = hello.token;
    if (options.standalone) {
      record.places = Charge(account, hello.world_size * shards.size() * kPlaceBytes);
    }
    record.account = std::move(account);
    groups.emplace(hello.job, std::move(record));
  }
  GroupRecord& record = groups.at(hello.job);
  if (record.closing) {
    return Status(Code::kUnavailable, "the earlier connections of group '" + hello.group +
                                          "' to the reducer " + options.host +
                                          " are still closing; try again");
  }
  if (record.world_size != hello.world_size || record.config != hello.config ||
      record.window_bytes != hello.window_bytes) {
    return Status(Code::kMismatch,
                  "group '" + hello.group + "' is set up differently on its ranks: " + who +
                      " has a world size of " + std::to_string(hello.world_size) + " and " +
                      hello.config_text + "; " + record.config_host + " has " +
                      std::to_string(record.world_size) + " and " + record.config_text);
  }
  if (record.hosts != hello.hosts) {
    return Status(Code::kMismatch, "the ranks of group '" + hello.group +
                                       "' do not agree on who shares a host with whom: to " + who +
                                       " the hosts of its ranks are " + describeHosts(hello.hosts) +
                                       "; to " + record.config_host + " they are " +
                                       describeHosts(record.hosts));
  }
  if (const auto twin = record.ranks.find(hello.rank); twin != record.ranks.end()) {
    return Status(Code::kInvalidArgument, who + " of group '" + hello.group +
                                              "' is connected already, from " + twin->second);
  }
  record.ranks[hello.rank] = hello.host;
  if (hello.rank == 0 && session->in_process) record.leads = true;
  sessions.insert(session);
  for (const auto& shard : shards) {
    const std::lock_guard shard_lock(shard->mutex);
    shard->engine.join(session, hello, record.account, actions);
  }
  return record.account;
}

void ServerState::leave(const std::shared_ptr<Session>& session, const wire::Hello& hello,
                        const Status& why) {
  engine::Actions actions;
  {
    const std::lock_guard lock(registry_mutex);
    const auto found = groups.find(hello.job);
    if (found != groups.end()) {
      found->second.ranks.erase(hello.rank);
      // Rank 0 has left: how the others go is none of its business.
      if (session->in_process) found->second.leads = false;
      if (why.ok()) found->second.complete = false;
      if (options.standalone && !why.ok()) loseConnection(found->second, hello, why);
      if (found->second.ranks.empty()) {
        found->second.account->close();
        groups.erase(found);
      }
    }
    for (const auto& shard : shards) {
      const std::lock_guard shard_lock(shard->mutex);
      shard->engine.leave(session, why, actions);
    }
  }
  perform(std::move(actions));
  if (!why.ok()) loseWorker(hello, why);
}

Status ServerState::push(const std::shared_ptr<Session>& session, const wire::Frame& frame,
                         Payload payload) {
  pushed_bytes += payload.nbytes();
  Shard& shard = *shards[shardOf(frame.slot, shards.size())];
  engine::Actions actions;
  Status status;
  {
    const std::lock_guard lock(shard.mutex);
    status = shard.engine.onPush(session, frame, std::move(payload), transport.now(), actions);
  }
  perform(std::move(actions));
  return status;
}

template <class Call>
Status ServerState::everyShard(const Call& call) {
  engine::Actions actions;
  Status status;
  for (const auto& shard : shards) {
    const std::lock_guard lock(shard->mutex);
    Status one = call(shard->engine, actions);
    if (!one.ok()) status = std::move(one);
  }
  perform(std::move(actions));
  return status;
}

Status ServerState::cancel(const std::shared_ptr<Session>& session, const wire::Frame& frame) {
  return everyShard([&](engine::Engine& engine, engine::Actions& actions) {
    return engine.onCancel(session, frame, actions);
  });
}

Status ServerState::settled(const std::shared_ptr<Session>& session, const wire::Frame& frame) {
  return everyShard([&](engine::Engine& engine, engine::Actions& actions) {
    return engine.onSettled(session, frame, actions);
  });
}

// ------------------------------------------------------------------ time

void ServerState::tick(TimePoint now) {
  engine::Actions actions;
  for (const auto& shard : shards) {
    const std::lock_guard lock(shard->mutex);
    shard->engine.tick(now, actions);
  }
  perform(std::move(actions));
  evict(now);
  expireReturns(now);
  beat(now);

  std::vector<std::shared_ptr<Session>> late;
  {
    const std::lock_guard lock(registry_mutex);
    for (const auto& [session, since] : silent) {
      if (now - since > options.hello_within) late.push_back(session);
    }
    for (const auto& session : late) silent.erase(session);
  }
  for (const auto& session : late) {
    session->refuse(Code::kTimeout, "this connection did not say which worker it is");
  }
}

void ServerState::forgetAnswers(const std::string& job) {
  for (const auto& session : sessionsOf(job)) session->forgetAnswers();
}

std::shared_ptr<Session> ServerState::open(std::shared_ptr<transport::Connection> connection,
                                           bool local) {
  auto session = std::make_shared<Session>(shared_from_this(), std::move(connection), local);
  if (local) return session;
  bool room = false;
  {
    const std::lock_guard lock(registry_mutex);
    room = silent.size() < options.silent_max;
    if (room) silent.emplace(session, transport.now());
  }
  if (!room) {
    session->refuse(Code::kUnavailable,
                    "this reducer has too many connections that have not said which worker they "
                    "are; try again");
  }
  return session;
}

void ServerState::perform(engine::Actions actions) {
  for (engine::Outgoing& out : actions.sends) deliver(std::move(out));
  for (engine::Ready& ready : actions.ready) {
    for (engine::Outgoing& out : engine::settle(std::move(ready), *pool)) deliver(std::move(out));
  }
}

void ServerState::deliver(engine::Outgoing out) {
  if (out.frame.kind == wire::FrameKind::kError) {
    refused.fetch_add(1, std::memory_order_relaxed);
  } else {
    result_bytes.fetch_add(out.payload.nbytes(), std::memory_order_relaxed);
  }
  static_cast<Session&>(*out.to).answer(out.frame, std::move(out.payload));
}

// ------------------------------------------------------------------ the public class

ReducerServer::ReducerServer(transport::Transport& transport, ServerOptions options)
    : state_(std::make_shared<ServerState>(transport, std::move(options))) {
  ticker_ =
      transport.every(state_->options.tick, [state = state_](TimePoint now) { state->tick(now); });
}

ReducerServer::~ReducerServer() {
  ticker_.reset();
  listener_.reset();
}

void ReducerServer::finish(Duration timeout) {
  std::unique_lock lock(state_->registry_mutex);
  std::vector<std::shared_ptr<Session>> open(state_->sessions.begin(), state_->sessions.end());
  for (const auto& [session, since] : state_->silent) open.push_back(session);
  lock.unlock();
  for (const auto& session : open) session->close(Status(), /*flush=*/true);
  lock.lock();
  state_->session_gone.wait_for(lock, timeout, [this] { return state_->sessions.empty(); });
}

Status ReducerServer::listen(const std::string& address) {
  REDUCER_CHECK(!listener_);
  auto listener = state_->transport.listen(
      address, [state = state_](std::shared_ptr<transport::Connection> connection) {
        return state->open(std::move(connection), /*local=*/false);
      });
  if (!listener.ok()) return listener.status();
  listener_ = std::move(listener).value();
  return {};
}

std::string ReducerServer::address() const {
  return listener_ ? listener_->address() : std::string();
}

std::shared_ptr<transport::Connection> ReducerServer::connectLocal(
    std::shared_ptr<transport::Handler> handler) {
  return connectInProcess(state_->transport, std::move(handler),
                          [state = state_](std::shared_ptr<transport::Connection> connection) {
                            return state->open(std::move(connection), /*local=*/true);
                          });
}

ServerStats ReducerServer::stats(std::optional<std::string_view> token) const {
  ServerStats stats;
  stats.memory_limit_bytes = state_->options.memory_limit_bytes;
  stats.taken_bytes = state_->memory->taken();
  stats.held_bytes = state_->memory->held();
  stats.held_bytes_max = state_->memory->heldMax();
  stats.pushed_bytes = state_->pushed_bytes;
  stats.result_bytes = state_->result_bytes;
  stats.damaged = state_->damaged;
  stats.refused = state_->refused + (listener_ ? listener_->refused() : 0);
  stats.uptime_s = std::chrono::duration<double>(state_->transport.now() - state_->started).count();
  for (const auto& shard : state_->shards) {
    const std::lock_guard lock(shard->mutex);
    stats.slots_open += shard->engine.counters().slots_open;
    stats.slots_done += shard->engine.counters().slots_done;
    stats.slots_failed += shard->engine.counters().slots_failed;
  }
  const std::lock_guard lock(state_->registry_mutex);
  stats.draining = state_->draining;
  stats.connections = state_->sessions.size();
  for (const auto& [job, record] : state_->groups) {
    const std::uint64_t promise = record.account->promise();
    stats.reserved_bytes += promise;
    if (token && !sameSecret(record.token, *token)) continue;
    stats.groups.push_back({hexadecimal(job), record.name, record.world_size,
                            static_cast<std::int32_t>(record.ranks.size()), promise});
  }
  return stats;
}

engine::Joined ReducerServer::joined(const std::string& job, Rank rank) const {
  return state_->joined(job, rank);
}

void ReducerServer::drain() {
  {
    const std::lock_guard lock(state_->registry_mutex);
    state_->draining = true;
  }
  state_->handOver();
}

Absentees& ReducerServer::absentees() { return state_->absentees; }

bool ReducerServer::idle() const {
  const std::lock_guard lock(state_->registry_mutex);
  return state_->sessions.empty();
}

}  // namespace reducer::server
