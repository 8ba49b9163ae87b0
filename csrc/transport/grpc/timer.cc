#include "transport/grpc/timer.h"

#include <algorithm>

namespace reducer::transport::grpc_detail {

TimerState::TimerState(Core& core, Duration interval, std::function<void(TimePoint)> tick)
    : core_(core),
      interval_(std::max<Duration>(interval, std::chrono::milliseconds(1))),
      tick_(std::move(tick)) {}

void TimerState::start() {
  core_.keep(shared_from_this());
  const std::lock_guard lock(mutex_);
  next_ = Clock::now() + interval_;
  armHeld();
}

void TimerState::armHeld() {
  alarm_.Set(&core_.queue(), deadlineAfter(next_ - Clock::now()), tagOf(*this));
}

void TimerState::complete(bool ok) {
  const std::shared_ptr<TimerState> self = shared_from_this();
  std::unique_lock lock(mutex_);
  if (!cancelled_) {
    running_ = true;
    runner_ = std::this_thread::get_id();
    lock.unlock();
    tick_(Clock::now());
    lock.lock();
    running_ = false;
    idle_.notify_all();
  }
  if (!cancelled_) {
    // A tick that took longer than the interval is not made up for.
    next_ = std::max(next_ + interval_, Clock::now());
    armHeld();
    return;
  }
  lock.unlock();
  tick_ = nullptr;
  core_.forget(self);
}

void TimerState::cancel() {
  std::unique_lock lock(mutex_);
  cancelled_ = true;
  alarm_.Cancel();
  idle_.wait(lock, [this] { return !running_ || runner_ == std::this_thread::get_id(); });
}

}  // namespace reducer::transport::grpc_detail
