// Threads for what must not run on a transport's thread: Futures, whose callbacks may be Python's
// and want the GIL.
#pragma once

#include <functional>
#include <memory>

namespace reducer::torch_backend {

/// Runs tasks one after another, in order, except that a task that waits for a later one (a
/// callback may wait for another call's Future) does not hold that up for long: another thread goes
/// on with it. The threads start with the first task.
///
/// Thread safety: post(), from any thread, also from a task; stop() and the destructor, not with
/// the GIL held, since a task that is still to run may want it.
class CompletionThread {
 public:
  CompletionThread();
  ~CompletionThread();
  CompletionThread(const CompletionThread&) = delete;
  CompletionThread& operator=(const CompletionThread&) = delete;

  /// Runs `task` soon; after stop(), at once and on the caller's thread.
  void post(std::function<void()> task);

  /// Runs what is queued, then joins the threads (lets its own go, if called from a task).
  /// Idempotent.
  void stop();

 private:
  struct Queue;
  static void run(const std::shared_ptr<Queue>& queue);
  static void addThread(const std::shared_ptr<Queue>& queue);

  const std::shared_ptr<Queue> queue_;
};

}  // namespace reducer::torch_backend
