// torch.distributed's view of a group: the collectives that c10d calls, on tensors.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "collective/group.h"
#include "runtime/runtime.h"
#include "torch/arguments.h"
#include "torch/buffers.h"
#include "torch/completion_thread.h"
#include "torch/ledger.h"
#include "torch/part.h"
#include "torch/work.h"

namespace reducer::torch_backend {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using Milliseconds = std::chrono::milliseconds;

/// What a group was made with, as `options` of the backend and for split() and shrink(): torch's
/// own fields, and the settings.
struct ReducerOptions final : c10d::Backend::Options {
  explicit ReducerOptions(Milliseconds timeout) : Options("reducer", timeout) {}
  std::vector<std::string> servers;
  collective::Settings settings;
};

/// A c10d::Backend over a collective::Group.
///
/// Every collective checks its arguments (errors are raised by the call), queues the operation and
/// returns its Work, which ends with a DistBackendError if the operation fails. Thread safety: any
/// thread; calls of one group are ordered as they get through. No method needs the GIL; those that
/// join threads release it if the caller holds it. In a forked child every call raises an error,
/// and the destructor leaves everything alone.
class ReducerBackend final : public c10d::Backend {
 public:
  /// Joins the group. The error is what Group::create() says.
  static Result<c10::intrusive_ptr<ReducerBackend>> create(
      const collective::GroupConfig& config, std::shared_ptr<runtime::Runtime> runtime,
      Milliseconds timeout, std::vector<std::uint64_t> ranks);
  ReducerBackend(collective::GroupConfig config, std::shared_ptr<runtime::Runtime> runtime,
                 std::shared_ptr<collective::Group> group, Milliseconds timeout,
                 std::vector<std::uint64_t> ranks);
  ~ReducerBackend() override;

  /// Leaves every group of this process: for the end of the interpreter, after which no callback
  /// could run.
  static void shutdownAll();

  const std::string getBackendName() const override { return "reducer"; }
  /// A copy: a ReducerOptions.
  c10::intrusive_ptr<Options> getBackendOptions() override;
  void setTimeout(Milliseconds timeout) override { timeout_ms_ = timeout.count(); }
  /// More time for the next call, once.
  void addEphemeralTimeout(Milliseconds more) { ephemeral_ms_ = more.count(); }
  void setSequenceNumberForGroup() override {}  // numbers begin with 0 on every rank
  std::uint64_t getSequenceNumberForGroup() override { return calls_; }
  c10d::ErrorType getError() override { return *error_type_; }

  /// Every call that ends from now on is told to `hook`, on a thread of its own.
  void registerOnCompletionHook(Ledger::Hook&& hook) override;
  /// Returns when no call is under way and all hooks have run.
  void waitForPendingWorks() override;
  void enableCollectivesTiming() override {}  // Work::getDuration() always knows

  /// Calls of this thread from here to endCoalescing() are also gathered into the Work that it
  /// returns. They start at once, as without.
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

  /// A group of some ranks of this one (null on the others), without a word between them: all
  /// addresses are known. All ranks that are in it must call it, with equal arguments.
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<c10d::Store>& store,
                                    const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override;
  std::uint64_t splitCount() const { return splits_; }
  /// A group without some ranks, which need not be alive. The others must all call it.
  bool supportsShrinking() const override { return true; }
  c10::intrusive_ptr<Backend> shrink(const std::vector<std::int64_t>& to_exclude, int flags,
                                     const c10::intrusive_ptr<Options>& options) override;

