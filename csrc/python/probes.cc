#include "python/probes.h"

#include <algorithm>

#include "common/check.h"

namespace reducer::python {

EngineProbe::EngineProbe(int ranks, std::size_t chunk_bytes, std::size_t buffer_bytes)
    : chunk_bytes_(chunk_bytes) {
  for (int rank = 0; rank < ranks; ++rank) {
    buffers_.push_back(std::make_shared<std::vector<float>>(buffer_bytes / sizeof(float), 1.0f));
    workers_.push_back(std::make_shared<Worker>());
    wire::Hello hello;
    hello.job = "0123456789abcdef";
    hello.rank = rank;
    hello.world_size = ranks;
    engine_.join(workers_.back(), hello);
  }
}

std::uint64_t EngineProbe::run() {
  const std::size_t nbytes = buffers_[0]->size() * sizeof(float);
  wire::Frame frame;
  frame.call.op = ReduceOp::kSum;
  frame.call.dtype = DataType::kFloat32;
  frame.call.count = nbytes / sizeof(float);
  frame.slot.seq = seq_++;
  for (std::size_t at = 0; at < nbytes; at += chunk_bytes_, ++frame.slot.chunk) {
    frame.offset = at;
    frame.length = std::min(chunk_bytes_, nbytes - at);
    for (std::size_t rank = 0; rank < workers_.size(); ++rank) {
      const auto* bytes = reinterpret_cast<const std::byte*>(buffers_[rank]->data()) + at;
      engine::Actions actions;
      const Status status =
          engine_.onPush(workers_[rank], frame, Payload(Bytes(bytes, frame.length), buffers_[rank]),
                         TimePoint(), actions);
      REDUCER_CHECK(status.ok());
      for (engine::Ready& ready : actions.ready) {
        const auto replies = engine::settle(std::move(ready), *pool_);
        REDUCER_CHECK(replies.size() == workers_.size());
      }
    }
  }
  return (workers_.size() + 1) * nbytes;
}

AddProbe::AddProbe(std::size_t buffer_bytes)
    : a_(buffer_bytes / sizeof(float), 1.0f), b_(buffer_bytes / sizeof(float), 1.0f) {}

std::uint64_t AddProbe::run() {
  float* __restrict a = a_.data();
  const float* __restrict b = b_.data();
  for (std::size_t i = 0; i < a_.size(); ++i) a[i] += b[i];
  return 3 * a_.size() * sizeof(float);
}

}  // namespace reducer::python
