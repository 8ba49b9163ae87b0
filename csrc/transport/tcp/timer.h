// Timers that tick, on the loop.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "common/clock.h"
#include "transport/net/fork.h"
#include "transport/tcp/loop.h"
#include "transport/transport.h"

namespace reducer::transport::tcp {

/// Thread safety: every method, from any thread.
class TimerState final : public std::enable_shared_from_this<TimerState> {
 public:
  TimerState(Loop& loop, Duration interval, std::function<void(TimePoint)> tick);
  void start();
  /// No call of `tick` starts any more; one on another thread is waited for. Idempotent.
  void cancel();
  bool orphaned() const { return net::forkGeneration() != generation_; }

 private:
  void armHeld();
  void run();

  Loop& loop_;  // not used once cancelled
  const std::uint64_t generation_ = net::forkGeneration();
  const Duration interval_;
  std::function<void(TimePoint)> tick_;
  std::mutex mutex_;
  std::condition_variable idle_;
  TimePoint next_;
  std::uint64_t scheduled_ = 0;
  bool cancelled_ = false;
  bool running_ = false;
  std::thread::id runner_;
};

}  // namespace reducer::transport::tcp
