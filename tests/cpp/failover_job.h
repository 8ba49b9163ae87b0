// A job that makes all kinds of calls and checks every result to the bit, for tests that lose
// reducers meanwhile.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "engine/engine.h"
#include "sim_cluster.h"

namespace reducer::testing {

using Memory = std::vector<std::byte>;

inline ClusterOptions clusterOf(collective::Algorithm algorithm, std::int32_t workers,
                                std::int32_t servers, std::uint64_t seed) {
  ClusterOptions options;
  options.workers = workers;
  options.servers = servers;
  options.settings.algorithm = algorithm;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.seed = seed;
  return options;
}

inline std::vector<Memory> anyInputs(Rank ranks, std::size_t nbytes, std::mt19937& random) {
  std::vector<Memory> inputs(static_cast<std::size_t>(ranks), Memory(nbytes));
  for (Memory& input : inputs) {
    for (std::size_t i = 0; i + 4 <= nbytes; i += 4) {
      const float value = static_cast<float>(static_cast<int>(random() % 20001) - 10000) *
                          static_cast<float>(1 << random() % 20);
      std::memcpy(input.data() + i, &value, sizeof value);
    }
  }
  return inputs;
}

inline Memory sumOf(const std::vector<Memory>& inputs) {
  std::vector<Payload> payloads;
  for (const Memory& input : inputs) payloads.emplace_back(Bytes(input), nullptr);
  Memory sum(inputs[0].size());
  engine::sumByHost(Placement(static_cast<Rank>(inputs.size())), DataType::kFloat32, ReduceOp::kSum,
                    payloads, sum.data());
  return sum;
}

/// A job in which every rank makes the same calls, each when its turn comes, in place; what is done
/// is checked and then spoilt, as a user may do.
class Job {
 public:
  Job(SimCluster& cluster, std::size_t calls, std::mt19937& random) : cluster_(cluster) {
    const Rank n = cluster.workers();
    const std::size_t counts[] = {0, 1, 300, 2'000, 9'000, 40'000};
    for (std::size_t i = 0; i < calls; ++i) {
      Call call;
      call.kind = static_cast<int>(random() % 8);
      call.count = counts[random() % 6];
      call.root = static_cast<Rank>(random() % n);
      call.inputs = anyInputs(n, call.count * 4, random);
      if (call.count > 0) call.sum = sumOf(call.inputs);
      call.data = call.inputs;
      call.ended.assign(static_cast<std::size_t>(n), 0);
      calls_.push_back(std::move(call));
    }
    next_.assign(static_cast<std::size_t>(n), 0);
    open_.assign(static_cast<std::size_t>(n), 0);
  }

  /// Makes a rank's next calls, so that it has up to `depth` of them under way.
  void feed(Rank rank, std::size_t depth) {
    while (next_[rank] < calls_.size() && open_[rank] < depth) start(rank, next_[rank]++);
  }
  bool done() const { return ended_ == calls_.size() * next_.size(); }

 private:
  struct Call {
    int kind = 0;
    std::size_t count = 0;
    Rank root = 0;
    std::vector<Memory> inputs;
    std::vector<Memory> data;
    Memory sum;
    std::vector<char> ended;
  };

  void start(Rank rank, std::size_t index) {
    Call& call = calls_[index];
    ++open_[rank];
    void* const at = call.data[rank].data();
    const auto done = [this, rank, index](const Status& status) { end(rank, index, status); };
    collective::Group& group = cluster_.group(rank);
    const collective::CallOptions options = within(std::chrono::seconds(60));
    if (call.kind == 0) {
      group.reduce(at, at, call.count, DataType::kFloat32, ReduceOp::kSum, call.root, options,
                   done);
    } else if (call.kind == 1) {
      group.broadcast(at, call.count, DataType::kFloat32, call.root, options, done);
    } else if (call.kind == 2) {
      group.barrier(options, done);
    } else {
      group.allReduce(at, at, call.count, DataType::kFloat32, ReduceOp::kSum, options, done);
    }
  }

  void end(Rank rank, std::size_t index, const Status& status) {
    Call& call = calls_[index];
    ASSERT_FALSE(call.ended[rank]) << "a call ended twice";
    call.ended[rank] = 1;
    ++ended_;
    --open_[rank];
    ASSERT_TRUE(status.ok()) << "rank " << rank << ", call " << index << ": " << status.message();
    const Memory* expected = &call.sum;
    if (call.kind == 0 && rank != call.root) expected = &call.inputs[rank];
    if (call.kind == 1) expected = &call.inputs[call.root];
    if (call.kind == 2) expected = &call.inputs[rank];
    if (call.count > 0) {
      ASSERT_TRUE(call.data[rank] == *expected)
          << "rank " << rank << ", call " << index << " of kind " << call.kind << ", " << call.count
          << " elements";
    }
    std::fill(call.data[rank].begin(), call.data[rank].end(), std::byte{0xEE});
  }

  SimCluster& cluster_;
  std::deque<Call> calls_;
  std::size_t ended_ = 0;
  std::vector<std::size_t> next_;
  std::vector<std::size_t> open_;
};

}  // namespace reducer::testing
