#include "collective/cost_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "common/check.h"

namespace reducer::collective {
namespace {

// A way must be this much better than the one of the next smaller size to be chosen instead: no
// measurement is better than that, and a way that changes back and forth explains nothing.
constexpr double kGainMin = 0.05;

// Sizes at which the ways are compared: 1, 2, 3, 4, 6, 8, 12, 16 ... bytes to 64 GiB.
constexpr int kSizes = 73;

// With as many standalone reducers as workers, `direct` saves a small call one frame of as many as
// there are ranks, and costs every rank a connection to every other: not worth it for more of them.
constexpr std::size_t kRanksForDirect = 64;

std::uint64_t sizeAt(int step) {
  const std::uint64_t power = std::uint64_t{1} << (step / 2);
  return step % 2 == 0 ? power : power * 3 / 2;
}

std::array<double, 4> asArray(const Parts& parts) {
  return {parts.messages, parts.frames, parts.wire_bytes, parts.work_bytes};
}

/// The costs, none negative, that come nearest to all times: coordinate descent on
/// sum of (predicted / measured - 1)^2, which has one minimum.
Costs fitted(const std::vector<std::pair<Parts, double>>& measured) {
  std::vector<std::array<double, 4>> rows;
  for (const auto& [parts, seconds] : measured) {
    std::array<double, 4> row = asArray(parts);
    for (double& value : row) value /= seconds;
    rows.push_back(row);
  }
  std::array<double, 4> costs{};
  std::vector<double> left(rows.size(), 1.0);
  constexpr int kSweeps = 3000;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t j = 0; j < costs.size(); ++j) {
      double along = 0;
      double square = 0;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        along += rows[i][j] * left[i];
        square += rows[i][j] * rows[i][j];
      }
      if (square == 0) continue;
      const double next = std::max(0.0, costs[j] + along / square);
      for (std::size_t i = 0; i < rows.size(); ++i) left[i] -= rows[i][j] * (next - costs[j]);
      costs[j] = next;
    }
  }
  return {costs[0], costs[1], costs[2], costs[3]};
}

ShardMap mapOf(const SizeRange& way, const Nics& nics, const Settings& settings) {
  return {ownerWeights(way.algorithm, nics),
          way.chunk_bytes != 0 ? way.chunk_bytes : settings.chunk_bytes,
          way.window_bytes != 0 ? way.window_bytes : settings.window_bytes};
}

/// The NICs that a sample was measured on: this group's, or, of another shape, equal ones.
Nics nicsOf(const Sample& sample, const Nics& own) {
  if (sample.isOf(own.host_of_rank.size(), own.hosts.size(), own.servers.size())) return own;
  Nics nics;
  for (std::uint64_t rank = 0; rank < sample.ranks; ++rank)
    nics.host_of_rank.push_back(static_cast<std::uint32_t>(rank * sample.hosts / sample.ranks));
  nics.hosts.assign(sample.hosts, 1);
  nics.servers.assign(sample.servers, 1);
  return nics;
}

/// One that `auto` may choose: a ring's bits depend on the size.
bool isAutos(Algorithm algorithm) {
  return algorithm == Algorithm::kDirect || algorithm == Algorithm::kServer ||
         algorithm == Algorithm::kMixed;
}

bool sameWay(const SizeRange& way, const Sample& sample) {
  return way.algorithm == sample.algorithm && way.chunk_bytes == sample.chunk_bytes &&
         way.window_bytes == sample.window_bytes;
}

SizeRange wayOf(const Sample& sample) {
  return {.algorithm = sample.algorithm,
          .chunk_bytes = sample.chunk_bytes,
          .window_bytes = sample.window_bytes};
}

}  // namespace

