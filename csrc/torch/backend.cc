#include "torch/backend.h"

#include <algorithm>
#include <utility>

#include "torch/splits.h"

namespace reducer::torch_backend {

using c10d::OpType;
using collective::CallOptions;
using collective::Done;
using collective::Group;

namespace {

// Beyond the tags that torch's users have (32 bits with a sign).
constexpr std::uint32_t kBarrierTag = 0xFFFF'FFFF;
constexpr std::uint8_t kAllCame = 1;

// How much longer a rank waits for rank 0's verdict than rank 0 for the others.
constexpr auto kVerdictGrace = Milliseconds(2000);

}  // namespace

WorkPtr ReducerBackend::launchAllReduce(Call call, const Tensors& tensors,
                                        const c10d::ReduceOp& op) {
  const Arguments check = arguments(call);
  const auto buffers = std::make_shared<Buffers>();
  std::vector<Part> parts;
  for (const at::Tensor& tensor : tensors) {
    Part& part = parts.emplace_back();
    part.dtype = check.tensor("tensor", tensor);
    part.op = check.op(op, tensor);
    part.count = elements(tensor);
    part.out = buffers->inout(tensor, check.factor(op, tensor));
    part.in = part.out;
    part.divisible = true;
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
    part.divisible = true;
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
    part.op = check.op(op, outputs[i]);
    part.count = elements(outputs[i]);
    part.divisible = true;
    if (lists) {
      check.perRank("inputs", inputs[i], part.dtype);
      check.numel("output", outputs[i], inputs[i][rank_].numel(),
                  "as many as this rank's entry of inputs has");
      for (const at::Tensor& input : inputs[i]) {
        part.ins.push_back(buffers->in(input, check.factor(op, input)));
        part.in_counts.push_back(elements(input));
      }
    } else {
      const at::Tensor& input = inputs[i][0];
      check.sameType("input", check.tensor("input", input), part.dtype);
      check.numel("input", input, outputs[i].numel() * size_, "the output's, times the world size");
      cut(buffers->in(input, check.factor(op, input)), part.count, part.dtype, size_, part.ins,
          part.in_counts);
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
  Call call{OpType::ALLREDUCE, "reducer:all_reduce", options.timeout, !options.asyncOp};
  if (arguments(call).single("tensors", tensors).layout() == at::kSparse) {
    return allreduce_sparse(tensors, options);
  }
  return launchAllReduce(std::move(call), tensors, options.reduceOp);
}

WorkPtr ReducerBackend::allreduce_coalesced(Tensors& tensors,
                                            const c10d::AllreduceCoalescedOptions& options) {
  return launchAllReduce({OpType::ALLREDUCE_COALESCED, "reducer:all_reduce_coalesced",
                          options.timeout, !options.asyncOp},
                         tensors, options.reduceOp);
}

WorkPtr ReducerBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  Call call{OpType::REDUCE, "reducer:reduce", options.timeout, !options.asyncOp, tensors, tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  part.op = check.op(options.reduceOp, tensor);
  const Rank root = check.root(options.rootRank, options.rootTensor);
  const Factor factor = check.factor(options.reduceOp, tensor);
  part.count = elements(tensor);
  if (rank_ == root) part.out = buffers->inout(tensor, factor);
  part.in = rank_ == root ? part.out : buffers->in(tensor, factor);
  part.divisible = true;
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.reduce(p.in, p.out, p.count, p.dtype, p.op, root, std::move(o),
                               std::move(done));
                });
}

WorkPtr ReducerBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  Call call{
      OpType::BROADCAST, "reducer:broadcast", options.timeout, !options.asyncOp, tensors, tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  const Rank root = check.root(options.rootRank, options.rootTensor);
  part.count = elements(tensor);
  // The group reads it at the root and writes it elsewhere.
  part.out = rank_ == root ? const_cast<void*>(buffers->in(tensor)) : buffers->out(tensor);
  part.divisible = true;
  return launch(std::move(call), buffers, {part},
                [root](Group& group, const Part& p, CallOptions o, Done done) {
                  group.broadcast(p.out, p.count, p.dtype, root, std::move(o), std::move(done));
                });
}

WorkPtr ReducerBackend::barrier(const c10d::BarrierOptions& options) {
  return launch({OpType::BARRIER, "reducer:barrier", options.timeout, !options.asyncOp}, nullptr,
                {Part()}, [](Group& group, const Part&, CallOptions o, Done done) {
                  group.barrier(std::move(o), std::move(done));
                });
}

WorkPtr ReducerBackend::signal(int peer, bool out, Milliseconds timeout,
                               std::shared_ptr<std::uint8_t> byte) {
  Call call{OpType::BARRIER, "reducer:monitored_barrier", timeout};
  call.numbered = false;
  return launch(std::move(call), nullptr, {Part()},
                [peer, out, byte](Group& group, const Part&, CallOptions o, Done done) {
                  o.keepalive = byte;
                  if (out) {
                    group.send(byte.get(), 1, DataType::kUInt8, peer, kBarrierTag, o, done);
                  } else {
                    group.recv(byte.get(), 1, DataType::kUInt8, peer, kBarrierTag, o, done);
                  }
                });
}

// Over send and recv, as torch's users know it: rank 0 hears from every rank, and then tells those
// that it has heard whether all came. So it works beside a collective in which others hang, rank 0
// knows who is missing, and the ranks are in step for the next one.
void ReducerBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  const bool unset = options.timeout == c10d::kUnsetTimeout;
  const Milliseconds timeout = unset ? timeoutOr(options.timeout) : options.timeout;
  const std::string within = " in " + std::to_string(timeout.count()) + " ms";
  const std::string own = who_ + " Rank " + std::to_string(rank_);
  if (timeout <= Milliseconds(0)) {
    C10_THROW_ERROR(DistBackendError, own + " timed out in monitoredBarrier" + within);
  }
  const auto verdict = std::make_shared<std::uint8_t>(0);
  if (rank_ != 0) {
    std::string why = "rank 0 misses another rank";
    try {
      signal(0, true, timeout, verdict)->wait();
      signal(0, false, timeout + kVerdictGrace, verdict)->wait();
      if (*verdict == kAllCame) return;
    } catch (const std::exception& error) {
      why = textOf(error);
    }
    C10_THROW_ERROR(
        DistBackendError,
        own +
            " successfully reached monitoredBarrier, but received errors while waiting for "
            "send/recv from rank 0. Please check rank 0 logs for faulty rank. (" +
            why + ")");
  }
  std::vector<WorkPtr> works;
  for (int rank = 1; rank < size_; ++rank) {
    works.push_back(signal(rank, false, timeout, std::make_shared<std::uint8_t>(0)));
  }
  std::vector<int> heard;
  std::string missing;
  std::string why;
  for (int rank = 1; rank < size_; ++rank) {
    try {
      works[rank - 1]->wait();
      heard.push_back(rank);
    } catch (const std::exception& error) {
      if (missing.empty()) why = textOf(error);
      if (missing.empty() || wait_all_ranks) {
        missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
      }
    }
  }
  *verdict = missing.empty() ? kAllCame : 0;
  works.clear();
  for (const int rank : heard) works.push_back(signal(rank, true, timeout, verdict));
  if (!missing.empty()) {
    C10_THROW_ERROR(DistBackendError, who_ + (wait_all_ranks ? " Ranks " : " Rank ") + missing +
                                          " failed to pass monitoredBarrier" + within + " (" + why +
                                          ")");
  }
  for (const WorkPtr& work : works) work->wait();
}

