// How a backend comes to be, begets others, and ends.
#include <Python.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <utility>

#include "collective/probe.h"
#include "common/placement.h"
#include "torch/backend.h"

namespace reducer::torch_backend {
namespace {

using collective::Group;

// How long the goodbyes may take: a peer that does not answer cannot hold up the end of a group.
constexpr auto kGoodbye = std::chrono::seconds(5);
// The same where something went wrong before: some peer is likely not to answer.
constexpr auto kGoodbyeAborted = std::chrono::seconds(1);

/// Lets others have the GIL while this thread joins threads; does nothing if this thread does not
/// hold it.
class WithoutGil {
 public:
  WithoutGil() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

/// The backends of this process, for shutdownAll().
struct Registry {
  std::mutex mutex;
  std::vector<c10::weak_intrusive_ptr<ReducerBackend>> backends;
};
Registry& registry() {
  static Registry* const all = new Registry;  // never destroyed: backends may outlive the statics
  return *all;
}

void enlist(const c10::intrusive_ptr<ReducerBackend>& backend) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  std::erase_if(all.backends, [](const auto& other) { return other.expired(); });
  all.backends.emplace_back(backend);
}

}  // namespace

// ------------------------------------------------------------------ life

Result<c10::intrusive_ptr<ReducerBackend>> ReducerBackend::create(
    const collective::GroupConfig& config, std::shared_ptr<runtime::Runtime> runtime,
    Milliseconds timeout, std::vector<std::uint64_t> ranks) {
  Result<std::shared_ptr<Group>> group =
      Group::create(config, runtime->transport(), runtime->server());
  if (!group.ok()) return group.status();
  auto backend = c10::make_intrusive<ReducerBackend>(
      config, std::move(runtime), std::move(group).value(), timeout, std::move(ranks));
  enlist(backend);
  return backend;
}

ReducerBackend::ReducerBackend(collective::GroupConfig config,
                               std::shared_ptr<runtime::Runtime> runtime,
                               std::shared_ptr<collective::Group> group, Milliseconds timeout,
                               std::vector<std::uint64_t> ranks)
    : Backend(config.rank, config.world_size),
      config_(std::move(config)),
      who_("[rank " + std::to_string(config_.rank) + ", group " + config_.name + "]"),
      global_ranks_(std::move(ranks)),
      pid_(getpid()),
      timeout_ms_(timeout.count()),
      shared_([&runtime] {
        auto completions = std::make_shared<CompletionThread>();
        auto ledger = std::make_shared<Ledger>(completions);
        return ReducerWork::Shared{completions, ledger, std::make_shared<LaunchQueue>(),
                                   runtime->transport().helper()};
      }()),
      session_(std::make_shared<Session>()) {
  session_->runtime = std::move(runtime);
  session_->group = std::move(group);
  init();
}

ReducerBackend::~ReducerBackend() { leave(); }

ReducerBackend::Session::~Session() {
  const WithoutGil without_gil;
  group.reset();
  runtime.reset();
}

void ReducerBackend::shutdownAll() {
  const WithoutGil without_gil;
  std::vector<c10::weak_intrusive_ptr<ReducerBackend>> backends;
  {
    const std::lock_guard lock(registry().mutex);
    backends = registry().backends;
  }
  for (const auto& weak : backends) {
    if (const auto backend = weak.lock()) backend->leave();
  }
}

bool ReducerBackend::forked() const { return getpid() != pid_; }

void ReducerBackend::leave() {
  if (forked()) {
    // The threads that would have to be joined, and the locks that they may have held, are the
    // parent's.
    static_cast<void>(new std::shared_ptr<Session>(session_));
    static_cast<void>(new ReducerWork::Shared(shared_));
    return;
  }
  const WithoutGil without_gil;
  std::shared_ptr<Session> session;
  {
    const std::lock_guard lock(mutex_);
    session = std::move(session_);
  }
  if (session) {
    session->group->close();
    session->group->waitClosed(aborted_ ? kGoodbyeAborted : kGoodbye);
  }
  shared_.launches->stop();
  session.reset();
  shared_.completions->stop();
}

void ReducerBackend::shutdown() { leave(); }

bool ReducerBackend::alive() {
  const std::lock_guard lock(mutex_);
  return session_ != nullptr;
}

void ReducerBackend::abort() {
  if (forked()) return;  // what there is to abort is the parent's
  const WithoutGil without_gil;
  std::shared_ptr<Session> session;
  {
    const std::lock_guard lock(mutex_);
    session = session_;
  }
  if (!session) return;
  aborted_ = true;
  session->group->abort("abort() was called on rank " + std::to_string(rank_));
  shared_.launches->hurry();
}

std::shared_ptr<ReducerBackend::Session> ReducerBackend::session() {
  TORCH_CHECK(!forked(), who_, " was made in process ", pid_,
              ", and this is a process forked from it, which has none of its connections; call "
              "init_process_group in this "
              "process, or communicate in the parent only");
  const std::lock_guard lock(mutex_);
  if (!session_) {
    C10_THROW_ERROR(DistBackendError,
                    who_ + " was shut down (destroy_process_group); make a new group");
  }
  return session_;
}

c10::intrusive_ptr<c10d::Backend::Options> ReducerBackend::getBackendOptions() {
  auto options = c10::make_intrusive<ReducerOptions>(timeoutOr(c10d::kUnsetTimeout));
  options->group_name = config_.name;
  options->group_desc = getGroupDesc();
  options->global_ranks_in_group = global_ranks_;
  options->servers = config_.servers;
  options->settings = config_.settings;
  return options;
}

void ReducerBackend::registerOnCompletionHook(Ledger::Hook&& hook) {
  shared_.ledger->setHook(std::move(hook));
}

void ReducerBackend::waitForPendingWorks() {
  const WithoutGil without_gil;
  shared_.ledger->waitIdle();
}

std::vector<collective::Sample> ReducerBackend::measure() {
  const std::shared_ptr<Session> session = this->session();
  collective::ProbePlan plan;
  const Placement placement = Placement::fromPlaces(config_.places, config_.world_size);
  plan.hosts = static_cast<std::uint32_t>(placement.hosts());
  plan.servers = static_cast<std::uint32_t>(config_.servers.size());
  plan.timeout = timeoutOr(c10d::kUnsetTimeout);
  plan.ways = session->group->choices();
  plan.helper = shared_.helper;
  Result<std::vector<collective::Sample>> samples = collective::probe(*session->group, plan);
  if (!samples.ok()) C10_THROW_ERROR(DistBackendError, who_ + " " + samples.status().message());
  session->group->adopt(samples.value());
  config_.settings.samples = samples.value();
  config_.settings.measures = false;
  return samples.value();
}

// ------------------------------------------------------------------ groups out of this one

c10::intrusive_ptr<c10d::Backend> ReducerBackend::split(
    const c10::intrusive_ptr<c10d::Store>& /*store*/, const std::vector<int>& ranks,
    const c10::intrusive_ptr<Options>& options) {
  const std::uint64_t number = splits_++;
  for (const int rank : ranks) {
    TORCH_CHECK_VALUE(rank >= 0 && rank < size_, who_, " split: rank ", rank,
                      " is not in this group of ", size_);
  }
  if (std::find(ranks.begin(), ranks.end(), rank_) == ranks.end()) return nullptr;
  const std::string name = options && !options->group_name.empty()
                               ? options->group_name
                               : config_.name + ":split:" + std::to_string(number);
  return derive({ranks.begin(), ranks.end()}, name, options);
}

c10::intrusive_ptr<c10d::Backend> ReducerBackend::shrink(
    const std::vector<std::int64_t>& to_exclude, int flags,
    const c10::intrusive_ptr<Options>& options) {
  const std::set<std::int64_t> excluded(to_exclude.begin(), to_exclude.end());
  constexpr int kShrinkAbort = 1;  // torch.distributed.SHRINK_ABORT
  std::vector<Rank> left;
  std::string without;
  for (Rank rank = 0; rank < size_; ++rank) {
    if (!excluded.contains(rank)) left.push_back(rank);
  }
  for (const std::int64_t rank : excluded) {
    TORCH_CHECK_VALUE(rank >= 0 && rank < size_, who_, " shrink: rank ", rank,
                      " is not in this group of ", size_);
    without += (without.empty() ? "" : ",") + std::to_string(rank);
  }
  TORCH_CHECK_VALUE(std::find(left.begin(), left.end(), rank_) != left.end(), who_,
                    " shrink: this rank is among those that are to go");
  if ((flags & kShrinkAbort) != 0) abort();
  return derive(left, config_.name + ":without:" + without, options);
}

c10::intrusive_ptr<c10d::Backend> ReducerBackend::derive(
    const std::vector<Rank>& ranks, const std::string& name,
    const c10::intrusive_ptr<Options>& options) {
  const std::shared_ptr<Session> session = this->session();
  collective::GroupConfig config = config_;
  Milliseconds timeout = timeoutOr(c10d::kUnsetTimeout);
  if (options) {
    if (options->timeout > Milliseconds(0)) timeout = options->timeout;
    if (const auto* own = dynamic_cast<const ReducerOptions*>(options.get())) {
      config.settings = own->settings;
      config.servers = own->servers;
    }
  }
  Result<std::string> token = session->runtime->token();
  TORCH_CHECK_VALUE(token.ok(), who_, " ", token.status().message());
  config.token = std::move(token).value();
  config.name = name;
  config.world_size = static_cast<std::int32_t>(ranks.size());
  config.workers.clear();
  config.places.clear();
  config.hosts.clear();
  config.worker_bandwidths.clear();
  if (config.servers != config_.servers) config.server_bandwidths.clear();
  std::vector<std::uint64_t> global_ranks;
  std::string key = name;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] == rank_) config.rank = static_cast<Rank>(i);
    config.workers.push_back(config_.workers[ranks[i]]);
    if (!config_.hosts.empty()) config.hosts.push_back(config_.hosts[ranks[i]]);
    if (!config_.places.empty()) config.places.push_back(config_.places[ranks[i]]);
    if (!config_.worker_bandwidths.empty() && config.servers == config_.servers)
      config.worker_bandwidths.push_back(config_.worker_bandwidths[ranks[i]]);
    global_ranks.push_back(global_ranks_[ranks[i]]);
    key += "," + std::to_string(ranks[i]);
  }
  const WithoutGil without_gil;
  const std::lock_guard lock(children_mutex_);
  Child& child = children_[key];
  // torch splits once for each type of device, and all of them may have this backend.
  if (child.backend) {
    const auto same = child.backend->lock();
    if (same && static_cast<ReducerBackend*>(same.get())->alive()) return same;
  }
  config.job = collective::derivedJob(config_.job, key + "#" + std::to_string(child.made++));
  Result<c10::intrusive_ptr<ReducerBackend>> made =
      create(config, session->runtime, timeout, std::move(global_ranks));
  if (!made.ok()) C10_THROW_ERROR(DistBackendError, who_ + " " + made.status().message());
  child.backend.emplace(c10::intrusive_ptr<Backend>(made.value()));
  return made.value();
}

}  // namespace reducer::torch_backend
