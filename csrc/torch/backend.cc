#include "torch/backend.h"

#include <Python.h>
#include <unistd.h>

#include <utility>

#include "torch/splits.h"
#include "torch/work.h"

namespace reducer::torch_backend {
namespace {

using c10d::OpType;
using collective::CallOptions;
using collective::Done;
using collective::Group;

// How long the goodbyes may take: a peer that does not answer cannot hold up the end of a group.
constexpr auto kGoodbye = std::chrono::seconds(5);

/// Lets others have the GIL while this thread joins threads; does nothing if this thread does not
/// hold it.
class WithoutGil {
 public:
  WithoutGil() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

/// The backends of this process, for shutdownAll().
struct Registry {
  std::mutex mutex;
  std::vector<c10::weak_intrusive_ptr<ReducerBackend>> backends;
};
Registry& registry() {
  static Registry* const all = new Registry;  // never destroyed: backends may outlive the statics
  return *all;
}

void enlist(const c10::intrusive_ptr<ReducerBackend>& backend) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  std::erase_if(all.backends, [](const auto& other) { return other.expired(); });
  all.backends.emplace_back(backend);
}

}  // namespace

// ------------------------------------------------------------------ life

Result<c10::intrusive_ptr<ReducerBackend>> ReducerBackend::create(
    collective::GroupConfig config, std::shared_ptr<runtime::Runtime> runtime, Milliseconds timeout,
    std::vector<std::uint64_t> ranks) {
  const collective::GroupConfig kept = config;
  Result<std::shared_ptr<Group>> group =
      Group::create(std::move(config), runtime->transport(), runtime->server());
  if (!group.ok()) return group.status();
  auto backend = c10::make_intrusive<ReducerBackend>(
      kept, std::move(runtime), std::move(group).value(), timeout, std::move(ranks));
  enlist(backend);
  return backend;
}

ReducerBackend::ReducerBackend(const collective::GroupConfig& config,
                               std::shared_ptr<runtime::Runtime> runtime,
                               std::shared_ptr<collective::Group> group, Milliseconds timeout,
                               std::vector<std::uint64_t> ranks)
    : Backend(config.rank, config.world_size),
      who_("[rank " + std::to_string(config.rank) + ", group " + config.name + "]"),
      name_(config.name),
      global_ranks_(std::move(ranks)),
      pid_(getpid()),
      timeout_ms_(timeout.count()),
      completions_(std::make_shared<CompletionThread>()),
      session_(std::make_shared<Session>()) {
  session_->runtime = std::move(runtime);
  session_->group = std::move(group);
  init();
}

ReducerBackend::~ReducerBackend() { leave(); }

ReducerBackend::Session::~Session() {
  const WithoutGil without_gil;
  group.reset();
  runtime.reset();
}

void ReducerBackend::shutdownAll() {
  const WithoutGil without_gil;
  std::vector<c10::weak_intrusive_ptr<ReducerBackend>> backends;
  {
    const std::lock_guard lock(registry().mutex);
    backends = registry().backends;
  }
  for (const auto& weak : backends) {
    if (const auto backend = weak.lock()) backend->leave();
  }
}

bool ReducerBackend::forked() const { return getpid() != pid_; }

void ReducerBackend::leave() {
  if (forked()) {
    // The threads that would have to be joined, and the locks that they may have held, are the
    // parent's.
    static_cast<void>(new std::shared_ptr<Session>(session_));
    static_cast<void>(new std::shared_ptr<CompletionThread>(completions_));
    return;
  }
  const WithoutGil without_gil;
  std::shared_ptr<Session> session;
  {
    const std::lock_guard lock(mutex_);
    session = std::move(session_);
  }
  if (session) {
    session->group->close();
    session->group->waitClosed(kGoodbye);
    session.reset();
  }
  completions_->stop();
}

void ReducerBackend::shutdown() { leave(); }

void ReducerBackend::abort() {
  if (forked()) return;  // what there is to abort is the parent's
  const WithoutGil without_gil;
  std::shared_ptr<Session> session;
  {
    const std::lock_guard lock(mutex_);
    session = session_;
  }
  if (session && !forked())
    session->group->abort("abort() was called on rank " + std::to_string(rank_));
}

std::shared_ptr<ReducerBackend::Session> ReducerBackend::session() {
  TORCH_CHECK(!forked(), who_, " was made in process ", pid_,
              ", and this is a process forked from it, which has none of its connections; call "
              "init_process_group in this "
              "process, or communicate in the parent only");
  const std::lock_guard lock(mutex_);
  if (!session_) {
    C10_THROW_ERROR(DistBackendError,
                    who_ + " was shut down (destroy_process_group); make a new group");
  }
  return session_;
}

c10::intrusive_ptr<c10d::Backend::Options> ReducerBackend::getBackendOptions() {
  auto options = c10::make_intrusive<Options>(getBackendName(), timeoutOr(c10d::kUnsetTimeout));
  options->group_name = name_;
  options->group_desc = getGroupDesc();
  options->global_ranks_in_group = global_ranks_;
  return options;
}

std::uint64_t ReducerBackend::getSequenceNumberForGroup() { return session()->group->sequence(); }

// ------------------------------------------------------------------ launching

Milliseconds ReducerBackend::timeoutOr(Milliseconds asked) const {
  return asked > Milliseconds(0) ? asked : Milliseconds(timeout_ms_.load());
}

Arguments ReducerBackend::arguments(const Call& call) const {
  const std::string_view title = call.title;
  return Arguments(who_, title.substr(title.find(':') + 1), rank_, size_);
}

WorkPtr ReducerBackend::launch(Call call, std::shared_ptr<Buffers> buffers,
                               const std::vector<Part>& parts, const Start& start) {
  const std::shared_ptr<Session> session = this->session();
  ReducerWork::Info info;
  info.rank = rank_;
  info.type = call.type;
  info.title = call.title;
  info.who = who_;
  info.sequence = session->group->sequence();
  info.source = call.source;
  info.parts = parts.size();
  const auto work = c10::make_intrusive<ReducerWork>(std::move(info), call.inputs, call.outputs,
                                                     buffers, completions_);
  CallOptions options;
  options.timeout = timeoutOr(call.timeout);
  options.keepalive = std::move(buffers);
  for (const Part& part : parts) {
    start(*session->group, part, options, [work, error = error_type_](const Status& status) {
      if (status.code() == Code::kTimeout) *error = c10d::ErrorType::TIMEOUT;
      if (status.code() == Code::kUnavailable) *error = c10d::ErrorType::REMOTE_ERROR;
      work->partDone(status);
    });
  }
  return work;
}

WorkPtr ReducerBackend::launchAllReduce(Call call, const Tensors& tensors,
                                        const c10d::ReduceOp& op) {
  const Arguments check = arguments(call);
  const auto buffers = std::make_shared<Buffers>();
  std::vector<Part> parts;
  for (const at::Tensor& tensor : tensors) {
    Part& part = parts.emplace_back();
    part.dtype = check.tensor("tensor", tensor);
    part.op = check.op(op, part.dtype);
    part.count = elements(tensor);
    part.out = buffers->inout(tensor);
  }
  call.inputs = tensors;
  call.outputs = tensors;
  return launch(std::move(call), buffers, parts,
                [](Group& group, const Part& p, CallOptions options, Done done) {
                  group.allReduce(p.out, p.out, p.count, p.dtype, p.op, std::move(options),
                                  std::move(done));
                });
}

WorkPtr ReducerBackend::launchAllGather(Call call, const std::vector<Tensors>& outputs,
                                        const Tensors& inputs, bool lists) {
  const Arguments check = arguments(call);
  check.sameLength("the list of outputs", outputs.size(), "the list of inputs", inputs.size());
  const auto buffers = std::make_shared<Buffers>();
  std::vector<Part> parts;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Part& part = parts.emplace_back();
    part.dtype = check.tensor("input", inputs[i]);
    part.count = elements(inputs[i]);
    if (lists) {
      check.perRank("outputs", outputs[i], part.dtype);
      check.numel("outputs[" + std::to_string(rank_) + "]", outputs[i][rank_], inputs[i].numel(),
                  "as many as this rank's input has");
      for (const at::Tensor& output : outputs[i]) {
        part.outs.push_back(buffers->out(output));
        part.out_counts.push_back(elements(output));
      }
    } else {
      const at::Tensor& output = outputs[i][0];
      check.sameType("output", check.tensor("output", output), part.dtype);
      check.numel("output", output, inputs[i].numel() * size_, "the input's, times the world size");
      cut(buffers->out(output), part.count, part.dtype, size_, part.outs, part.out_counts);
    }
    part.in = buffers->in(inputs[i]);
    call.outputs.insert(call.outputs.end(), outputs[i].begin(), outputs[i].end());
  }
  call.inputs = inputs;
  return launch(std::move(call), buffers, parts,
                [](Group& group, const Part& p, CallOptions options, Done done) {
                  group.allGather(p.in, p.outs, p.out_counts, p.dtype, std::move(options),
                                  std::move(done));
                });
}

