// Jobs whose standalone reducers die, come back, stop, are cut off and are slow, at random: every
// call must end on every rank with its bits. Each job follows from its seed alone.
//
// REDUCER_SIM_SEEDS: how many (default 2,000); REDUCER_SIM_FIRST: the first, to replay one.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

#include "failover_job.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;

std::uint64_t numberFrom(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

/// The library's warnings, one for each fault, are not to be read by anybody here.
class Quiet {
 public:
  explicit Quiet(bool wanted) {
    if (!wanted) return;
    std::fflush(stderr);
    kept_ = dup(STDERR_FILENO);
    const int nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, STDERR_FILENO);
    close(nowhere);
  }
  ~Quiet() {
    if (kept_ < 0) return;
    std::fflush(stderr);
    dup2(kept_, STDERR_FILENO);
    close(kept_);
  }

 private:
  int kept_ = -1;
};

enum Kind { kKill, kRestart, kPause, kResume, kSever, kCut, kMend, kSlow, kSwift, kDrain, kKinds };
const char* const kNames[] = {
    "deaths",     "restarts",  "stops",      "goings on",   "connections broken",
    "cables out", "cables in", "slow hosts", "swift again", "drains"};

struct Tally {
  std::uint64_t jobs = 0;
  std::uint64_t calls = 0;
  std::uint64_t changes = 0;  // of owners
  std::uint64_t damaged = 0;  // chunks, as far as reducers that are alive at the end know
  std::uint64_t faults[kKinds] = {};
  std::string text() const {
    std::string all = std::to_string(jobs) + " jobs, " + std::to_string(calls) +
                      " collectives on each of their ranks, " + std::to_string(changes) +
                      " changes of owners, " + std::to_string(damaged) + " chunks damaged;";
    for (int kind = 0; kind < kKinds; ++kind) {
      all += (kind == 0 ? " " : ", ") + std::to_string(faults[kind]) + " " + kNames[kind];
    }
    return all;
  }
};

/// One job and all that befalls it.
class Storm {
 public:
  Storm(std::uint64_t seed, Tally& tally)
      : random_(static_cast<std::uint32_t>(seed)), tally_(tally) {
    const auto workers = static_cast<std::int32_t>(2 + below(4));
    // Some lose reducer after reducer in the midst of many small steps, and nothing else.
    dense_ = below(3) == 0;
    servers_ = static_cast<std::int32_t>(dense_ ? 2 + below(3) : 1 + below(3));
    const Algorithm algorithm = below(2) == 0 ? Algorithm::kServer : Algorithm::kMixed;
    ClusterOptions options = clusterOf(algorithm, workers, servers_, seed);
    options.settings.heartbeat = std::chrono::milliseconds(400);
    options.settings.connect_timeout = std::chrono::seconds(20);
    if (below(4) == 0) {
      options.settings.checksum = true;
      options.sim.damages_one_in = 20 + below(200);
    }
    cluster_ = std::make_unique<SimCluster>(options);
    calls_ = 4 + below(20);
    job_ = std::make_unique<Job>(*cluster_, calls_, random_);
    alive_.assign(static_cast<std::size_t>(servers_), 1);
    depth_ = 1 + below(5);
    // How long the job takes, and so what it meets: some run through, some go slowly.
    lull_ = std::chrono::milliseconds(below(3) == 0 ? 0 : below(1200));
    const std::size_t faults = 1 + below(8);
    for (std::size_t i = 0; i < faults; ++i) plan();
    std::stable_sort(events_.begin(), events_.end(),
                     [](const Event& a, const Event& b) { return a.at < b.at; });
  }

  void run() {
    std::vector<Outcome> met(static_cast<std::size_t>(cluster_->workers()));
    for (Rank r = 0; r < cluster_->workers(); ++r) {
      cluster_->group(r).barrier(within(std::chrono::seconds(10)), met[r].callback());
    }
    ASSERT_TRUE(cluster_->finish(met));
    begun_ = cluster_->network().now();
    std::vector<TimePoint> calm(static_cast<std::size_t>(cluster_->workers()));
    const bool ended = cluster_->network().runUntil(
        [&] {
          const TimePoint now = cluster_->network().now();
          for (Rank r = 0; r < cluster_->workers(); ++r) {
            if (now < calm[r] || below(4) != 0) continue;
            job_->feed(r, depth_);
            if (lull_ > Duration::zero() && below(3) == 0) {
              calm[r] = now + Duration(static_cast<std::int64_t>(
                                  below(static_cast<std::uint64_t>(lull_.count()))));
            }
          }
          while (next_ < events_.size() && now - begun_ >= events_[next_].at) happen(next_++);
          return job_->done() || ::testing::Test::HasFatalFailure();
        },
        std::chrono::seconds(300));
    if (::testing::Test::HasFatalFailure()) return;
    ASSERT_TRUE(ended) << "a rank hangs";
    ++tally_.jobs;
    tally_.calls += calls_;
    tally_.changes += cluster_->group(0).counters().owner_changes;
    // What was handed on is dropped when all have settled, which all do once they can be reached.
    for (; next_ < events_.size(); ++next_) {
      if (events_[next_].kind != kKill && events_[next_].kind != kDrain) happen(next_);
    }
    const auto there = static_cast<std::uint64_t>(std::count(alive_.begin(), alive_.end(), 1));
    const bool back = cluster_->network().runUntil(
        [&] { return cluster_->group(0).counters().servers == there; }, std::chrono::seconds(30));
    ASSERT_TRUE(back) << there << " reducers are there, and "
                      << cluster_->group(0).counters().servers << " take part";
    cluster_->network().runUntil([] { return false; }, std::chrono::seconds(2));
    for (const auto& local : cluster_->locals()) {
      tally_.damaged += local->stats().damaged;
      ASSERT_EQ(local->stats().slots_open, 0U) << "a slot leaks at " << local->address();
    }
    for (std::size_t k = 0; k < alive_.size(); ++k) {
      if (alive_[k] == 0) continue;
      tally_.damaged += cluster_->reducers()[k]->stats().damaged;
      ASSERT_EQ(cluster_->reducers()[k]->stats().slots_open, 0U) << "a slot leaks at server " << k;
    }
  }

