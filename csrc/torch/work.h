// One call under way, as torch sees it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "common/status.h"
#include "torch/buffers.h"
#include "torch/completion_thread.h"

namespace reducer::torch_backend {

inline std::exception_ptr asException(const std::string& text) {
  return std::make_exception_ptr(
      c10::DistBackendError({__func__, __FILE__, static_cast<std::uint32_t>(__LINE__)}, text));
}

/// Ends when every part has ended: an operation of the group is a part, a coalesced call has
/// several. The first error is the call's. Thread safety: as c10d::Work, any thread.
class ReducerWork final : public c10d::Work {
 public:
  struct Info {
    int rank = 0;
    c10d::OpType type = c10d::OpType::UNKNOWN;
    const char* title = nullptr;  ///< for the profiler: "reducer:all_reduce"
    std::string who;              ///< "[rank R, group NAME]", before every error
    std::uint64_t sequence = 0;
    int source = -1;
    std::size_t parts = 1;
  };

  /// `outputs` are what result() and the Future give; this keeps aliases of them.
  ReducerWork(Info info, const std::optional<std::vector<at::Tensor>>& inputs,
              const std::vector<at::Tensor>& outputs, std::shared_ptr<Buffers> buffers,
              std::shared_ptr<CompletionThread> completions)
      : c10d::Work(info.rank, info.type, info.title, inputs),
        info_(std::move(info)),
        parts_left_(info_.parts),
        buffers_(std::move(buffers)),
        completions_(std::move(completions)) {
    outputs_.reserve(outputs.size());
    for (const at::Tensor& output : outputs) outputs_.push_back(aliasOf(output));
    if (info_.parts == 0) complete();
  }

  /// Told once for each part, from any thread.
  void partDone(const Status& status) {
    if (!status.ok()) {
      const std::lock_guard lock(outcome_mutex_);
      if (error_.ok()) error_ = status;
    }
    if (parts_left_.fetch_sub(1) == 1) complete();
  }

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override {
    // A caller that is willing to spin, or to move frames itself, would do so here.
    std::unique_lock lock(mutex_);
    const auto ended = [this] { return completed_; };
    if (timeout <= kNoTimeout) {
      cv_.wait(lock, ended);  // the operation has a deadline of its own
    } else if (!cv_.wait_for(lock, timeout, ended)) {
      std::rethrow_exception(
          asException(info_.who + " " + info_.title + ": wait() gave up after " +
                      std::to_string(timeout.count()) +
                      " ms; the operation itself goes on until its own timeout"));
    }
    if (exception_) std::rethrow_exception(exception_);
    return true;
  }

  std::vector<at::Tensor> result() override { return outputs_; }
  int sourceRank() const override { return info_.source; }
  std::uint64_t getSequencenumber() const override { return info_.sequence; }

  /// A Future of List[Tensor], made at the first call. It is completed on the completion thread, or
  /// at once if the operation has ended already.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    const std::lock_guard lock(outcome_mutex_);
    if (!future_) {
      future_ =
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
      if (ended_) markFuture(*future_, outputs_, failure_);
    }
    return future_;
  }

 private:
  static void markFuture(c10::ivalue::Future& future, const std::vector<at::Tensor>& outputs,
                         const std::exception_ptr& failure) {
    if (failure) {
      future.setError(failure);
    } else {
      future.markCompleted(c10::IValue(outputs));
    }
  }

  void complete() {
    std::exception_ptr failure;
    if (!error_.ok()) {
      failure = asException(info_.who + " " + error_.message());
    } else if (buffers_) {
      try {
        buffers_->copyBack();
      } catch (...) {
        failure = std::current_exception();
      }
    }
    buffers_.reset();
    finish(failure);

    c10::intrusive_ptr<c10::ivalue::Future> future;
    {
      const std::lock_guard lock(outcome_mutex_);
      ended_ = true;
      failure_ = failure;
      future = future_;
    }
    if (future) {
      completions_->post(
          [future, outputs = outputs_, failure] { markFuture(*future, outputs, failure); });
    }
  }

  const Info info_;
  std::atomic<std::size_t> parts_left_;
  std::shared_ptr<Buffers> buffers_;
  const std::shared_ptr<CompletionThread> completions_;
  std::vector<at::Tensor> outputs_;

  std::mutex outcome_mutex_;
  Status error_;  // the first part's that failed
  bool ended_ = false;
  std::exception_ptr failure_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

}  // namespace reducer::torch_backend