WorkPtr ReducerBackend::launchReduceScatter(Call call, const Tensors& outputs,
                                            const std::vector<Tensors>& inputs, bool lists,
                                            const c10d::ReduceOp& op) {
  const Arguments check = arguments(call);
  check.sameLength("the list of inputs", inputs.size(), "the list of outputs", outputs.size());
  const auto buffers = std::make_shared<Buffers>();
  std::vector<Part> parts;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    Part& part = parts.emplace_back();
    part.dtype = check.tensor("output", outputs[i]);
    part.op = check.op(op, part.dtype);
    if (lists) {
      check.perRank("inputs", inputs[i], part.dtype);
      check.numel("output", outputs[i], inputs[i][rank_].numel(),
                  "as many as this rank's entry of inputs has");
      for (const at::Tensor& input : inputs[i]) {
        part.ins.push_back(buffers->in(input));
        part.in_counts.push_back(elements(input));
      }
    } else {
      const at::Tensor& input = inputs[i][0];
      check.sameType("input", check.tensor("input", input), part.dtype);
      check.numel("input", input, outputs[i].numel() * size_, "the output's, times the world size");
      cut(buffers->in(input), elements(outputs[i]), part.dtype, size_, part.ins, part.in_counts);
    }
    part.out = buffers->out(outputs[i]);
    call.inputs.insert(call.inputs.end(), inputs[i].begin(), inputs[i].end());
  }
  call.outputs = outputs;
  return launch(std::move(call), buffers, parts,
                [](Group& group, const Part& p, CallOptions options, Done done) {
                  group.reduceScatter(p.ins, p.out, p.in_counts, p.dtype, p.op, std::move(options),
                                      std::move(done));
                });
}

