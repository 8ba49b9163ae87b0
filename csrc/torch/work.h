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

#include "collective/group.h"
#include "common/status.h"
#include "torch/accelerator.h"
#include "torch/buffers.h"
#include "torch/completion_thread.h"
#include "torch/ledger.h"
#include "transport/transport.h"

namespace reducer::torch_backend {

inline std::exception_ptr asException(const std::string& text) {
  return std::make_exception_ptr(
      c10::DistBackendError({__func__, __FILE__, static_cast<std::uint32_t>(__LINE__)}, text));
}

/// What went wrong, without torch's C++ backtrace.
inline std::string textOf(const std::exception& error) {
  const auto* torchs = dynamic_cast<const c10::Error*>(&error);
  return torchs != nullptr ? torchs->what_without_backtrace() : error.what();
}

/// Ends when every part has ended: an operation of the group is a part, a coalesced call has
/// several. The first error is the call's. Thread safety: as c10d::Work, any thread.
class ReducerWork final : public c10d::Work {
 public:
  using Clock = std::chrono::steady_clock;
  struct Info {
    int rank = 0;
    c10d::OpType type = c10d::OpType::UNKNOWN;
    const char* title = nullptr;  ///< for the profiler: "reducer:all_reduce"
    std::string who;              ///< "[rank R, group NAME]", before every error
    std::uint64_t sequence = 0;
    std::shared_ptr<std::atomic<int>> source;  ///< of a receive; -1 until it is known
    std::size_t parts = 1;
    std::chrono::milliseconds timeout{0};  ///< of the operation
    std::shared_ptr<collective::Canceller> canceller;
  };
  /// What all calls of a backend share.
  struct Shared {
    std::shared_ptr<CompletionThread> completions;
    std::shared_ptr<Ledger> ledger;
    std::shared_ptr<LaunchQueue> launches;
    std::shared_ptr<transport::Helper> helper;  ///< may be null
  };

  /// `outputs` are what result() and the Future give; this keeps aliases of them.
  ReducerWork(Info info, const std::optional<std::vector<at::Tensor>>& inputs,
              const std::vector<at::Tensor>& outputs, std::shared_ptr<Buffers> buffers,
              Shared shared)
      : c10d::Work(info.rank, info.type, info.title, inputs),
        info_(std::move(info)),
        parts_left_(info_.parts),
        buffers_(std::move(buffers)),
        shared_(std::move(shared)) {
    outputs_.reserve(outputs.size());
    for (const at::Tensor& output : outputs) outputs_.push_back(aliasOf(output));
    if (buffers_ && buffers_->copies()) devices_ = {buffers_->copies()->device()};
    shared_.ledger->began();
    if (info_.parts == 0) complete();
  }

  /// Told once for each part, from any thread.
  void partDone(const Status& status) {
    if (!status.ok()) {
      const std::lock_guard lock(outcome_mutex_);
      if (error_.ok()) error_ = status;
    }
    if (parts_left_.fetch_sub(1) != 1) return;
    // Moving a tensor's bytes is not for a thread of the transport.
    if (buffers_ && !buffers_->copies() && buffers_->hasBack()) {
      shared_.completions->post(
          [self = c10::intrusive_ptr<ReducerWork>::reclaim_copy(this)] { self->complete(); });
    } else {
      complete();
    }
  }

  /// Before the end: what result() gives where that is known only then.
  void setOutputs(std::vector<at::Tensor> outputs) { outputs_ = std::move(outputs); }

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override {
    if (shared_.helper) helpUntil(timeout);
    {
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
    }
    synchronize();
    return true;
  }

  /// Lets the device's current stream wait for the results.
  void synchronize() override {
    const std::shared_ptr<c10::Event> event = finished_.load();
    if (event) blockCurrentStreamOn(*event);
  }
  void blockCurrentStream() override { wait(); }

  /// Gives the call up, on this rank and so on all: the others get an error that says so.
  void abort() override {
    info_.canceller->cancel(
        Status(Code::kAborted, "abort() of its Work was called on rank " + std::to_string(rank_)));
  }

  bool isCompleted() override {
    if (!c10d::Work::isCompleted()) return false;
    const std::shared_ptr<c10::Event> event = finished_.load();
    return !event || event->query();
  }

  std::vector<at::Tensor> result() override { return outputs_; }
  int sourceRank() const override { return info_.source ? info_.source->load() : -1; }
  std::uint64_t getSequencenumber() const override { return info_.sequence; }

  std::chrono::milliseconds timeout() const { return info_.timeout; }

  /// Milliseconds from the call to its end on this rank, the waiting for others included.
  float getDuration() const override {
    const std::lock_guard lock(mutex_);
    TORCH_CHECK(completed_, info_.who, " ", info_.title,
                ": it has no duration yet, it is under way");
    return std::chrono::duration<float, std::milli>(finished_at_ - started_at_).count();
  }

