// Timers and posted tasks: gRPC's alarms on the completion queues.
#pragma once

#include <grpcpp/alarm.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "transport/grpc/core.h"
#include "transport/net/fork.h"

namespace reducer::transport::grpc_detail {

/// Thread safety: every method, from any thread.
class TimerState final : public GrpcTag, public std::enable_shared_from_this<TimerState> {
 public:
  TimerState(Core& core, Duration interval, std::function<void(TimePoint)> tick);
  void start();
  /// No call of `tick` starts any more; one on another thread is waited for.
  void cancel();
  void complete(bool ok) override;
  bool orphaned() const { return net::forkGeneration() != generation_; }

 private:
  void armHeld();

  Core& core_;  // gone before the timer may be, but not before it is over
  const std::uint64_t generation_ = net::forkGeneration();
  const Duration interval_;
  std::function<void(TimePoint)> tick_;
  std::mutex mutex_;
  std::condition_variable idle_;
  grpc::Alarm alarm_;
  TimePoint next_;
  bool cancelled_ = false;
  bool running_ = false;
  std::thread::id runner_;
};

class GrpcTimer final : public Timer {
 public:
  explicit GrpcTimer(std::shared_ptr<TimerState> state) : state_(std::move(state)) {}
  ~GrpcTimer() override {
    if (!state_->orphaned()) state_->cancel();
  }

 private:
  const std::shared_ptr<TimerState> state_;
};

/// A posted task; deletes itself.
class Task final : public GrpcTag {
 public:
  static void start(grpc::CompletionQueue& queue, std::function<void()> task) {
    auto* self = new Task(std::move(task));
    self->alarm_.Set(&queue, gpr_time_0(GPR_CLOCK_MONOTONIC), tagOf(*self));
  }
  void complete(bool ok) override {
    const std::unique_ptr<Task> self(this);
    task_();
  }

 private:
  explicit Task(std::function<void()> task) : task_(std::move(task)) {}
  const std::function<void()> task_;
  grpc::Alarm alarm_;
};

}  // namespace reducer::transport::grpc_detail
