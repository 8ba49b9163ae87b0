#include "transport/tcp/loop.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace reducer::transport::tcp {
namespace {

constexpr std::uint64_t kWakeId = 0;
constexpr std::uint64_t kClockId = 1;

// A thread that is alone takes all events that there are; of several, each leaves some to the
// others.
constexpr int kEventsAlone = 64;
constexpr int kEventsEach = 4;

// A helper looks up so often, even if nothing wakes it.
constexpr Duration kHelpTurn = std::chrono::seconds(1);

timespec toTimespec(TimePoint when) {
  // steady_clock is CLOCK_MONOTONIC.
  const auto ns = std::max<std::int64_t>(
      1, std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count());
  return {ns / 1'000'000'000, ns % 1'000'000'000};
}

}  // namespace

Loop::Loop(int threads)
    : events_max_(threads == 1 ? kEventsAlone : kEventsEach),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      clock_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
  REDUCER_CHECK(epoll_ && wake_ && clock_);
  // Edge triggered these two never need to be read: each write, and each expiry, is an edge.
  for (const auto& [fd, id] :
       {std::pair(wake_.get(), kWakeId), std::pair(clock_.get(), kClockId)}) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = id;
    REDUCER_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  }
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { work(); });
    pthread_setname_np(threads_.back().native_handle(), "reducer-tcp");
  }
  own_ = threads_.front().get_id();
}

Loop::~Loop() {
  if (net::forkGeneration() == generation_) {
    stop();
  } else {
    new std::vector<std::thread>(std::move(threads_));  // a forked child, where they are not
  }
}

void Loop::stop() {
  {
    const std::lock_guard lock(mutex_);
    if (stopped_) return;
    stopping_ = true;
  }
  helper_left_.notify_all();
  ring();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  std::unique_lock lock(mutex_);
  helper_left_.wait(lock, [this] { return helper_.load() == std::thread::id(); });
  stopped_ = true;
  tasks_.clear();
  timers_.clear();
}

void Loop::work() {
  while (!stopping_) {
    const bool rung = turn(-1);
    if (helper_.load() != std::thread::id()) standAside(rung);
  }
  runTasks();
  ring();  // the next one
}

bool Loop::turn(int timeout_ms) {
  epoll_event events[kEventsAlone];
  const int count = epoll_wait(epoll_.get(), events, events_max_, timeout_ms);
  bool rung = false;
  for (int i = 0; i < count; ++i) {
    rung |= events[i].data.u64 == kWakeId;
    serve(events[i]);
  }
  return rung;
}

void Loop::help(const std::function<bool()>& ended, TimePoint until) {
  if (events_max_ != kEventsAlone || net::forkGeneration() != generation_) return;
  const std::thread::id me = std::this_thread::get_id();
  if (me == own_) return;  // it serves the events already
  std::thread::id nobody;
  if (stopping_ || !helper_.compare_exchange_strong(nobody, me)) return;
  while (!stopping_ && !ended()) {
    const Duration left = std::min<Duration>(until - Clock::now(), kHelpTurn);
    if (left <= Duration::zero()) break;
    (void)turn(static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(left).count()));
  }
  {
    // Under the lock, so that whoever is about to wait for this sees it, and nothing of the loop is
    // used afterwards.
    const std::lock_guard lock(mutex_);
    helper_ = std::thread::id();
    if (aside_ || stopping_) helper_left_.notify_all();
  }
  if (stopping_) ring();
}

void Loop::wake() {
  const std::thread::id helper = helper_;
  if (helper != std::thread::id() && helper != std::this_thread::get_id()) ring();
}

void Loop::standAside(bool rung) {
  std::unique_lock lock(mutex_);
  if (helper_.load() == std::thread::id() || stopping_) return;
  if (rung) ring();  // it may have been meant for the helper, which alone waits now
  aside_ = true;
  helper_left_.wait(lock, [this] { return helper_.load() == std::thread::id() || stopping_; });
  aside_ = false;
}

void Loop::serve(const epoll_event& event) {
  if (event.data.u64 == kWakeId) return runTasks();
  if (event.data.u64 == kClockId) return runTimers();
  std::shared_ptr<Source> source;
  {
    const std::lock_guard lock(sources_mutex_);
    const auto found = sources_.find(event.data.u64);
    if (found == sources_.end()) return;
    source = found->second;
  }
  source->onEvents(event.events);
}

std::uint64_t Loop::add(int fd, std::shared_ptr<Source> source) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(sources_mutex_);
    id = next_source_++;
    sources_.emplace(id, std::move(source));
  }
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = id;
  REDUCER_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  return id;
}

void Loop::remove(std::uint64_t id, int fd) {
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  std::shared_ptr<Source> removed;  // released after the lock
  const std::lock_guard lock(sources_mutex_);
  const auto found = sources_.find(id);
  if (found == sources_.end()) return;
  removed = std::move(found->second);
  sources_.erase(found);
}

void Loop::ring() {
  const std::uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

void Loop::post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    if (stopped_) return;
    tasks_.push_back(std::move(task));
    if (tasks_.size() > 1) return;  // whoever was woken for the first takes all
  }
  ring();
}

void Loop::runTasks() {
  std::vector<std::function<void()>> tasks;
  {
    const std::lock_guard lock(mutex_);
    tasks.swap(tasks_);
  }
  for (std::function<void()>& task : tasks) {
    task();
    task = nullptr;
  }
}

std::uint64_t Loop::schedule(TimePoint when, std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  if (stopped_) return 0;
  const std::uint64_t id = next_timer_++;
  timers_.emplace(std::pair(when, id), std::move(task));
  times_.emplace(id, when);
  armHeld();
  return id;
}

bool Loop::cancel(std::uint64_t timer) {
  std::function<void()> task;  // released after the lock
  const std::lock_guard lock(mutex_);
  const auto time = times_.find(timer);
  if (time == times_.end()) return false;
  const auto found = timers_.find({time->second, timer});
  task = std::move(found->second);
  timers_.erase(found);
  times_.erase(time);
  return true;
}

void Loop::armHeld() {
  if (timers_.empty()) return;
  const TimePoint next = timers_.begin()->first.first;
  if (next >= armed_) return;
  armed_ = next;
  itimerspec spec{};
  spec.it_value = toTimespec(next);
  (void)timerfd_settime(clock_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

void Loop::runTimers() {
  std::vector<std::function<void()>> due;
  {
    const std::lock_guard lock(mutex_);
    const TimePoint now = Clock::now();
    while (!timers_.empty() && timers_.begin()->first.first <= now) {
      times_.erase(timers_.begin()->first.second);
      due.push_back(std::move(timers_.begin()->second));
      timers_.erase(timers_.begin());
    }
    armed_ = TimePoint::max();
    armHeld();
  }
  for (std::function<void()>& task : due) {
    task();
    task = nullptr;
  }
}

}  // namespace reducer::transport::tcp