// ------------------------------------------------------------------ collectives

WorkPtr ReducerBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  Call call{OpType::ALLREDUCE, "reducer:all_reduce", options.timeout};
  arguments(call).single("tensors", tensors);
  return launchAllReduce(std::move(call), tensors, options.reduceOp);
}

WorkPtr ReducerBackend::allreduce_coalesced(Tensors& tensors,
                                            const c10d::AllreduceCoalescedOptions& options) {
  return launchAllReduce(
      {OpType::ALLREDUCE_COALESCED, "reducer:all_reduce_coalesced", options.timeout}, tensors,
      options.reduceOp);
}

WorkPtr ReducerBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  Call call{OpType::REDUCE, "reducer:reduce", options.timeout, tensors, tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  part.op = check.op(options.reduceOp, part.dtype);
  const Rank root = check.root(options.rootRank, options.rootTensor);
  part.count = elements(tensor);
  if (rank_ == root) part.out = buffers->inout(tensor);
  part.in = rank_ == root ? part.out : buffers->in(tensor);
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.reduce(p.in, p.out, p.count, p.dtype, p.op, root, std::move(o),
                               std::move(done));
                });
}

WorkPtr ReducerBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  Call call{OpType::BROADCAST, "reducer:broadcast", options.timeout, tensors, tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  const Rank root = check.root(options.rootRank, options.rootTensor);
  part.count = elements(tensor);
  // The group reads it at the root and writes it elsewhere.
  part.out = rank_ == root ? const_cast<void*>(buffers->in(tensor)) : buffers->out(tensor);
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.broadcast(p.out, p.count, p.dtype, root, std::move(o), std::move(done));
                });
}

WorkPtr ReducerBackend::barrier(const c10d::BarrierOptions& options) {
  return launch({OpType::BARRIER, "reducer:barrier", options.timeout}, nullptr, {Part()},
                [](Group& group, const Part&, CallOptions o, Done done) {
                  group.barrier(std::move(o), std::move(done));
                });
}

