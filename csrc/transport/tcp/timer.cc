#include "transport/tcp/timer.h"

#include <algorithm>
#include <utility>

namespace reducer::transport::tcp {

TimerState::TimerState(Loop& loop, Duration interval, std::function<void(TimePoint)> tick)
    : loop_(loop),
      interval_(std::max<Duration>(interval, std::chrono::milliseconds(1))),
      tick_(std::move(tick)) {}

void TimerState::start() {
  const std::lock_guard lock(mutex_);
  next_ = Clock::now() + interval_;
  armHeld();
}

void TimerState::armHeld() {
  scheduled_ = loop_.schedule(next_, [self = shared_from_this()] { self->run(); });
}

void TimerState::run() {
  std::unique_lock lock(mutex_);
  if (cancelled_) return;
  running_ = true;
  runner_ = std::this_thread::get_id();
  lock.unlock();
  tick_(Clock::now());
  lock.lock();
  running_ = false;
  idle_.notify_all();
  if (cancelled_) return;
  // A tick that took longer than the interval is not made up for.
  next_ = std::max(next_ + interval_, Clock::now());
  armHeld();
}

void TimerState::cancel() {
  std::unique_lock lock(mutex_);
  if (!std::exchange(cancelled_, true)) loop_.cancel(scheduled_);
  idle_.wait(lock, [this] { return !running_ || runner_ == std::this_thread::get_id(); });
}

}  // namespace reducer::transport::tcp
