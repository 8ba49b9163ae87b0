#include "collective/shard_map.h"

#include <algorithm>

#include "collective/shares.h"
#include "common/check.h"
#include "common/limits.h"

namespace reducer::collective {
namespace {

// Chunk boundaries fall on multiples of this: whole elements of every type, whole cache lines of
// the tensor.
constexpr std::uint64_t kAlign = 64;

// A message is spread over one more owner for each of these bytes: below it, the cost of one more
// frame is more than the time that its bytes take on a wire.
constexpr std::uint64_t kSpreadBytes = 8192;

// A chunk with what frames it leaves as one segment of what the kernel hands a NIC at once (64 KiB
// with its headers), and larger ones as several whole segments.
constexpr std::size_t kSegment = 63 << 10;

constexpr std::size_t kSmallestAutoChunk = kSegment / 2;
constexpr std::size_t kLargestAutoChunk = 4 * kSegment;

// A chunk is such that so many of them in flight at each owner come to this much over all owners.
constexpr std::size_t kInFlight = 24 * kSegment;
constexpr std::size_t kChunksInFlight = 3;

// The bound of what a worker has in flight if nothing is set: for each owner, but not more than
// kWindow in all as long as that is enough for kChunksBound segments each. Owners promise the
// memory.
constexpr std::size_t kWindowPerOwner = 1 << 20;
constexpr std::size_t kWindow = 16 << 20;
constexpr std::size_t kChunksBound = 2 * kChunksInFlight;

// A tensor is cut into at least this many rounds if that leaves chunks of kSmallestAutoChunk: with
// one round, a NIC's two directions would be used one after the other.
constexpr std::uint64_t kRoundsMin = 4;

std::uint64_t scaled(std::uint64_t value, std::uint64_t numerator, std::uint64_t denominator) {
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(value) * numerator /
                                    denominator);
}

}  // namespace

std::uint64_t Plan::boundary(std::uint64_t of_nbytes, std::uint64_t round,
                             std::size_t position) const {
  const std::uint64_t begin = scaled(of_nbytes, round, rounds);
  const std::uint64_t end = scaled(of_nbytes, round + 1, rounds);
  const std::uint64_t at = begin + scaled(end - begin, before[position], before.back());
  return at == of_nbytes ? of_nbytes : at / kAlign * kAlign;
}

Span Plan::span(std::uint64_t of_nbytes, std::uint64_t round, std::size_t position) const {
  const std::uint64_t begin = boundary(of_nbytes, round, position);
  return {begin, boundary(of_nbytes, round, position + 1) - begin};
}

void Plan::limit(std::uint64_t chunk_bytes_max) {
  std::uint64_t weight_max = 0;
  for (std::size_t i = 0; i < owners.size(); ++i) {
    weight_max = std::max(weight_max, before[i + 1] - before[i]);
  }
  const std::uint64_t most = chunk_bytes_max - kAlign;  // aligning may add that
  rounds = std::max(rounds, (scaled(nbytes, weight_max, before.back()) + most - 1) / most);
}

Algorithm ShardMap::resolve(Algorithm algorithm, std::uint32_t k) {
  if (algorithm != Algorithm::kAuto) return algorithm;
  return k > 0 ? Algorithm::kMixed : Algorithm::kDirect;
}

ShardMap::ShardMap(Algorithm algorithm, std::uint32_t n, std::uint32_t k, std::size_t chunk_bytes,
                   std::size_t window_bytes)
    : ShardMap(ownerWeights(algorithm, Nics::equal(n, k)), chunk_bytes, window_bytes) {
  REDUCER_CHECK(algorithm != Algorithm::kAuto);
}

ShardMap::ShardMap(const std::vector<std::uint64_t>& weights, std::size_t chunk_bytes,
                   std::size_t window_bytes) {
  for (OwnerIndex i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    owners_.push_back(i);
    weights_.push_back(weights[i]);
    weight_total_ += weights[i];
    weight_max_ = std::max(weight_max_, weights[i]);
  }
  REDUCER_CHECK(!owners_.empty());
  window_set_ = window_bytes != 0;
  window_bytes_ = window_set_ ? window_bytes : std::min(owners_.size() * kWindowPerOwner, kWindow);
  if (chunk_bytes == 0) {
    const std::size_t in_flight = window_set_ ? window_bytes : kInFlight;
    const std::size_t share = scaled(in_flight, weight_max_, weight_total_) / kChunksInFlight;
    const std::size_t least = window_set_ ? kSmallestAutoChunk : kSegment;
    chunk_bytes = std::clamp(share / kSegment * kSegment, least, kLargestAutoChunk);
    const std::size_t round = scaled(kSegment, weight_total_, weight_max_);
    if (!window_set_) window_bytes_ = std::max(window_bytes_, kChunksBound * round);
  }
  chunk_bytes_ = std::clamp(chunk_bytes, kMinChunkBytes, kMaxChunkBytes - 2 * kAlign);
}

std::size_t ShardMap::windowBytes(OwnerIndex owner) const {
  const auto found = std::lower_bound(owners_.begin(), owners_.end(), owner);
  const bool owned = found != owners_.end() && *found == owner;
  const std::uint64_t weight = owned ? weights_[found - owners_.begin()] : weight_max_;
  // At least two chunks, or the wire would idle while the reducer adds.
  return std::max<std::size_t>(scaled(window_bytes_, weight, weight_total_), 2 * chunk_bytes_);
}

std::size_t ShardMap::windowBytesTotal() const {
  std::size_t total = 0;
  for (const OwnerIndex owner : owners_) total += windowBytes(owner);
  return total;
}

bool ShardMap::owns(OwnerIndex owner) const {
  return std::binary_search(owners_.begin(), owners_.end(), owner);
}

Plan ShardMap::planFrom(OwnerIndex first, std::uint64_t nbytes) const {
  const auto start = std::lower_bound(owners_.begin(), owners_.end(), first) - owners_.begin();
  Plan plan;
  plan.nbytes = nbytes;
  const std::size_t m =
      std::min<std::uint64_t>(owners_.size(), std::max<std::uint64_t>(1, nbytes / kSpreadBytes));
  plan.before.push_back(0);
  std::uint64_t weight_max = 0;
  for (std::size_t i = 0; i < m; ++i) {
    const std::size_t at = (start + i) % owners_.size();
    plan.owners.push_back(owners_[at]);
    plan.before.push_back(plan.before.back() + weights_[at]);
    weight_max = std::max(weight_max, weights_[at]);
  }
  // The owner with the largest weight gets chunks of chunk_bytes_ (aligning boundaries may add up
  // to kAlign), the others smaller ones.
  cut(plan, scaled(nbytes, weight_max, plan.before.back()));
  if (window_set_) {
    const std::uint64_t round = std::max<std::uint64_t>(1, nbytes / plan.rounds);
    plan.window_rounds = std::max<std::uint64_t>(2, window_bytes_ / round);
  }
  return plan;
}

void ShardMap::cut(Plan& plan, std::uint64_t largest) const {
  const std::uint64_t needed = (largest + chunk_bytes_ - 1) / chunk_bytes_;
  plan.rounds =
      std::max({std::uint64_t{1}, needed, std::min(kRoundsMin, largest / kSmallestAutoChunk)});
  plan.full_chunks = largest > (plan.rounds - 1) * chunk_bytes_;
}

Plan ShardMap::planFor(OwnerIndex owner, std::uint64_t nbytes) const {
  Plan plan;
  plan.nbytes = nbytes;
  plan.owners = {owner};
  plan.before = {0, 1};
  cut(plan, nbytes);
  return plan;
}

}  // namespace reducer::collective