Parts partsOf(Algorithm algorithm, const ShardMap& map, const Nics& nics, std::uint64_t nbytes) {
  const auto n = static_cast<double>(nics.host_of_rank.size());
  const auto size = static_cast<double>(nbytes);
  const std::size_t hosts = nics.hosts.size();
  Parts parts;
  if (algorithm == Algorithm::kRing) {
    const double steps = 2 * (n - 1);
    const double chunks = std::ceil(size / n / static_cast<double>(map.chunkBytes()));
    parts.messages = steps + 2;  // and the comparison before
    parts.frames = 4 * steps * std::max(1.0, chunks);
    parts.wire_bytes = steps / n * size;
    parts.work_bytes = 3 * parts.wire_bytes;
    return parts;
  }
  const Plan plan = map.plan(nbytes, 0);
  const auto rounds = static_cast<double>(plan.rounds);
  std::vector<double> owned(hosts + nics.servers.size(), 0);
  std::vector<double> owners(owned.size(), 0);
  for (std::size_t i = 0; i < plan.owners.size(); ++i) {
    const OwnerIndex owner = plan.owners[i];
    const std::size_t place =
        owner < nics.host_of_rank.size()
            ? nics.host_of_rank[owner]
            : hosts + owner - static_cast<std::size_t>(nics.host_of_rank.size());
    const auto weight = static_cast<double>(plan.before[i + 1] - plan.before[i]);
    owned[place] += size * weight / static_cast<double>(plan.before.back());
    ++owners[place];
  }
  std::vector<double> ranks(owned.size(), 0);
  for (const std::uint32_t host : nics.host_of_rank) ++ranks[host];
  double fastest = 0;
  for (const std::uint64_t bandwidth : nics.hosts)
    fastest = std::max(fastest, static_cast<double>(bandwidth));
  for (const std::uint64_t bandwidth : nics.servers)
    fastest = std::max(fastest, static_cast<double>(bandwidth));
  double up_max = 0;
  for (std::size_t place = 0; place < owned.size(); ++place) {
    const double bandwidth =
        static_cast<double>(place < hosts ? nics.hosts[place] : nics.servers[place - hosts]);
    const double pushed_out = ranks[place] * (size - owned[place]);
    const double pushed_in = (n - ranks[place]) * owned[place];
    const double through = pushed_out + pushed_in;  // and as much the other way
    const double slower = fastest / bandwidth;
    parts.wire_bytes = std::max(parts.wire_bytes, through * slower);
    up_max = std::max(up_max, std::max(pushed_out, pushed_in) * slower);
    const auto others = static_cast<double>(plan.owners.size()) - owners[place];
    parts.frames = std::max(
        parts.frames, 2 * rounds * (ranks[place] * others + (n - ranks[place]) * owners[place]));
    parts.work_bytes =
        std::max(parts.work_bytes, 2 * through + n * owned[place] + ranks[place] * size);
  }
  parts.messages = 2;
  parts.wire_bytes = std::max(parts.wire_bytes, up_max + up_max / rounds);
  return parts;
}

Result<std::vector<Sample>> samplesOf(const std::vector<SampleTuple>& tuples) {
  std::vector<Sample> samples;
  for (const auto& [name, chunk, window, ranks, hosts, servers, nbytes, nanoseconds] : tuples) {
    Result<Algorithm> algorithm = parseAlgorithm(name);
    if (!algorithm.ok()) return algorithm.status();
    if (ranks < 1 || hosts < 1 || hosts > ranks || nanoseconds < 1 ||
        (algorithm.value() == Algorithm::kServer && servers == 0) ||
        algorithm.value() == Algorithm::kAuto) {
      return Status(Code::kInvalidArgument,
                    "a measurement of '" + name + "' with " + std::to_string(ranks) + " ranks on " +
                        std::to_string(hosts) + " hosts and " + std::to_string(servers) +
                        " standalone reducers in " + std::to_string(nanoseconds) +
                        " ns is not possible");
    }
    samples.push_back(
        {algorithm.value(), chunk, window, ranks, hosts, servers, nbytes, nanoseconds});
  }
  return samples;
}

std::vector<SampleTuple> tuplesOf(const std::vector<Sample>& samples) {
  std::vector<SampleTuple> tuples;
  for (const Sample& s : samples) {
    tuples.emplace_back(nameOf(s.algorithm), s.chunk_bytes, s.window_bytes, s.ranks, s.hosts,
                        s.servers, s.nbytes, s.nanoseconds);
  }
  return tuples;
}