// A barrier that times out names the ranks that are missing, on all ranks that came; there is
// nothing to add.
void ReducerBackend::monitoredBarrier(const c10d::BarrierOptions& options,
                                      bool /*wait_all_ranks*/) {
  barrier(options)->wait();
}

WorkPtr ReducerBackend::allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) {
  Call call{OpType::ALLGATHER, "reducer:all_gather", options.timeout};
  arguments(call).single("inputs", inputs);
  return launchAllGather(std::move(call), outputs, inputs, true);
}

WorkPtr ReducerBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                        const c10d::AllgatherOptions& options) {
  return launchAllGather(
      {OpType::_ALLGATHER_BASE, "reducer:all_gather_into_tensor", options.timeout}, {{output}},
      {input}, false);
}

WorkPtr ReducerBackend::allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                            const c10d::AllgatherOptions& options) {
  const Call call{OpType::ALLGATHER_COALESCED, "reducer:all_gather_coalesced", options.timeout};
  const Arguments check = arguments(call);
  // Here torch's lists are by rank first, and by tensor within.
  check.sameLength("the list of outputs", outputs.size(), "the group",
                   static_cast<std::size_t>(size_));
  std::vector<Tensors> by_tensor(inputs.size());
  for (const Tensors& of_rank : outputs) {
    check.sameLength("a rank's list of outputs", of_rank.size(), "the list of inputs",
                     inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) by_tensor[i].push_back(of_rank[i]);
  }
  return launchAllGather(call, by_tensor, inputs, true);
}

WorkPtr ReducerBackend::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                        const c10d::AllgatherOptions& options) {
  std::vector<Tensors> lists;
  for (const at::Tensor& output : outputs) lists.push_back({output});
  return launchAllGather(
      {OpType::COALESCED, "reducer:all_gather_into_tensor_coalesced", options.timeout}, lists,
      inputs, false);
}

WorkPtr ReducerBackend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                       const c10d::ReduceScatterOptions& options) {
  Call call{OpType::REDUCE_SCATTER, "reducer:reduce_scatter", options.timeout};
  arguments(call).single("outputs", outputs);
  return launchReduceScatter(std::move(call), outputs, inputs, true, options.reduceOp);
}

WorkPtr ReducerBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                             const c10d::ReduceScatterOptions& options) {
  return launchReduceScatter(
      {OpType::_REDUCE_SCATTER_BASE, "reducer:reduce_scatter_tensor", options.timeout}, {output},
      {{input}}, false, options.reduceOp);
}

WorkPtr ReducerBackend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                        const c10d::ReduceScatterOptions& options) {
  std::vector<Tensors> lists;
  for (const at::Tensor& input : inputs) lists.push_back({input});
  return launchReduceScatter({OpType::REDUCE_SCATTER_TENSOR_COALESCED,
                              "reducer:reduce_scatter_tensor_coalesced", options.timeout},
                             outputs, lists, false, options.reduceOp);
}

WorkPtr ReducerBackend::gather(std::vector<Tensors>& outputs, Tensors& inputs,
                               const c10d::GatherOptions& options) {
  Call call{OpType::GATHER, "reducer:gather", options.timeout, inputs};
  const Arguments check = arguments(call);
  const at::Tensor& input = check.single("inputs", inputs);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("input", input);
  const Rank root = check.root(options.rootRank);
  part.in = buffers->in(input);
  part.out_counts.assign(size_, elements(input));
  if (rank_ == root) {
    check.sameLength("the list of output lists", outputs.size(), "the list of inputs", 1);
    check.perRank("outputs", outputs[0], part.dtype);
    for (const at::Tensor& output : outputs[0]) {
      check.numel("an output", output, input.numel(), "as many as the input has, on all ranks");
      part.outs.push_back(buffers->out(output));
    }
    call.outputs = outputs[0];
  } else {
    check.emptyHere("outputs", outputs.size(), root);
  }
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.gather(p.in, p.outs, p.out_counts, p.dtype, root, std::move(o),
                               std::move(done));
                });
}

