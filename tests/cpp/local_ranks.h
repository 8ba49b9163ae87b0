// Ranks of one host for tests: as threads, and as processes.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "local/team.h"

namespace reducer::local {

using namespace std::chrono_literals;  // NOLINT(google-build-using-namespace): tests

/// Ends with the deadline, or when a rank is gone.
class TestWatch final : public Watch {
 public:
  explicit TestWatch(Duration patience, const Team* team = nullptr)
      : deadline_(Clock::now() + patience), team_(team) {}
  Status look(TimePoint now, bool slept) override {
    if (now >= deadline_) return Status(Code::kTimeout, "the test's patience is over");
    if (team_ == nullptr || !slept) return {};
    const auto gone = team_->gone();
    return gone ? Status(Code::kUnavailable, gone->text) : Status();
  }
  TimePoint deadline() const override { return deadline_; }

 private:
  const TimePoint deadline_;
  const Team* const team_;
};

inline std::string uniqueName() {
  static std::atomic<int> made{0};
  return "test-" + std::to_string(getpid()) + "-" + std::to_string(made++);
}

inline Team::Config teamConfig(const std::string& name, std::uint32_t n, std::uint32_t place,
                               std::size_t area_bytes = 65536) {
  Team::Config config;
  config.name = name;
  for (std::uint32_t rank = 0; rank < n; ++rank) config.ranks.push_back(static_cast<Rank>(rank));
  config.place = place;
  config.host = "here:" + std::to_string(getpid());
  config.area_bytes = area_bytes;
  return config;
}

/// Runs `rank(0)` to `rank(n - 1)`, each in a thread, and waits for them.
inline void asThreads(std::uint32_t n, const std::function<void(std::uint32_t)>& rank) {
  std::vector<std::thread> threads;
  for (std::uint32_t r = 0; r < n; ++r) threads.emplace_back([&rank, r] { rank(r); });
  for (std::thread& thread : threads) thread.join();
}

/// Processes that are killed with the test. A child that returns true exits with 0.
class Children {
 public:
  Children(std::uint32_t n, const std::function<bool(std::uint32_t)>& rank) {
    std::fflush(nullptr);
    for (std::uint32_t r = 0; r < n; ++r) {
      const pid_t pid = fork();
      if (pid == 0) {
        alarm(60);  // whatever happens, it ends
        const bool good = rank(r);
        std::fflush(nullptr);
        _exit(good ? 0 : 1);
      }
      pids_.push_back(pid);
    }
  }
  ~Children() {
    for (const pid_t pid : pids_) {
      if (pid <= 0) continue;
      ::kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
  }
  void signal(std::uint32_t rank, int number) const { ::kill(pids_[rank], number); }
  /// Its exit status; 1000 + the signal's number if one ended it.
  int join(std::uint32_t rank) {
    int status = 0;
    waitpid(pids_[rank], &status, 0);
    pids_[rank] = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

 private:
  std::vector<pid_t> pids_;
};

}  // namespace reducer::local
