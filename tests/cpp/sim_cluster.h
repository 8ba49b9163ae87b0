// A job on the simulated network: n workers with a reducer in each, and k standalone reducers.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "collective/group.h"
#include "server/server.h"
#include "transport/sim/sim.h"

namespace reducer::testing {

/// The sharded exchanges, with one and with several standalone reducers.
struct Topology {
  const char* name;
  collective::Algorithm algorithm;
  std::int32_t servers;
};
inline constexpr Topology kTopologies[] = {
    {"direct", collective::Algorithm::kDirect, 0},  {"server1", collective::Algorithm::kServer, 1},
    {"server3", collective::Algorithm::kServer, 3}, {"mixed1", collective::Algorithm::kMixed, 1},
    {"mixed3", collective::Algorithm::kMixed, 3},
};

struct ClusterOptions {
  std::int32_t workers = 3;
  std::int32_t servers = 0;
  collective::Settings settings;
  transport::SimOptions sim;
  std::size_t server_memory_bytes = std::size_t{4} << 30;
  std::string name = "default";
  std::vector<std::string> places;  // by rank; empty: each its own
  bool names = false;               // the reducers are found by names: "reducer-0" is server0
};

inline collective::CallOptions within(
    std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
  collective::CallOptions options;
  options.timeout = timeout;
  return options;
}

/// Where an operation's end is kept.
struct Outcome {
  bool done = false;
  Status status;
  collective::Done callback() {
    return [this](const Status& result) {
      EXPECT_FALSE(done) << "an operation ended twice";
      done = true;
      status = result;
    };
  }
};

class SimCluster {
 public:
  explicit SimCluster(ClusterOptions options) : options_(options), network_(options.sim) {
    for (std::int32_t k = 0; k < options_.servers; ++k) {
      hosts_.emplace_back();
      reducers_.emplace_back();
      startServer(k);
      const std::string name = "reducer-" + std::to_string(k);
      network_.name(name, "server" + std::to_string(k));
      server_addresses_.push_back((options_.names ? name + "/" : "") + reducers_.back()->address());
    }
    for (std::int32_t r = 0; r < options_.workers; ++r) {
      worker_hosts_.push_back(network_.addHost("worker" + std::to_string(r)));
      server::ServerOptions server;
      server.host = "worker" + std::to_string(r) + ":1";
      locals_.push_back(std::make_unique<server::ReducerServer>(*worker_hosts_.back(), server));
      EXPECT_TRUE(locals_.back()->listen("worker" + std::to_string(r) + ":0").ok());
      worker_addresses_.push_back(locals_.back()->address());
    }
    makeGroups("0123456789abcdef", options_.name);
  }

  ~SimCluster() {
    for (auto& group : groups_) {
      if (group) group->close();
    }
    if (options_.sim.threads > 0) {
      for (auto& group : groups_) {
        if (group) {
          EXPECT_TRUE(group->waitClosed(std::chrono::seconds(10)));
        }
      }
    } else {
      network_.runUntil([] { return false; }, std::chrono::seconds(1));
    }
    groups_.clear();
    locals_.clear();
    reducers_.clear();
    worker_hosts_.clear();
    hosts_.clear();
  }

  /// A standalone reducer that was killed, with nothing of what it had. `host`: on another one.
  void restart(std::int32_t k, const std::string& host = {}) {
    reducers_[k].reset();
    hosts_[k].reset();
    startServer(k, host);
  }

  void makeGroups(const std::string& job, const std::string& name) {
    groups_.clear();
    for (std::int32_t r = 0; r < options_.workers; ++r) {
      auto group = collective::Group::create(config(r, job, name), *worker_hosts_[r], *locals_[r]);
      EXPECT_TRUE(group.ok()) << group.status().message();
      groups_.push_back(group.ok() ? std::move(group).value() : nullptr);
    }
  }

  collective::GroupConfig config(Rank rank, const std::string& job, const std::string& name) const {
    collective::GroupConfig config;
    config.job = job;
    config.name = name;
    config.rank = rank;
    config.world_size = options_.workers;
    config.workers = worker_addresses_;
    config.servers = server_addresses_;
    for (Rank r = 0; r < options_.workers; ++r) {
      config.hosts.push_back("worker" + std::to_string(r) + ":1");
    }
    config.host = config.hosts[rank];
    config.settings = options_.settings;
    config.places = options_.places;
    // Shared memory is found by the job, and other tests may run beside this one.
    if (!config.places.empty()) {
      config.job = collective::derivedJob(job, std::to_string(getpid()));
    }
    return config;
  }

  /// Virtual time: steps until all are done.
  bool finish(const std::vector<Outcome>& outcomes, Duration limit = std::chrono::seconds(60)) {
    return network_.runUntil(
        [&] {
          for (const Outcome& outcome : outcomes) {
            if (!outcome.done) return false;
          }
          return true;
        },
        limit);
  }

  /// Virtual time: lets everything that is still under way arrive; then no reducer may hold
  /// anything. That of a worker that was killed stands still, with what it had.
  void expectNothingHeld(Rank dead = -1) {
    network_.runUntil([] { return false; }, std::chrono::seconds(2));
    for (const auto* servers : {&locals_, &reducers_}) {
      for (const auto& one : *servers) {
        if (!one || (dead >= 0 && one == locals_[dead])) continue;
        EXPECT_EQ(one->stats().slots_open, 0u) << one->address();
      }
    }
  }

  transport::SimNetwork& network() { return network_; }
  collective::Group& group(Rank rank) { return *groups_[rank]; }
  std::int32_t workers() const { return options_.workers; }
  std::vector<std::unique_ptr<server::ReducerServer>>& reducers() { return reducers_; }
  std::vector<std::unique_ptr<server::ReducerServer>>& locals() { return locals_; }
  std::vector<std::shared_ptr<collective::Group>>& groups() { return groups_; }
  transport::Transport& host(Rank rank) { return *worker_hosts_[rank]; }

 private:
  void startServer(std::int32_t k, const std::string& host = {}) {
    const std::string name = host.empty() ? "server" + std::to_string(k) : host;
    hosts_[k] = network_.addHost(name);
    server::ServerOptions server;
    server.host = name + ":1";
    server.memory_limit_bytes = options_.server_memory_bytes;
    server.standalone = true;
    reducers_[k] = std::make_unique<server::ReducerServer>(*hosts_[k], server);
    EXPECT_TRUE(reducers_[k]->listen(name + ":7000").ok());
  }

  const ClusterOptions options_;
  transport::SimNetwork network_;
  std::vector<std::unique_ptr<transport::Transport>> hosts_;
  std::vector<std::unique_ptr<transport::Transport>> worker_hosts_;
  std::vector<std::unique_ptr<server::ReducerServer>> reducers_;
  std::vector<std::unique_ptr<server::ReducerServer>> locals_;
  std::vector<std::string> server_addresses_;
  std::vector<std::string> worker_addresses_;
  std::vector<std::shared_ptr<collective::Group>> groups_;
};

}  // namespace reducer::testing