  /// Fails what is under way and all later calls; the group can then be destroyed and made again.
  void abort() override;
  /// Leaves the group in good order.
  void shutdown() override;

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs,
                 const c10d::GatherOptions& options) override;
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                  const c10d::ScatterOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input,
                        std::vector<std::int64_t>& output_splits,
                        std::vector<std::int64_t>& input_splits,
                        const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs,
                   const c10d::AllToAllOptions& options) override;
  WorkPtr send(Tensors& tensors, int to, int tag) override;
  WorkPtr recv(Tensors& tensors, int from, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;

  /// What a group was made with: its job, and the address of each rank's reducer, by rank.
  const std::string& job() const { return config_.job; }
  const std::vector<std::string>& workers() const { return config_.workers; }
  /// What the group has moved so far, and how. After shutdown() these raise.
  collective::GroupCounters counters() { return session()->group->counters(); }
  std::vector<collective::SizeRange> ranges() { return session()->group->ranges(); }
  std::vector<collective::Estimate> explain(std::uint64_t nbytes) {
    return session()->group->explain(nbytes);
  }
  /// Measures the ways that `auto` may choose, in a group that was made with Settings::measures,
  /// and goes by what it found, as do groups split off later. Before the first call, on all ranks.
  /// Returns the same on all ranks; nothing if it could not measure.
  std::vector<collective::Sample> measure();

 private:
  /// What ends with shutdown(). The group must go before the runtime.
  struct Session {
    ~Session();
    std::shared_ptr<runtime::Runtime> runtime;
    std::shared_ptr<collective::Group> group;
  };
  /// A call, apart from its memory.
  struct Call {
    c10d::OpType type;
    const char* title;  ///< "reducer:all_reduce"
    Milliseconds timeout;
    bool blocking = false;                               ///< the caller waits for it at once
    Tensors inputs = {};                                 ///< for the profiler
    Tensors outputs = {};                                ///< for result() and the Future
    std::shared_ptr<std::atomic<int>> source = nullptr;  ///< of a receive
    std::shared_ptr<collective::Canceller> canceller = std::make_shared<collective::Canceller>();
    bool numbered = true;  ///< a collective, which all ranks call: it has a number
  };
  using Done = collective::Done;
  using Start = std::function<void(collective::Group&, const Part&, collective::CallOptions,
                                   collective::Done)>;

  /// Starts every part of a call, whose memory is in `buffers`, and returns its Work.
  WorkPtr launch(Call call, std::shared_ptr<Buffers> buffers, std::vector<Part> parts,
                 const Start& start);
  /// `start` takes the part's `out`.
  WorkPtr launchReceive(Call call, const Tensors& tensors, const Start& start);
  c10::intrusive_ptr<ReducerWork> makeWork(const Call& call, std::shared_ptr<Buffers> buffers,
                                           std::size_t parts);
  /// What a part's end does.
  Done ending(const c10::intrusive_ptr<ReducerWork>& work) const;
  WorkPtr enroll(WorkPtr work);
  /// A byte to (`out`) or from another rank.
  WorkPtr signal(int peer, bool out, Milliseconds timeout, std::shared_ptr<std::uint8_t> byte);
  WorkPtr launchAllReduce(Call call, const Tensors& tensors, const c10d::ReduceOp& op);
  /// outputs[i] are what the ranks' inputs[i] go to: a list of tensors by rank, or one tensor for
  /// all.
  WorkPtr launchAllGather(Call call, const std::vector<Tensors>& outputs, const Tensors& inputs,
                          bool lists);
  /// inputs[i] are what goes into the ranks' outputs[i]: a list of tensors by rank, or one tensor
  /// for all.
  WorkPtr launchReduceScatter(Call call, const Tensors& outputs, const std::vector<Tensors>& inputs,
                              bool lists, const c10d::ReduceOp& op);

  /// A group of these ranks of this one, by a name that is new.
  c10::intrusive_ptr<Backend> derive(const std::vector<Rank>& ranks, const std::string& name,
                                     const c10::intrusive_ptr<Options>& options);

  Arguments arguments(const Call& call) const;
  Milliseconds timeoutOr(Milliseconds asked) const;
  std::shared_ptr<Session> session();
  void leave();
  bool alive();  ///< not shut down
  bool forked() const;

  collective::GroupConfig config_;  // changes in measure() only
  const std::string who_;           // "[rank R, group NAME]"
  const std::vector<std::uint64_t> global_ranks_;
  const pid_t pid_;
  std::atomic<std::int64_t> timeout_ms_;
  /// Shared with the operations, whose ends may come after this object's.
  const std::shared_ptr<std::atomic<c10d::ErrorType>> error_type_ =
      std::make_shared<std::atomic<c10d::ErrorType>>(c10d::ErrorType::SUCCESS);
  std::atomic<std::int64_t> ephemeral_ms_{0};
  std::atomic<std::uint64_t> calls_{0};
  std::atomic<std::uint64_t> splits_{0};
  std::atomic<bool> aborted_{false};
  const ReducerWork::Shared shared_;
  std::mutex mutex_;
  std::shared_ptr<Session> session_;  // null after shutdown()
  /// From startCoalescing() to endCoalescing(), by thread.
  std::map<std::thread::id, std::vector<WorkPtr>> coalesced_;
  struct Child {
    std::optional<c10::weak_intrusive_ptr<Backend>> backend;
    std::uint64_t made = 0;  // how often: each instance is a job of its own
  };
  std::mutex children_mutex_;
  std::map<std::string, Child> children_;  // of split() and shrink(), by name and ranks
};

}  // namespace reducer::torch_backend