WorkPtr ReducerBackend::allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) {
  Call call{OpType::ALLGATHER, "reducer:all_gather", options.timeout, !options.asyncOp};
  arguments(call).single("inputs", inputs);
  return launchAllGather(std::move(call), outputs, inputs, true);
}

WorkPtr ReducerBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                        const c10d::AllgatherOptions& options) {
  return launchAllGather({OpType::_ALLGATHER_BASE, "reducer:all_gather_into_tensor",
                          options.timeout, !options.asyncOp},
                         {{output}}, {input}, false);
}

WorkPtr ReducerBackend::allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                            const c10d::AllgatherOptions& options) {
  const Call call{OpType::ALLGATHER_COALESCED, "reducer:all_gather_coalesced", options.timeout,
                  !options.asyncOp};
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
  return launchAllGather({OpType::COALESCED, "reducer:all_gather_into_tensor_coalesced",
                          options.timeout, !options.asyncOp},
                         lists, inputs, false);
}

WorkPtr ReducerBackend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                       const c10d::ReduceScatterOptions& options) {
  Call call{OpType::REDUCE_SCATTER, "reducer:reduce_scatter", options.timeout, !options.asyncOp};
  arguments(call).single("outputs", outputs);
  return launchReduceScatter(std::move(call), outputs, inputs, true, options.reduceOp);
}

WorkPtr ReducerBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                             const c10d::ReduceScatterOptions& options) {
  return launchReduceScatter({OpType::_REDUCE_SCATTER_BASE, "reducer:reduce_scatter_tensor",
                              options.timeout, !options.asyncOp},
                             {output}, {{input}}, false, options.reduceOp);
}

