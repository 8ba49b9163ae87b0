// The calls of one backend that are under way, and who wants to know when they end.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>

#include "torch/completion_thread.h"

namespace reducer::torch_backend {

/// Thread safety: every method, from any thread.
class Ledger : public std::enable_shared_from_this<Ledger> {
 public:
  using Hook = std::function<void(std::shared_ptr<c10d::WorkInfo>)>;

  explicit Ledger(std::shared_ptr<CompletionThread> completions)
      : completions_(std::move(completions)) {}

  /// Called on the completion thread with every call that ends from now on.
  void setHook(Hook hook) {
    const std::lock_guard lock(mutex_);
    hook_ = std::make_shared<Hook>(std::move(hook));
  }

  void began() {
    const std::lock_guard lock(mutex_);
    ++pending_;
  }

  void ended(std::shared_ptr<c10d::WorkInfo> info) {
    std::shared_ptr<Hook> hook;
    {
      const std::lock_guard lock(mutex_);
      hook = hook_;
      if (!hook) return settle();
    }
    completions_->post([self = shared_from_this(), hook, info = std::move(info)] {
      try {
        (*hook)(info);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "reducer: the completion hook raised: %s\n", error.what());
      }
      const std::lock_guard lock(self->mutex_);
      self->settle();
    });
  }

  /// Returns when no call is under way and every hook has run. Calls have deadlines, and so does
  /// this. Not with the GIL held.
  void waitIdle() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void settle() {
    if (--pending_ == 0) idle_.notify_all();
  }

  const std::shared_ptr<CompletionThread> completions_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::size_t pending_ = 0;
  std::shared_ptr<Hook> hook_;
};

}  // namespace reducer::torch_backend
