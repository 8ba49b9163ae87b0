// all_reduce of sparse tensors (COO): ranks have different numbers of entries, so the first step
// tells the sizes, and the second moves all entries to all ranks, which add them in rank order.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <array>
#include <cstring>
#include <utility>

#include "torch/backend.h"

namespace reducer::torch_backend {
namespace {

using collective::CallOptions;

constexpr std::size_t kDimsMax = 12;
// sparse dimensions, dense dimensions, dtype, entries, sizes
constexpr std::size_t kFacts = 4 + kDimsMax;
using Facts = std::array<std::int64_t, kFacts>;

/// Everything of one call, until it ends.
struct SparseCall {
  at::Tensor target;   // the caller's; let go on the completion thread
  at::Tensor indices;  // contiguous, on the host
  at::Tensor values;
  Facts facts{};
  std::vector<Facts> all;                        // by rank
  std::vector<std::uint8_t> mine;                // indices, then values
  std::vector<std::vector<std::uint8_t>> parts;  // by rank
};

/// Bytes of one rank's entries; equal shapes have equal entries, and a rank may have none itself.
std::size_t bytesOf(const SparseCall& call, const Facts& facts) {
  std::size_t values = call.values.element_size();
  for (std::int64_t d = 0; d < facts[1]; ++d) values *= facts[4 + facts[0] + d];
  return static_cast<std::size_t>(facts[3]) * (sizeof(std::int64_t) * facts[0] + values);
}

std::string describe(const Facts& facts) {
  std::string text = "(";
  for (std::int64_t d = 0; d < facts[0] + facts[1]; ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(facts[4 + d]);
  }
  return text + "), " + std::to_string(facts[0]) + " of them sparse, " +
         c10::toString(static_cast<at::ScalarType>(facts[2]));
}

/// All ranks see the same facts, and so come to the same verdict.
Status compare(const SparseCall& call) {
  for (std::size_t r = 1; r < call.all.size(); ++r) {
    Facts a = call.all[0];
    Facts b = call.all[r];
    a[3] = b[3] = 0;
    if (a == b) continue;
    return Status(Code::kMismatch, "all_reduce of sparse tensors: rank 0 has the sizes " +
                                       describe(call.all[0]) + ", rank " + std::to_string(r) +
                                       " has " + describe(call.all[r]) +
                                       "; all ranks must have equal ones");
  }
  return {};
}

/// The sum in rank order.
at::Tensor sumOf(const SparseCall& call) {
  at::Tensor total;
  for (std::size_t r = 0; r < call.all.size(); ++r) {
    const Facts& facts = call.all[r];
    const std::int64_t entries = facts[3];
    std::vector<std::int64_t> values_sizes{entries};
    for (std::int64_t d = 0; d < facts[1]; ++d) values_sizes.push_back(facts[4 + facts[0] + d]);
    const at::Tensor indices = at::empty({facts[0], entries}, at::kLong);
    const at::Tensor values = at::empty(values_sizes, call.values.scalar_type());
    const std::uint8_t* bytes = call.parts[r].data();
    if (entries > 0) {
      std::memcpy(indices.mutable_data_ptr(), bytes, indices.nbytes());
      std::memcpy(values.mutable_data_ptr(), bytes + indices.nbytes(), values.nbytes());
    }
    const at::IntArrayRef sizes(facts.data() + 4, facts[0] + facts[1]);
    at::Tensor one = at::_sparse_coo_tensor_unsafe(
        indices, values, sizes, values.options().layout(at::kSparse), /*is_coalesced=*/true);
    total = total.defined() ? total.add_(one).coalesce() : one;
  }
  return total;
}

}  // namespace

WorkPtr ReducerBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  Call call{c10d::OpType::_ALLREDUCE_SPARSE, "reducer:all_reduce_sparse", options.timeout, false,
            tensors};
  const Arguments check = arguments(call);
  const at::Tensor& tensor = check.single("tensors", tensors);
  TORCH_CHECK_TYPE(tensor.defined() && tensor.layout() == at::kSparse, check.prefix(),
                   "tensor is no sparse tensor (COO)");
  TORCH_CHECK_VALUE(options.reduceOp == c10d::ReduceOp::SUM, check.prefix(),
                    "only SUM is supported on sparse tensors");
  TORCH_CHECK_VALUE(tensor.dim() <= static_cast<std::int64_t>(kDimsMax), check.prefix(),
                    "a sparse tensor of ", tensor.dim(), " dimensions; at most ", kDimsMax,
                    " are supported");
  const std::shared_ptr<Session> session = this->session();
  const auto state = std::make_shared<SparseCall>();
  {
    const at::NoGradGuard no_grad;
    const at::Tensor mine = tensor.detach().coalesce();
    state->target = tensor;
    state->indices = mine.indices().cpu().contiguous();
    state->values = mine.values().cpu().contiguous();
    state->facts = {mine.sparse_dim(), mine.dense_dim(),
                    static_cast<std::int64_t>(mine.scalar_type()), mine._nnz()};
    for (std::int64_t d = 0; d < mine.dim(); ++d) state->facts[4 + d] = mine.size(d);
  }
  state->all.resize(size_);

