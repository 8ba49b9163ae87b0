// Events of sockets, timers and posted tasks, and the threads that serve them.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "transport/net/fork.h"
#include "transport/net/socket.h"
#include "transport/transport.h"

namespace reducer::transport::tcp {

/// What has a socket in the loop.
class Source {
 public:
  virtual ~Source() = default;
  /// Something happened (epoll's bits). Edge triggered, and from several threads at once: what
  /// happens during a call is told by another one.
  virtual void onEvents(std::uint32_t events) = 0;
};

/// All threads wait on one epoll instance. Its sockets are edge triggered, so that an event wakes
/// one thread, and nothing is switched on and off. Timers are a timerfd's, tasks an eventfd's.
///
/// Thread safety: every method, from any thread. No lock is held while a source, a timer or a task
/// runs.
class Loop final : public Helper {
 public:
  explicit Loop(int threads);
  ~Loop() override;
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  /// Runs what has been posted, sends helpers away, and joins the threads. Not from one of them.
  void stop();

  void help(const std::function<bool()>& ended, TimePoint until) override;
  void wake() override;

  /// Returns a number for remove(). The first events come at once.
  std::uint64_t add(int fd, std::shared_ptr<Source> source);
  /// Before the socket is closed. A call of its source may still be under way.
  void remove(std::uint64_t id, int fd);

  /// Runs the task soon on a thread of the loop. After stop(): drops it.
  void post(std::function<void()> task);

  /// Runs the task at that time; returns a number for cancel(). After stop(): never.
  std::uint64_t schedule(TimePoint when, std::function<void()> task);
  /// False if the task runs, has run, or was cancelled.
  bool cancel(std::uint64_t timer);

 private:
  using Timers = std::map<std::pair<TimePoint, std::uint64_t>, std::function<void()>>;

  void work();
  /// Waits for events and serves them. True: one was a call to wake up.
  bool turn(int timeout_ms);
  void serve(const epoll_event& event);
  void ring();
  void standAside(bool rung);
  void runTasks();
  void runTimers();
  void armHeld();

  const std::uint64_t generation_ = net::forkGeneration();
  const int events_max_;
  net::Fd epoll_;
  net::Fd wake_;
  net::Fd clock_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::thread::id> helper_{};  // none: nobody helps

  std::mutex sources_mutex_;
  std::unordered_map<std::uint64_t, std::shared_ptr<Source>> sources_;
  std::uint64_t next_source_ = 2;  // below: wake_ and clock_

  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;
  Timers timers_;
  std::unordered_map<std::uint64_t, TimePoint> times_;  // of the timers, by number
  std::uint64_t next_timer_ = 1;
  TimePoint armed_ = TimePoint::max();
  std::condition_variable helper_left_;
  bool aside_ = false;  // the loop's own thread waits for the helper to leave
  bool stopped_ = false;
  std::vector<std::thread> threads_;
  std::thread::id own_;  // the first of them
};

}  // namespace reducer::transport::tcp
