#include "torch/completion_thread.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace reducer::torch_backend {
namespace {

using Clock = std::chrono::steady_clock;

// How long a task may hold up the next before another thread takes that. Long beside a callback,
// short beside what a callback may wait for.
constexpr auto kPatience = std::chrono::milliseconds(2);

// Callbacks that wait for each other's Futures, one within the other.
constexpr std::size_t kThreadsMax = 64;

// What a callback raises has nobody to be told to, and must not end the process.
void runGuarded(const std::function<void()>& task) {
  try {
    task();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "reducer: a callback raised: %s\n", error.what());
  }
}

}  // namespace

// Shared with the threads, which may outlive the owner when stop() is called from a task.
struct CompletionThread::Queue {
  struct Task {
    std::function<void()> run;
    Clock::time_point posted;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Task> tasks;
  std::vector<std::thread> threads;
  std::size_t running = 0;  // threads inside a task
  Clock::time_point last_taken;
  bool stopped = false;
};

CompletionThread::CompletionThread() : queue_(std::make_shared<Queue>()) {}

CompletionThread::~CompletionThread() { stop(); }

// Called with the lock held.
void CompletionThread::addThread(const std::shared_ptr<Queue>& queue) {
  queue->threads.emplace_back([queue] { run(queue); });
}

void CompletionThread::post(std::function<void()> task) {
  {
    const std::lock_guard lock(queue_->mutex);
    if (!queue_->stopped) {
      queue_->tasks.push_back({std::move(task), Clock::now()});
      if (queue_->threads.empty()) addThread(queue_);
      queue_->changed.notify_one();
      return;
    }
  }
  runGuarded(task);
}

void CompletionThread::run(const std::shared_ptr<Queue>& queue) {
  std::unique_lock lock(queue->mutex);
  while (true) {
    queue->changed.wait(lock, [&] { return queue->stopped || !queue->tasks.empty(); });
    if (queue->tasks.empty()) return;
    // While one thread is at work the others leave it the queue, unless it is stuck.
    if (queue->running > 0) {
      const Clock::time_point stuck =
          std::max(queue->tasks.front().posted, queue->last_taken) + kPatience;
      if (Clock::now() < stuck) {
        queue->changed.wait_until(lock, stuck);
        continue;
      }
    }
    {
      const Queue::Task task = std::move(queue->tasks.front());
      queue->tasks.pop_front();
      queue->last_taken = Clock::now();
      // One thread always stands by.
      if (++queue->running == queue->threads.size() && !queue->stopped &&
          queue->threads.size() < kThreadsMax) {
        addThread(queue);
      }
      lock.unlock();
      runGuarded(task.run);
    }
    lock.lock();
    --queue->running;
    queue->changed.notify_one();
  }
}

void CompletionThread::stop() {
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(queue_->mutex);
    queue_->stopped = true;
    queue_->changed.notify_all();
    threads.swap(queue_->threads);
  }
  for (std::thread& thread : threads) {
    if (thread.get_id() == std::this_thread::get_id()) {
      thread.detach();  // it ends as soon as the task that called this returns
    } else {
      thread.join();
    }
  }
}

}  // namespace reducer::torch_backend
