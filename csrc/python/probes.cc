#include "python/probes.h"

#include <algorithm>

#include "common/check.h"

namespace reducer::python {

namespace {

// Large vectors begin at the same offset of a page, so that every line of one falls into the same
// cache set as that of all others; chunks that came over a network do not. Each begins here a page
// and a line further than the one before.
constexpr std::size_t kStagger = (4096 + 64) / sizeof(float);

}  // namespace

EngineProbe::EngineProbe(int ranks, std::size_t chunk_bytes, std::size_t buffer_bytes)
    : chunk_bytes_(chunk_bytes), nbytes_(buffer_bytes) {
  for (int rank = 0; rank < ranks; ++rank) {
    buffers_.push_back(std::make_shared<std::vector<float>>(
        buffer_bytes / sizeof(float) + static_cast<std::size_t>(rank) * kStagger, 1.0f));
    workers_.push_back(std::make_shared<Worker>());
    wire::Hello hello;
    hello.job = "0123456789abcdef";
    hello.rank = rank;
    hello.world_size = ranks;
    engine::Actions none;
    engine_.join(workers_.back(), hello, nullptr, none);
  }
}

std::uint64_t EngineProbe::run() {
  wire::Frame frame;
  frame.call.op = ReduceOp::kSum;
  frame.call.dtype = DataType::kFloat32;
  frame.call.count = nbytes_ / sizeof(float);
  frame.slot.seq = seq_++;
  for (std::size_t at = 0; at < nbytes_; at += chunk_bytes_, ++frame.slot.chunk) {
    frame.offset = at;
    frame.length = std::min(chunk_bytes_, nbytes_ - at);
    for (std::size_t rank = 0; rank < workers_.size(); ++rank) {
      const auto* bytes =
          reinterpret_cast<const std::byte*>(buffers_[rank]->data() + rank * kStagger) + at;
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
  return (workers_.size() + 1) * nbytes_;
}

AddProbe::AddProbe(std::size_t buffer_bytes)
    : count_(buffer_bytes / sizeof(float)), a_(count_, 1.0f), b_(count_ + kStagger, 1.0f) {}

std::uint64_t AddProbe::run() {
  float* __restrict a = a_.data();
  const float* __restrict b = b_.data() + kStagger;
  for (std::size_t i = 0; i < count_; ++i) a[i] += b[i];
  return 3 * count_ * sizeof(float);
}

}  // namespace reducer::python
