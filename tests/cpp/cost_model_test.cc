#include "collective/cost_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "collective/probe.h"
#include "sim_cluster.h"

namespace reducer::testing {
namespace {

using collective::Algorithm;
using collective::CostModel;
using collective::Costs;
using collective::Estimate;
using collective::Nics;
using collective::Parts;
using collective::Sample;
using collective::Settings;
using collective::ShardMap;
using collective::SizeRange;

Parts partsOf(Algorithm algorithm, std::uint32_t n, std::uint32_t k, std::uint64_t nbytes) {
  return collective::partsOf(algorithm, ShardMap(algorithm, n, k, 0, 0), Nics::equal(n, k), nbytes);
}

TEST(Parts, AreThoseOfTheFormulas) {
  const std::uint64_t size = 64 << 20;
  const auto s = static_cast<double>(size);
  EXPECT_NEAR(partsOf(Algorithm::kDirect, 8, 0, size).wire_bytes, 1.75 * s, 1);
  EXPECT_NEAR(partsOf(Algorithm::kRing, 8, 0, size).wire_bytes, 1.75 * s, 1);
  // S, and one round more: the last goes down when nothing goes up any more.
  const double rounds =
      static_cast<double>(ShardMap(Algorithm::kServer, 8, 8, 0, 0).plan(size, 0).rounds);
  EXPECT_NEAR(partsOf(Algorithm::kServer, 8, 8, size).wire_bytes, s * (1 + 1 / rounds), 1);
  EXPECT_NEAR(partsOf(Algorithm::kServer, 8, 4, size).wire_bytes, 2 * s, 0.05 * s);
  const double d = 8 * 8 + 4 * 8 - 2 * 4;
  EXPECT_NEAR(partsOf(Algorithm::kMixed, 8, 4, size).wire_bytes, 2 * 8 * 7 / d * s, 0.03 * s);
}

TEST(Parts, OfASmallCallAreFramesOfOneOwner) {
  const Parts direct = partsOf(Algorithm::kDirect, 8, 0, 4);
  EXPECT_EQ(direct.frames, 14);  // in from 7 others, out to 7 others
  EXPECT_EQ(direct.messages, 2);
  EXPECT_EQ(partsOf(Algorithm::kServer, 8, 8, 4).frames, 16);
  EXPECT_EQ(partsOf(Algorithm::kRing, 8, 0, 4).messages, 16);
  EXPECT_EQ(partsOf(Algorithm::kDirect, 1, 0, 1 << 20).frames, 0);
  EXPECT_EQ(partsOf(Algorithm::kDirect, 1, 0, 1 << 20).wire_bytes, 0);
}

TEST(Parts, ASlowNicCountsMore) {
  Nics nics = Nics::equal(4, 0);
  const ShardMap map(ownerWeights(Algorithm::kDirect, nics), 0, 0);
  const double before = collective::partsOf(Algorithm::kDirect, map, nics, 1 << 20).wire_bytes;
  nics.hosts = {4, 4, 4, 1};
  EXPECT_NEAR(collective::partsOf(Algorithm::kDirect, map, nics, 1 << 20).wire_bytes, 4 * before,
              1);
}

Sample sampleOf(Algorithm algorithm, std::uint32_t n, std::uint32_t k, std::uint64_t nbytes,
                double seconds) {
  Sample sample;
  sample.algorithm = algorithm;
  sample.ranks = sample.hosts = n;
  sample.servers = k;
  sample.nbytes = nbytes;
  sample.nanoseconds = static_cast<std::uint64_t>(1e9 * seconds);
  return sample;
}

TEST(CostModel, FindsTheCostsThatMadeTheTimes) {
  const Costs costs{20e-6, 3e-6, 8e-9, 0.3e-9};
  Settings settings;
  for (const Algorithm algorithm : {Algorithm::kDirect, Algorithm::kMixed, Algorithm::kServer}) {
    for (const std::uint64_t nbytes : {1u << 10, 32u << 10, 256u << 10, 2u << 20}) {
      settings.samples.push_back(
          sampleOf(algorithm, 8, 4, nbytes, costs.times(partsOf(algorithm, 8, 4, nbytes)).sum()));
    }
  }
  const CostModel model(settings, Nics::equal(8, 4));
  for (const std::uint64_t nbytes : {4u, 4096u, 100'000u, 1u << 20, 64u << 20}) {
    for (const Estimate& one : model.estimates(nbytes)) {
      const double expected = costs.times(partsOf(one.way.algorithm, 8, 4, nbytes)).sum();
      EXPECT_NEAR(one.seconds, expected, 0.08 * expected) << nbytes;
    }
  }
  // The same costs, another shape: a part of these hosts.
  const CostModel part(settings, Nics::equal(3, 4));
  for (const Estimate& one : part.estimates(8 << 20)) {
    const double expected = costs.times(partsOf(one.way.algorithm, 3, 4, 8 << 20)).sum();
    EXPECT_NEAR(one.seconds, expected, 0.15 * expected);
  }
}

TEST(CostModel, AtMeasuredSizesTheFasterIsChosenWhateverTheModelSays) {
  // `direct` wins at 64 KiB alone, where no linear model would have it.
  Settings settings;
  for (const std::uint64_t nbytes : {1u << 10, 64u << 10, 4u << 20}) {
    const bool middle = nbytes == 64 << 10;
    settings.samples.push_back(
        sampleOf(Algorithm::kDirect, 4, 4, nbytes, (middle ? 0.5 : 2) * 1e-8 * nbytes + 1e-4));
    settings.samples.push_back(sampleOf(Algorithm::kMixed, 4, 4, nbytes, 1e-8 * nbytes + 1e-4));
  }
  settings.samples[0].nanoseconds *= 2;
  const Nics nics = Nics::equal(4, 4);
  const CostModel model(settings, nics);
  const auto ranges = model.ranges();
  const auto at = [&](std::uint64_t nbytes) {
    for (const SizeRange& range : ranges) {
      if (nbytes >= range.begin && nbytes < range.end) return range.algorithm;
    }
    return Algorithm::kAuto;
  };
  EXPECT_EQ(at(1 << 10), Algorithm::kMixed) << textOf(ranges);
  EXPECT_EQ(at(64 << 10), Algorithm::kDirect) << textOf(ranges);
  EXPECT_EQ(at(4 << 20), Algorithm::kMixed) << textOf(ranges);
  EXPECT_EQ(at(1ull << 40), Algorithm::kMixed) << textOf(ranges);
  // As text it is what REDUCER_ALGORITHM takes.
  EXPECT_EQ(collective::parseRanges(textOf(ranges)).value(), ranges);
  for (const Sample& sample : settings.samples) {
    for (const Estimate& one : model.estimates(sample.nbytes)) {
      if (one.way.algorithm == sample.algorithm) {
        EXPECT_NEAR(one.seconds, sample.seconds(), 1e-3 * sample.seconds());
      }
    }
  }
}

TEST(CostModel, AMeasuredChunkIsAWayOfItsOwn) {
  Settings settings;
  for (const std::uint64_t nbytes : {64u << 10, 4u << 20}) {
    settings.samples.push_back(sampleOf(Algorithm::kDirect, 4, 0, nbytes, 1e-8 * nbytes));
    settings.samples.push_back(sampleOf(Algorithm::kDirect, 4, 0, nbytes, 0.8e-8 * nbytes));
    settings.samples.back().chunk_bytes = 256 << 10;
  }
  const auto ranges = CostModel(settings, Nics::equal(4, 0)).ranges();
  ASSERT_EQ(textOf(ranges), "0-:direct/256KiB");
}

TEST(CostModel, ARingIsNeverChosen) {
  Settings settings;
  settings.samples = {sampleOf(Algorithm::kRing, 4, 0, 1 << 20, 1e-6),
                      sampleOf(Algorithm::kDirect, 4, 0, 1 << 20, 1)};
  EXPECT_EQ(textOf(CostModel(settings, Nics::equal(4, 0)).ranges()), "direct");
}

TEST(AutoWays, ConnectAllRanksOnlyWhereThatGains) {
  const auto names = [](std::uint32_t n, std::uint32_t k) {
    std::string text;
    for (const SizeRange& way : collective::autoWays(Nics::equal(n, k)))
      text += std::string(nameOf(way.algorithm)) + " ";
    return text;
  };
  EXPECT_EQ(names(4, 0), "direct ");
  EXPECT_EQ(names(200, 0), "direct ");
  EXPECT_EQ(names(8, 4), "direct mixed server ");
  EXPECT_EQ(names(8, 8), "direct mixed ");
  EXPECT_EQ(names(200, 200), "mixed ");
  EXPECT_EQ(names(200, 100), "direct mixed server ") << "all are connected anyway";
}

// ------------------------------------------------------------------ in a group

TEST(Probe, AllRanksMeasureTheSameAndGoByIt) {
  ClusterOptions options;
  options.workers = 3;
  options.servers = 2;
  options.settings.measures = true;
  options.sim.threads = 2;
  SimCluster cluster(options);
  EXPECT_EQ(cluster.group(0).algorithm(), Algorithm::kMixed) << "until it is measured";
  collective::ProbePlan plan;
  plan.ways = cluster.group(0).choices();
  plan.hosts = 3;
  plan.servers = 2;
  std::vector<std::vector<Sample>> samples(3);
  std::vector<std::thread> ranks;
  for (Rank r = 0; r < 3; ++r) {
    ranks.emplace_back([&, r] {
      auto found = collective::probe(cluster.group(r), plan);
      ASSERT_TRUE(found.ok()) << found.status().message();
      samples[r] = std::move(found).value();
      cluster.group(r).adopt(samples[r]);
    });
  }
  for (std::thread& rank : ranks) rank.join();
  ASSERT_GE(samples[0].size(), 3u);
  EXPECT_EQ(samples[0].size() % 3, 0u);
  EXPECT_EQ(samples[1], samples[0]);
  EXPECT_EQ(samples[2], samples[0]);
  EXPECT_EQ(textOf(cluster.group(1).ranges()), textOf(cluster.group(0).ranges()));
  const auto reasons = cluster.group(2).explain(1 << 10);
  ASSERT_EQ(reasons.size(), 3u);
  const auto chosen =
      std::count_if(reasons.begin(), reasons.end(), [](const Estimate& one) { return one.chosen; });
  EXPECT_EQ(chosen, 1);
  // And it works.
  std::vector<Outcome> outcomes(3);
  std::vector<std::int32_t> data[3];
  for (Rank r = 0; r < 3; ++r) {
    data[r].assign(100'000, r);
    cluster.group(r).allReduce(data[r].data(), data[r].data(), data[r].size(), DataType::kInt32,
                               ReduceOp::kSum, {}, outcomes[r].callback());
  }
  while (!outcomes[0].done || !outcomes[1].done || !outcomes[2].done) std::this_thread::yield();
  for (Rank r = 0; r < 3; ++r) EXPECT_EQ(data[r], std::vector<std::int32_t>(100'000, 3));
}

TEST(Settings, SamplesMakeAutoChooseFromTheStart) {
  ClusterOptions options;
  options.workers = 4;
  options.servers = 2;
  for (const std::uint64_t nbytes : {1u << 10, 1u << 20}) {
    const bool small = nbytes == 1 << 10;
    options.settings.samples.push_back(
        sampleOf(Algorithm::kDirect, 4, 2, nbytes, small ? 1e-4 : 2e-2));
    options.settings.samples.push_back(
        sampleOf(Algorithm::kServer, 4, 2, nbytes, small ? 2e-4 : 1e-2));
  }
  SimCluster cluster(options);
  const auto ranges = cluster.group(0).ranges();
  ASSERT_EQ(ranges.size(), 2u) << textOf(ranges);
  EXPECT_EQ(ranges[0].algorithm, Algorithm::kDirect);
  EXPECT_EQ(ranges[1].algorithm, Algorithm::kServer);
}

}  // namespace
}  // namespace reducer::testing