std::vector<SizeRange> autoWays(const Nics& nics) {
  if (nics.servers.empty()) return {{.algorithm = Algorithm::kDirect}};
  // With as many reducers as workers they are one.
  const bool same = ownerWeights(Algorithm::kMixed, nics) == ownerWeights(Algorithm::kServer, nics);
  std::vector<SizeRange> ways;
  if (!same || nics.host_of_rank.size() <= kRanksForDirect)
    ways.push_back({.algorithm = Algorithm::kDirect});
  ways.push_back({.algorithm = Algorithm::kMixed});
  if (!same) ways.push_back({.algorithm = Algorithm::kServer});
  return ways;
}

CostModel::CostModel(const Settings& settings, const Nics& nics) : nics_(nics) {
  REDUCER_CHECK(!settings.samples.empty());
  std::vector<SizeRange> ways = autoWays(nics);
  std::vector<SizeRange> measured_ways;
  std::vector<std::pair<Parts, double>> measured;
  for (const Sample& sample : settings.samples) {
    const Nics where = nicsOf(sample, nics);
    const SizeRange way = wayOf(sample);
    const Parts parts =
        partsOf(sample.algorithm, mapOf(way, where, settings), where, sample.nbytes);
    measured.emplace_back(parts, sample.seconds());
    if (where == nics && isAutos(sample.algorithm) &&
        std::none_of(measured_ways.begin(), measured_ways.end(),
                     [&](const SizeRange& known) { return sameWay(known, sample); })) {
      measured_ways.push_back(way);
    }
  }
  costs_ = fitted(measured);
  if (!measured_ways.empty()) ways.swap(measured_ways);
  for (const SizeRange& way : ways) {
    std::map<std::uint64_t, std::pair<double, int>> ratios;  // by size: their logarithms, how many
    for (std::size_t i = 0; i < measured.size(); ++i) {
      const Sample& sample = settings.samples[i];
      if (!sameWay(way, sample) || !(nicsOf(sample, nics) == nics)) continue;
      const double said = costs_.times(measured[i].first).sum();
      if (said <= 0) continue;
      auto& [sum, count] = ratios[std::max<std::uint64_t>(1, sample.nbytes)];
      sum += std::log(measured[i].second / said);
      ++count;
    }
    Way made{way, mapOf(way, nics, settings), {}};
    for (const auto& [nbytes, ratio] : ratios) {
      made.corrections.emplace_back(std::log2(static_cast<double>(nbytes)),
                                    std::exp(ratio.first / ratio.second));
    }
    ways_.push_back(std::move(made));
  }
}

double CostModel::correctionAt(const Way& way, std::uint64_t nbytes) {
  const auto& known = way.corrections;
  if (known.empty()) return 1;
  const double at = std::log2(static_cast<double>(std::max<std::uint64_t>(1, nbytes)));
  const auto above = std::lower_bound(known.begin(), known.end(), std::pair(at, 0.0));
  if (above == known.begin()) return above->second;
  const auto below = std::prev(above);
  if (above == known.end()) return below->second;
  const double part = (at - below->first) / (above->first - below->first);
  return std::exp((1 - part) * std::log(below->second) + part * std::log(above->second));
}

std::vector<Estimate> CostModel::estimates(std::uint64_t nbytes) const {
  std::vector<Estimate> all;
  for (const Way& way : ways_) {
    Estimate one;
    one.way = way.range;
    one.terms = costs_.times(partsOf(way.range.algorithm, way.map, nics_, nbytes));
    one.correction = correctionAt(way, nbytes);
    one.seconds = one.terms.sum() * one.correction;
    all.push_back(one);
  }
  return all;
}

std::vector<SizeRange> CostModel::ranges() const {
  std::vector<SizeRange> ranges;
  std::size_t chosen = 0;
  for (int step = 0; step < kSizes; ++step) {
    const std::vector<Estimate> all = estimates(sizeAt(step));
    const auto best = std::min_element(
        all.begin(), all.end(),
        [](const Estimate& a, const Estimate& b) { return a.seconds < b.seconds; });
    const bool better = best->seconds < all[chosen].seconds * (1 - kGainMin);
    if (ranges.empty()) {
      chosen = best - all.begin();
    } else if (better) {
      chosen = best - all.begin();
      ranges.back().end = sizeAt(step);
    } else {
      continue;
    }
    SizeRange range = all[chosen].way;
    range.begin = ranges.empty() ? 0 : sizeAt(step);
    range.end = SizeRange::kNoEnd;
    ranges.push_back(range);
  }
  return ranges;
}

}  // namespace reducer::collective
