#include "collective/pace.h"

#include <algorithm>
#include <utility>

namespace reducer::collective {
namespace {

// Rounds in queues: with fewer one more goes under way, with more one less.
constexpr double kQueuedLeast = 1.5;
constexpr double kQueuedMost = 2.5;

double seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

void Depth::answered(Duration response) {
  const std::lock_guard lock(mutex_);
  least_ = std::min(least_, response);
}

void Depth::spaced(Duration spacing) {
  const std::lock_guard lock(mutex_);
  spacings_ += spacing;
  const std::uint64_t rounds = rounds_;
  if (++spaced_ < rounds) return;
  const double average = seconds(spacings_) / static_cast<double>(spaced_);
  spacings_ = Duration::zero();
  spaced_ = 0;
  if (average <= 0) return;
  const double queued = static_cast<double>(rounds) - seconds(least_) / average;
  if (queued < kQueuedLeast && rounds < kMost) rounds_ = rounds + 1;
  if (queued > kQueuedMost && rounds > kLeast) rounds_ = rounds - 1;
}

Pace::Pace(const Plan& plan, std::shared_ptr<Depth> depth)
    : plan_(plan),
      depth_(std::move(depth)),
      fixed_(std::min(plan.window_rounds, plan.rounds)),
      open_(fixed_ > 0 ? fixed_ : Depth::kMost) {}

void Pace::begun(std::uint64_t round, TimePoint now) {
  const std::lock_guard lock(mutex_);
  TimePoint& begun = open_[round % open_.size()].begun;
  begun = std::min(begun, now);
}

bool Pace::answered(std::uint64_t round, TimePoint now) {
  const std::lock_guard lock(mutex_);
  ++open_[round % open_.size()].answers;
  std::uint64_t first = first_;
  while (open_[first % open_.size()].answers == plan_.owners.size()) {
    const Round done = std::exchange(open_[first % open_.size()], Round());
    ++first;
    depth_->answered(now - done.begun);
    if (last_ != TimePoint::max()) depth_->spaced(now - last_);
    last_ = now;
  }
  return first_.exchange(first, std::memory_order_release) != first;
}

}  // namespace reducer::collective