  /// A Future of List[Tensor], made at the first call. It is completed on the completion thread, or
  /// at once if the operation has ended already.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    const std::lock_guard lock(outcome_mutex_);
    if (!future_) {
      future_ = c10::make_intrusive<c10::ivalue::Future>(
          c10::ListType::create(c10::TensorType::get()), devices_);
      if (ended_) mark(*future_);
    }
    return future_;
  }

 private:
  /// What the wait is for may be done on this thread, in place of the transport's.
  void helpUntil(std::chrono::milliseconds timeout) {
    const auto until = timeout <= kNoTimeout ? Clock::time_point::max() : Clock::now() + timeout;
    shared_.helper->help(
        [this] {
          const std::lock_guard lock(mutex_);
          return completed_;
        },
        until);
  }

  void mark(c10::ivalue::Future& future) {
    if (failure_) {
      future.setError(failure_);
    } else if (copies_) {
      // A Future's callbacks begin behind the streams that are current here.
      copies_->copies()->onUpStream([&] { future.markCompleted(c10::IValue(outputs_)); });
    } else {
      future.markCompleted(c10::IValue(outputs_));
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
    if (buffers_ && buffers_->copies()) {
      try {
        const auto event = buffers_->copies()->finished();
        finished_.store(event);
        shared_.launches->keep(event, buffers_);
      } catch (...) {
        if (!failure) failure = std::current_exception();
      }
    }
    finished_at_ = Clock::now();

    c10::intrusive_ptr<c10::ivalue::Future> future;
    {
      const std::lock_guard lock(outcome_mutex_);
      ended_ = true;
      failure_ = failure;
      if (!devices_.empty()) copies_ = buffers_;
      future = future_;
    }
    buffers_.reset();
    finish(failure);
    if (shared_.helper) shared_.helper->wake();
    shared_.ledger->ended(std::make_shared<c10d::WorkInfo>(
        opType_, info_.sequence, started_at_, finished_at_, finished_at_ - started_at_));
    if (future) {
      shared_.completions->post([self = c10::intrusive_ptr<ReducerWork>::reclaim_copy(this),
                                 future] { self->mark(*future); });
    }
  }

  const Info info_;
  std::atomic<std::size_t> parts_left_;
  std::shared_ptr<Buffers> buffers_;
  const Shared shared_;
  std::vector<at::Tensor> outputs_;
  std::vector<c10::Device> devices_;
  const Clock::time_point started_at_ = Clock::now();
  Clock::time_point finished_at_;
  std::atomic<std::shared_ptr<c10::Event>> finished_;

  std::mutex outcome_mutex_;
  Status error_;  // the first part's that failed
  bool ended_ = false;
  std::exception_ptr failure_;
  std::shared_ptr<Buffers> copies_;  // of a device's tensors, for the Future's stream
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

/// Several calls as one: what endCoalescing() gives. Thread safety: as c10d::Work.
class CoalescedWork final : public c10d::Work {
 public:
  CoalescedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override {
    for (const auto& work : works_) work->wait(timeout);
    return true;
  }
  void synchronize() override {
    for (const auto& work : works_) work->synchronize();
  }
  void blockCurrentStream() override { wait(); }
  bool isCompleted() override {
    for (const auto& work : works_) {
      if (!work->isCompleted()) return false;
    }
    return true;
  }
  bool isSuccess() const override { return exception() == nullptr; }
  std::exception_ptr exception() const override {
    for (const auto& work : works_) {
      if (const std::exception_ptr one = work->exception()) return one;
    }
    return nullptr;
  }
  std::vector<at::Tensor> result() override {
    std::vector<at::Tensor> all;
    for (const auto& work : works_) {
      for (at::Tensor& tensor : work->result()) all.push_back(std::move(tensor));
    }
    return all;
  }
  std::uint64_t getSequencenumber() const override {
    return works_.empty() ? 0 : works_.front()->getSequencenumber();
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    c10::List<c10::intrusive_ptr<c10::ivalue::Future>> parts(
        c10::FutureType::create(c10::ListType::create(c10::TensorType::get())));
    for (const auto& work : works_) parts.push_back(work->getFuture());
    return c10::collectAll(parts)->then(
        [works = works_](c10::ivalue::Future& all) {
          all.waitAndThrow();
          c10::List<at::Tensor> tensors;
          for (const auto& work : works) {
            if (const std::exception_ptr error = work->exception()) std::rethrow_exception(error);
            for (const at::Tensor& tensor : work->result()) tensors.push_back(tensor);
          }
          return c10::IValue(tensors);
        },
        c10::ListType::create(c10::TensorType::get()));
  }

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace reducer::torch_backend
