// Clusters whose ranks share hosts: ranks as threads' groups in one process, real shared memory,
// the simulated network in real time.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "sim_cluster.h"

namespace reducer::testing {

using collective::Algorithm;
using collective::CallOptions;
using collective::Carrier;

inline constexpr auto kPatience = std::chrono::seconds(30);

inline const std::vector<std::vector<std::string>> kPlaces = {
    {"a", "a", "b", "b"},
    {"a", "b", "a", "b"},
    {"a", "a", "a", "b", "b", "c"},
    {"a", "b", "c", "b", "c", "b", "b"},
};

inline ClusterOptions clusterOf(const std::vector<std::string>& places, const Topology& topology) {
  ClusterOptions options;
  options.workers = static_cast<std::int32_t>(places.size());
  options.servers = topology.servers;
  options.places = places;
  options.settings.algorithm = topology.algorithm;
  options.settings.chunk_bytes = 4096;
  options.settings.window_bytes = 32768;
  options.sim.threads = 3;
  options.sim.latency_min = std::chrono::microseconds(0);
  options.sim.latency_max = std::chrono::microseconds(200);
  return options;
}

/// The ends of several ranks' operations.
class Ends {
 public:
  explicit Ends(std::size_t count) : statuses_(count), done_(count) {}

  collective::Done of(std::size_t index) {
    return [this, index](const Status& status) {
      const std::lock_guard lock(mutex_);
      EXPECT_FALSE(done_[index]) << "an operation ended twice";
      done_[index] = true;
      statuses_[index] = status;
      changed_.notify_all();
    };
  }
  bool wait(std::chrono::milliseconds patience = kPatience) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, patience, [&] {
      return std::find(done_.begin(), done_.end(), false) == done_.end();
    });
  }
  bool ended(std::size_t index) {
    const std::lock_guard lock(mutex_);
    return done_[index];
  }
  Status status(std::size_t index) {
    const std::lock_guard lock(mutex_);
    return statuses_[index];
  }
  void expectOk() {
    for (std::size_t i = 0; i < statuses_.size(); ++i) {
      EXPECT_TRUE(status(i).ok()) << i << ": " << status(i).message();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Status> statuses_;
  std::vector<bool> done_;
};

using Memory = std::vector<std::byte>;

inline std::vector<Memory> anyInputs(std::size_t ranks, DataType dtype, std::size_t count,
                                     std::mt19937& random) {
  std::vector<Memory> inputs(ranks, Memory(count * sizeOf(dtype)));
  std::normal_distribution<float> normal;
  for (Memory& input : inputs) {
    if (dtype == DataType::kFloat32) {
      for (std::size_t i = 0; i < count; ++i) {
        const float value = normal(random) * std::pow(10.0f, static_cast<float>(random() % 7));
        std::memcpy(input.data() + i * sizeof value, &value, sizeof value);
      }
    } else {
      for (std::byte& byte : input) byte = static_cast<std::byte>(random() & 0x3F);
    }
  }
  return inputs;
}

inline Memory sumOf(const std::vector<std::string>& places, const std::vector<Memory>& inputs,
                    DataType dtype, ReduceOp op) {
  std::vector<Payload> payloads;
  for (const Memory& input : inputs) payloads.emplace_back(Bytes(input), nullptr);
  Memory sum(inputs[0].size());
  engine::sumByHost(Placement::fromPlaces(places, static_cast<Rank>(places.size())), dtype, op,
                    payloads, sum.data());
  return sum;
}

using Floats = std::shared_ptr<std::vector<std::vector<float>>>;

inline Floats floats(std::size_t ranks, std::size_t count, float value) {
  return std::make_shared<std::vector<std::vector<float>>>(ranks, std::vector<float>(count, value));
}

/// What failed may still be read a little later.
inline CallOptions kept(const Floats& data,
                        std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
  CallOptions options = within(timeout);
  options.keepalive = data;
  return options;
}

}  // namespace reducer::testing