 private:
  struct Event {
    Duration at;
    Kind kind;
    std::int32_t server;
    Rank worker;
  };

  std::uint64_t below(std::uint64_t end) { return random_() % std::max<std::uint64_t>(end, 1); }

  void plan() {
    if (dense_) {
      const auto lost = static_cast<std::int32_t>(below(static_cast<std::uint64_t>(servers_)));
      const auto from = static_cast<Rank>(below(static_cast<std::uint64_t>(cluster_->workers())));
      events_.push_back(
          {std::chrono::microseconds(below(4'000)), below(2) == 0 ? kKill : kSever, lost, from});
      return;
    }
    const auto server = static_cast<std::int32_t>(below(static_cast<std::uint64_t>(servers_)));
    const auto worker = static_cast<Rank>(below(static_cast<std::uint64_t>(cluster_->workers())));
    // Many in the first milliseconds, when most happens, others later.
    const Duration at = std::chrono::microseconds(below(2) == 0 ? below(8'000) : below(3'000'000));
    const Duration lasts =
        std::chrono::microseconds(below(2) == 0 ? below(300'000) : below(2'500'000));
    switch (below(6)) {
      case 0:
        events_.push_back({at, kKill, server, 0});
        if (below(4) != 0) events_.push_back({at + lasts, kRestart, server, 0});
        break;
      case 1:
        events_.push_back({at, kPause, server, 0});
        events_.push_back({at + lasts, kResume, server, 0});
        break;
      case 2:
        events_.push_back({at, kSever, server, worker});
        break;
      case 3:
        events_.push_back({at, kCut, server, worker});
        events_.push_back({at + lasts, kMend, server, worker});
        break;
      case 4:
        events_.push_back({at, kSlow, server, 0});
        events_.push_back({at + lasts, kSwift, server, 0});
        break;
      default:
        events_.push_back({at, kDrain, server, 0});
        events_.push_back({at + lasts, kKill, server, 0});
        events_.push_back({at + 2 * lasts, kRestart, server, 0});
    }
  }

  void happen(std::size_t index) {
    const Event& event = events_[index];
    const std::string server = "server" + std::to_string(event.server);
    const std::string worker = "worker" + std::to_string(event.worker);
    char& alive = alive_[static_cast<std::size_t>(event.server)];
    transport::SimNetwork& network = cluster_->network();
    const bool any = event.kind == kMend || event.kind == kSwift;  // of a host that is gone, too
    if (!any && (event.kind == kRestart) == (alive != 0)) return;  // another fault came between
    ++tally_.faults[event.kind];
    switch (event.kind) {
      case kKill:
        network.kill(server);
        alive = 0;
        break;
      case kRestart:
        cluster_->restart(event.server);
        alive = 1;
        break;
      case kPause:
        network.pause(server);
        break;
      case kResume:
        network.resume(server);
        break;
      case kSever:
        network.sever(worker, server);
        break;
      case kCut:
        network.cut(worker, server);
        break;
      case kMend:
        network.mend(worker, server);
        break;
      case kSlow:
        network.slow(server, std::chrono::milliseconds(20));
        break;
      case kSwift:
        network.slow(server, Duration::zero());
        break;
      default:
        cluster_->reducers()[static_cast<std::size_t>(event.server)]->drain();
        alive = 2;  // and takes nobody in
    }
  }

  std::mt19937 random_;
  Tally& tally_;
  bool dense_ = false;
  std::int32_t servers_ = 0;
  std::unique_ptr<Job> job_;  // the groups' last words go there
  std::unique_ptr<SimCluster> cluster_;
  std::size_t calls_ = 0;
  std::size_t depth_ = 1;
  Duration lull_{};
  TimePoint begun_;
  std::vector<char> alive_;
  std::vector<Event> events_;
  std::size_t next_ = 0;
};

TEST(FailoverSoak, EveryCallEndsWithItsBitsWhateverBefallsTheReducers) {
  const std::uint64_t first = numberFrom("REDUCER_SIM_FIRST", 0);
  const std::uint64_t seeds = numberFrom("REDUCER_SIM_SEEDS", 2'000);
  Tally tally;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed) + "; REDUCER_SIM_FIRST=" + std::to_string(seed) +
                 " REDUCER_SIM_SEEDS=1 replays it");
    {
      const Quiet quiet(seeds > 1);
      Storm storm(seed, tally);
      storm.run();
    }
    if (HasFailure()) {
      std::printf("a violation after %llu seeds\n",
                  static_cast<unsigned long long>(seed - first + 1));
      return;
    }
  }
  EXPECT_GE(tally.changes, tally.jobs / 4) << "hardly anything was lost: the search is none";
  std::printf("seeds %llu to %llu, 0 violations: %s\n", static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(first + seeds - 1), tally.text().c_str());
}

}  // namespace
}  // namespace reducer::testing