WorkPtr ReducerBackend::scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                const c10d::ScatterOptions& options) {
  Call call{OpType::SCATTER, "reducer:scatter", options.timeout, {}, outputs};
  const Arguments check = arguments(call);
  const at::Tensor& output = check.single("outputs", outputs);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("output", output);
  const Rank root = check.root(options.rootRank);
  part.in_counts.assign(size_, elements(output));
  if (rank_ == root) {
    check.sameLength("the list of input lists", inputs.size(), "the list of outputs", 1);
    check.perRank("inputs", inputs[0], part.dtype);
    for (const at::Tensor& input : inputs[0]) {
      check.numel("an input", input, output.numel(), "as many as the output has, on all ranks");
      part.ins.push_back(buffers->in(input));
    }
    call.inputs = inputs[0];
  } else {
    check.emptyHere("inputs", inputs.size(), root);
  }
  part.out = buffers->out(output);
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.scatter(p.ins, p.out, p.in_counts, p.dtype, root, std::move(o),
                                std::move(done));
                });
}

WorkPtr ReducerBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                      std::vector<std::int64_t>& output_splits,
                                      std::vector<std::int64_t>& input_splits,
                                      const c10d::AllToAllOptions& options) {
  Call call{OpType::ALLTOALL_BASE, "reducer:all_to_all_single", options.timeout, {input}, {output}};
  const Arguments check = arguments(call);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("input", input);
  check.sameType("output", check.tensor("output", output), part.dtype);
  cutRows(check, "input", input, input_splits, buffers->in(input), size_, part.ins, part.in_counts);
  cutRows(check, "output", output, output_splits, buffers->out(output), size_, part.outs,
          part.out_counts);
  return launch(std::move(call), buffers, {part},
                [](Group& group, const Part& p, CallOptions o, Done done) {
                  group.allToAll(p.ins, p.in_counts, p.outs, p.out_counts, p.dtype, std::move(o),
                                 std::move(done));
                });
}

WorkPtr ReducerBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                 const c10d::AllToAllOptions& options) {
  Call call{OpType::ALLTOALL, "reducer:all_to_all", options.timeout, inputs, outputs};
  const Arguments check = arguments(call);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  TORCH_CHECK_VALUE(!inputs.empty(), check.prefix(), "inputs is empty");
  part.dtype = check.tensor("inputs[0]", inputs[0]);
  check.perRank("inputs", inputs, part.dtype);
  check.perRank("outputs", outputs, part.dtype);
  for (int r = 0; r < size_; ++r) {
    part.ins.push_back(buffers->in(inputs[r]));
    part.in_counts.push_back(elements(inputs[r]));
    part.outs.push_back(buffers->out(outputs[r]));
    part.out_counts.push_back(elements(outputs[r]));
  }
  return launch(std::move(call), buffers, {part},
                [](Group& group, const Part& p, CallOptions o, Done done) {
                  group.allToAll(p.ins, p.in_counts, p.outs, p.out_counts, p.dtype, std::move(o),
                                 std::move(done));
                });
}

// ------------------------------------------------------------------ from one rank to another

WorkPtr ReducerBackend::send(Tensors& tensors, int to, int tag) {
  Call call{OpType::SEND, "reducer:send", c10d::kUnsetTimeout, tensors, tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  part.count = elements(tensor);
  part.in = buffers->in(tensor);
  return launch(std::move(call), buffers, {part},
                [to = check.peer("the destination", to), tag = check.tag(tag)](
                    Group& group, const Part& p, CallOptions o, Done done) {
                  group.send(p.in, p.count, p.dtype, to, tag, std::move(o), std::move(done));
                });
}

WorkPtr ReducerBackend::recv(Tensors& tensors, int from, int tag) {
  Call call{OpType::RECV, "reducer:recv", c10d::kUnsetTimeout, {}, tensors, from};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  part.count = elements(tensor);
  part.out = buffers->out(tensor);
  return launch(std::move(call), buffers, {part},
                [from = check.peer("the source", from), tag = check.tag(tag)](
                    Group& group, const Part& p, CallOptions o, Done done) {
                  group.recv(p.out, p.count, p.dtype, from, tag, std::move(o), std::move(done));
                });
}

WorkPtr ReducerBackend::recvAnysource(Tensors& /*tensors*/, int /*tag*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, who_,
      " recv: receiving from any rank is not supported yet; pass the source's rank as src");
}

}  // namespace reducer::torch_backend
