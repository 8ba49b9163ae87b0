// Whole jobs on the model of NICs: the bounds of docs/algorithms.md, the sum, determinism.
#include "simulate/simulation.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace reducer::simulate {
namespace {

using namespace std::chrono_literals;
using collective::Algorithm;

constexpr double kLine = 125e6 * 1448 / 1514;  // of 1 Gbit/s, in bytes
constexpr std::size_t kLarge = std::size_t{64} << 20;

SimulationOptions jobOf(Algorithm algorithm, std::int32_t workers, std::int32_t reducers) {
  SimulationOptions options;
  options.workers = workers;
  options.reducers = reducers;
  options.settings.algorithm = algorithm;
  options.nic.bytes_per_second = 125e6;
  return options;
}

Measurement measured(const SimulationOptions& options, std::size_t nbytes, int iterations = 2) {
  auto job = Simulation::create(options, {});
  EXPECT_TRUE(job.ok()) << job.status().message();
  if (!job.ok()) return {};
  auto result = job.value()->measure(nbytes, iterations, {});
  EXPECT_TRUE(result.ok()) << result.status().message();
  return result.ok() ? std::move(result).value() : Measurement();
}

/// Bandwidth of the last all-reduce, of the line's.
double lineShare(const Measurement& measurement, std::size_t nbytes) {
  return static_cast<double>(nbytes) / measurement.seconds.back() / kLine;
}

TEST(Simulation, DirectServerAndRingReachTheirBounds) {
  const double ring = 8.0 / 14;
  const Measurement direct = measured(jobOf(Algorithm::kDirect, 8, 0), kLarge);
  EXPECT_GT(lineShare(direct, kLarge), 0.97 * ring);
  EXPECT_LT(lineShare(direct, kLarge), 1.005 * ring);
  EXPECT_GT(direct.nic.share, 0.97);
  EXPECT_FALSE(direct.nic.reducer);
  EXPECT_GT(lineShare(measured(jobOf(Algorithm::kRing, 8, 0), kLarge), kLarge), 0.97 * ring);
  const Measurement server = measured(jobOf(Algorithm::kServer, 8, 8), kLarge);
  EXPECT_GT(lineShare(server, kLarge), 0.96);
  EXPECT_LT(lineShare(server, kLarge), 1.005);
  // Half as many reducers take twice as long, and theirs are the NICs that are full.
  const Measurement half = measured(jobOf(Algorithm::kServer, 8, 4), kLarge);
  EXPECT_NEAR(lineShare(half, kLarge), 0.5, 0.02);
  EXPECT_TRUE(half.nic.reducer);
}

TEST(Simulation, MixedReachesItsBoundBetweenNoReducersAndAsManyAsWorkers) {
  // 1 + k (n - 2) / n^2 over the ring's (docs/algorithms.md).
  for (const std::int32_t k : {2, 4, 6}) {
    SCOPED_TRACE(k);
    const double bound = 8.0 / 14 * (1 + k * 6.0 / 64);
    const double share = lineShare(measured(jobOf(Algorithm::kMixed, 8, k), kLarge), kLarge);
    EXPECT_GT(share, 0.95 * bound);
    EXPECT_LT(share, 1.005 * bound);
  }
}

TEST(Simulation, WhatIsInFlightFollowsTheDelay) {
  // 25 Gbit/s and a delay of 0.5 ms each way: 3 MiB are on their way, where 1.5 MiB are enough for
  // short delays.
  SimulationOptions options = jobOf(Algorithm::kServer, 8, 8);
  options.nic.bytes_per_second *= 25;
  const Measurement near = measured(options, kLarge, 6);
  options.latency = 500us;
  const Measurement far = measured(options, kLarge, 6);
  EXPECT_GT(lineShare(near, kLarge), 0.95 * 25);
  EXPECT_GT(lineShare(far, kLarge), 0.85 * 25);
  EXPECT_GT(far.outstanding_bytes, near.outstanding_bytes * 3 / 2);
  // A window that was set is kept to.
  options.settings.window_bytes = std::size_t{3} << 19;
  EXPECT_LT(lineShare(measured(options, kLarge, 6), kLarge), 0.5 * 25);
}

TEST(Simulation, ReducersWithFasterNicsCarryMore) {
  SimulationOptions options = jobOf(Algorithm::kServer, 8, 4);
  options.reducer_bytes_per_second = 2 * options.nic.bytes_per_second;
  EXPECT_GT(lineShare(measured(options, kLarge), kLarge), 0.95);
}

TEST(Simulation, SmallTensorsTakeTwoLatencies) {
  SimulationOptions options = jobOf(Algorithm::kServer, 4, 2);
  options.latency = 1ms;
  const Measurement small = measured(options, 4);
  EXPECT_GT(small.seconds.back(), 2.0e-3);
  EXPECT_LT(small.seconds.back(), 2.1e-3);
  // Four pushes and four results, of one all-reduce at one owner, of the next at the other.
  EXPECT_EQ(small.frames, 8.0 / 2);
}

TEST(Simulation, SumsAreThoseOfTheRealCodeWhateverTheJob) {
  for (const Algorithm algorithm :
       {Algorithm::kDirect, Algorithm::kServer, Algorithm::kMixed, Algorithm::kRing}) {
    for (const std::size_t nbytes : {std::size_t{0}, std::size_t{4}, std::size_t{300'004}}) {
      SCOPED_TRACE(std::string(nameOf(algorithm)) + " " + std::to_string(nbytes));
      SimulationOptions options = jobOf(algorithm, 5, algorithm == Algorithm::kRing ? 0 : 2);
      options.check = true;
      options.jitter = 50us;
      const Measurement result = measured(options, nbytes);
      EXPECT_EQ(result.wrong, 0u);
      EXPECT_EQ(result.seconds.size(), 2u);
    }
  }
}

TEST(Simulation, TheSameSeedGivesTheSameTimesAndAnotherOneOthers) {
  SimulationOptions options = jobOf(Algorithm::kMixed, 6, 3);
  options.jitter = 100us;
  const auto times = [&] { return measured(options, 1 << 20).seconds; };
  const auto first = times();
  EXPECT_EQ(times(), first);
  options.seed = 2;
  EXPECT_NE(times(), first);
}

TEST(Simulation, AProcessorMayBeTheLimit) {
  SimulationOptions options = jobOf(Algorithm::kServer, 8, 8);
  options.processor.cores = 1;
  options.processor.ns_per_byte = 16;  // twice what the line takes, at each of two ends
  const Measurement slow = measured(options, kLarge / 8);
  EXPECT_GT(slow.processor.share, 0.9);
  EXPECT_LT(slow.nic.share, 0.4);
}

TEST(Simulation, TellsWhatAnOwnerPromisesAndHowManyConnectionsThereAre) {
  auto job = Simulation::create(jobOf(Algorithm::kServer, 6, 3), {});
  ASSERT_TRUE(job.ok());
  const Shape shape = job.value()->shape();
  EXPECT_EQ(shape.algorithm, Algorithm::kServer);
  EXPECT_EQ(shape.worker_connections, 3u + 5u) << "rank 0 keeps the list of lost reducers";
  EXPECT_EQ(shape.reducer_connections, 6u);
  EXPECT_EQ(shape.window_bytes, 3u << 20);
  EXPECT_EQ(shape.promised_bytes, 6u * ((2u << 20) + (128u << 10)));
}

TEST(Simulation, WrongOptionsAreRefusedAndARunCanBeStopped) {
  SimulationOptions options = jobOf(Algorithm::kServer, 4, 0);
  const auto refused = [&] { return Simulation::create(options, {}).status().code(); };
  EXPECT_EQ(refused(), Code::kInvalidArgument);
  options = jobOf(Algorithm::kDirect, 0, 0);
  EXPECT_EQ(refused(), Code::kInvalidArgument);
  options = jobOf(Algorithm::kDirect, 5000, 0);
  EXPECT_EQ(refused(), Code::kInvalidArgument);
  options = jobOf(Algorithm::kDirect, 4, 0);
  options.nic.bytes_per_second = 0;
  EXPECT_EQ(refused(), Code::kInvalidArgument);

  auto job = Simulation::create(jobOf(Algorithm::kDirect, 16, 0), {});
  ASSERT_TRUE(job.ok());
  auto stopped = job.value()->measure(kLarge, 1, [] { return false; });
  EXPECT_EQ(stopped.status().code(), Code::kAborted);
}

}  // namespace
}  // namespace reducer::simulate
