#include "torch/completion_thread.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

namespace reducer::torch_backend {

// Shared with the thread, which may outlive the owner when stop() is called from a task.
struct CompletionThread::Queue {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  bool started = false;
  bool stopped = false;
};

CompletionThread::CompletionThread() : queue_(std::make_shared<Queue>()) {}

CompletionThread::~CompletionThread() { stop(); }

void CompletionThread::post(std::function<void()> task) {
  {
    const std::lock_guard lock(queue_->mutex);
    if (!queue_->stopped) {
      queue_->tasks.push_back(std::move(task));
      if (!queue_->started) {
        queue_->started = true;
        thread_ = std::thread([queue = queue_] { run(queue); });
      }
      queue_->changed.notify_one();
      return;
    }
  }
  task();
}

void CompletionThread::run(const std::shared_ptr<Queue>& queue) {
  std::unique_lock lock(queue->mutex);
  while (true) {
    queue->changed.wait(lock, [&] { return queue->stopped || !queue->tasks.empty(); });
    if (queue->tasks.empty()) return;
    {
      const std::function<void()> task = std::move(queue->tasks.front());
      queue->tasks.pop_front();
      lock.unlock();
      task();
    }
    lock.lock();
  }
}

void CompletionThread::stop() {
  std::thread thread;
  {
    const std::lock_guard lock(queue_->mutex);
    queue_->stopped = true;
    queue_->changed.notify_one();
    thread = std::move(thread_);
  }
  if (!thread.joinable()) return;
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();  // it ends as soon as the task that called this returns
  } else {
    thread.join();
  }
}

}  // namespace reducer::torch_backend