  call.timeout = timeoutOr(call.timeout) + Milliseconds(ephemeral_ms_.exchange(0));
  const auto work = makeWork(call, nullptr, 1);
  CallOptions first;
  first.timeout = call.timeout;
  first.keepalive = state;
  first.canceller = call.canceller;
  first.shown_as = Collective::kSparseAllReduce;
  const CallOptions second = first;
  first.number = std::make_shared<std::atomic<std::uint64_t>>();
  const Done done = ending(work);

  const Done added = [state, work, done, completions = shared_.completions](const Status& status) {
    completions->post([state, work, done, status]() mutable {
      Status result = status;
      if (status.ok()) {
        try {
          const at::NoGradGuard no_grad;
          const at::AutoDispatchBelowADInplaceOrView below_autograd;
          state->target.copy_(sumOf(*state));
          work->setOutputs({aliasOf(state->target)});
        } catch (const std::exception& error) {
          result = Status(Code::kInternal, "the sum of sparse tensors: " + textOf(error));
        }
      }
      state->target.reset();
      done(result);
    });
  };
  const auto move = [weak = std::weak_ptr(session), done, state, added, size = size_,
                     rank = rank_](CallOptions step) {
    // The transport's threads may let go of this, and must not be the ones that end the session.
    const std::shared_ptr<Session> alive = weak.lock();
    if (!alive) return done(Status(Code::kAborted, "the group was destroyed"));
    std::vector<std::size_t> counts;
    std::vector<void*> outs;
    state->mine.resize(bytesOf(*state, state->facts));
    if (!state->mine.empty()) {
      std::memcpy(state->mine.data(), state->indices.const_data_ptr(), state->indices.nbytes());
      std::memcpy(state->mine.data() + state->indices.nbytes(), state->values.const_data_ptr(),
                  state->values.nbytes());
    }
    for (int r = 0; r < size; ++r) {
      counts.push_back(bytesOf(*state, state->all[r]));
      outs.push_back(state->parts.emplace_back(counts.back()).data());
    }
    alive->group->allGather(state->mine.data(), outs, counts, DataType::kUInt8, std::move(step),
                            added);
  };
  LaunchQueue::Launch launch;
  launch.start = [=, completions = shared_.completions](const Status&) {
    std::vector<void*> outs;
    for (Facts& facts : state->all) outs.push_back(facts.data());
    session->group->allGather(state->facts.data(), outs,
                              std::vector<std::size_t>(outs.size(), kFacts), DataType::kInt64,
                              first, [=](const Status& status) {
                                completions->post([=] {
                                  const Status verdict = status.ok() ? compare(*state) : status;
                                  if (verdict.ok()) {
                                    CallOptions step = second;
                                    step.second_step = *first.number;
                                    return move(std::move(step));
                                  }
                                  state->target.reset();
                                  done(verdict);
                                });
                              });
  };
  shared_.launches->launch(std::move(launch));
  return enroll(work);
}

}  // namespace reducer::torch_backend