WorkPtr ReducerBackend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                        const c10d::ReduceScatterOptions& options) {
  std::vector<Tensors> lists;
  for (const at::Tensor& input : inputs) lists.push_back({input});
  return launchReduceScatter(
      {OpType::REDUCE_SCATTER_TENSOR_COALESCED, "reducer:reduce_scatter_tensor_coalesced",
       options.timeout, !options.asyncOp},
      outputs, lists, false, options.reduceOp);
}

WorkPtr ReducerBackend::gather(std::vector<Tensors>& outputs, Tensors& inputs,
                               const c10d::GatherOptions& options) {
  Call call{OpType::GATHER, "reducer:gather", options.timeout, !options.asyncOp, inputs};
  const Arguments check = arguments(call);
  const at::Tensor& input = check.single("inputs", inputs);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("input", input);
  const Rank root = check.root(options.rootRank);
  part.count = elements(input);
  part.divisible = true;
  part.in = buffers->in(input);
  part.out_counts.assign(size_, part.count);
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
  Call call{OpType::SCATTER, "reducer:scatter", options.timeout, !options.asyncOp, {}, outputs};
  const Arguments check = arguments(call);
  const at::Tensor& output = check.single("outputs", outputs);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("output", output);
  const Rank root = check.root(options.rootRank);
  part.count = elements(output);
  part.divisible = true;
  part.in_counts.assign(size_, part.count);
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
  Call call{OpType::ALLTOALL_BASE,
            "reducer:all_to_all_single",
            options.timeout,
            !options.asyncOp,
            {input},
            {output}};
  const Arguments check = arguments(call);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("input", input);
  check.sameType("output", check.tensor("output", output), part.dtype);
  cutRows(check, "input", input, input_splits, buffers->in(input), size_, part.ins, part.in_counts);
  cutRows(check, "output", output, output_splits, buffers->out(output), size_, part.outs,
          part.out_counts);
  check.equalToItself(part.in_counts[rank_], part.out_counts[rank_]);
  return launch(std::move(call), buffers, {part},
                [](Group& group, const Part& p, CallOptions o, Done done) {
                  group.allToAll(p.ins, p.in_counts, p.outs, p.out_counts, p.dtype, std::move(o),
                                 std::move(done));
                });
}

WorkPtr ReducerBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                 const c10d::AllToAllOptions& options) {
  Call call{OpType::ALLTOALL, "reducer:all_to_all", options.timeout, !options.asyncOp, inputs,
            outputs};
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
  check.equalToItself(part.in_counts[rank_], part.out_counts[rank_]);
  return launch(std::move(call), buffers, {part},
                [](Group& group, const Part& p, CallOptions o, Done done) {
                  group.allToAll(p.ins, p.in_counts, p.outs, p.out_counts, p.dtype, std::move(o),
                                 std::move(done));
                });
}

// ------------------------------------------------------------------ from one rank to another

WorkPtr ReducerBackend::send(Tensors& tensors, int to, int tag) {
  Call call{OpType::SEND, "reducer:send", c10d::kUnsetTimeout, false, tensors, tensors};
  call.numbered = false;
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

WorkPtr ReducerBackend::launchReceive(Call call, const Tensors& tensors, const Start& start) {
  call.numbered = false;
  call.inputs = tensors;
  call.outputs = tensors;
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  const auto buffers = std::make_shared<Buffers>();
  Part part;
  part.dtype = check.tensor("tensor", tensor);
  part.count = elements(tensor);
  part.out = buffers->out(tensor);
  return launch(std::move(call), buffers, {part}, start);
}

WorkPtr ReducerBackend::recv(Tensors& tensors, int from, int tag) {
  Call call{OpType::RECV, "reducer:recv", c10d::kUnsetTimeout};
  call.source = std::make_shared<std::atomic<int>>(from);
  const Arguments check = arguments(call);
  return launchReceive(std::move(call), tensors,
                       [from = check.peer("the source", from), tag = check.tag(tag)](
                           Group& group, const Part& p, CallOptions o, Done done) {
                         group.recv(p.out, p.count, p.dtype, from, tag, std::move(o),
                                    std::move(done));
                       });
}

WorkPtr ReducerBackend::recvAnysource(Tensors& tensors, int tag) {
  Call call{OpType::RECVANYSOURCE, "reducer:recvAnySource", c10d::kUnsetTimeout};
  const auto sender = std::make_shared<std::atomic<int>>(-1);
  call.source = sender;
  const Arguments check = arguments(call);
  return launchReceive(
      std::move(call), tensors,
      [sender, tag = check.tag(tag)](Group& group, const Part& p, CallOptions o, Done done) {
        group.recvAny(p.out, p.count, p.dtype, tag, std::move(o),
                      [sender, done = std::move(done)](const Status& status, Rank from) {
                        if (status.ok()) *sender = from;
                        done(status);
                      });
      });
}

}  // namespace reducer::torch_backend
