#include "collective/two_level.h"

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/limits.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

constexpr std::uint64_t kAlign = 64;

// Of all ranks of a host together in shared memory, at most; and of a segment.
constexpr std::size_t kHostBytesMax = std::size_t{64} << 20;
constexpr std::size_t kSegmentBytesMax = std::size_t{1} << 20;

// Cursor::transfer: of the empty chunk; streams are counted from 0.
constexpr std::uint32_t kShow = std::numeric_limits<std::uint32_t>::max();

/// Boundary i of n parts of `nbytes`, on whole cache lines, and so on whole elements.
std::uint64_t boundary(std::uint64_t nbytes, std::uint64_t i, std::uint64_t n) {
  if (i == n) return nbytes;
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(nbytes) * i / n) / kAlign *
         kAlign;
}

std::uint64_t mixed(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0xBF58476D1CE4E5B9ULL;
  return hash ^ (hash >> 31);
}

std::uint64_t fingerprintOf(const wire::Call& call, std::uint64_t nbytes) {
  std::uint64_t hash = 0x9E3779B97F4A7C15ULL;
  for (const std::uint64_t value :
       {static_cast<std::uint64_t>(call.collective), static_cast<std::uint64_t>(call.op),
        static_cast<std::uint64_t>(call.dtype), static_cast<std::uint64_t>(call.codec),
        static_cast<std::uint64_t>(call.root), call.count, nbytes}) {
    hash = mixed(hash, value);
  }
  return hash;
}

}  // namespace

std::size_t segmentBytes(const Placement& placement, std::size_t chunk_bytes) {
  const auto ranks = static_cast<std::size_t>(placement.widest());
  std::size_t most = std::min(kSegmentBytesMax, kHostBytesMax / kSegmentsInFlight / ranks);
  if (chunk_bytes != 0) most = std::min(most, 4 * ranks * chunk_bytes);
  return std::max<std::size_t>(most / kAlign * kAlign, kMinChunkBytes);
}

TwoLevel::TwoLevel(Info info, const Shape& shape, const std::byte* in, std::byte* out)
    : Operation(std::move(info)),
      nbytes_(shape.nbytes),
      in_(in),
      out_(out),
      shares_(shape.placement->widest()),
      alone_(shape.placement->ranksOf(shape.placement->hostOf(shape.rank)).size() == 1) {
  REDUCER_CHECK(nbytes_ > 0);
  const Placement& placement = *shape.placement;
  for (Rank share = 0; share < shares_; ++share) {
    if (placement.carries(shape.rank, share)) carried_.push_back(share);
  }
  segments_ = (nbytes_ + shape.segment_bytes - 1) / shape.segment_bytes;
  fingerprint_ = fingerprintOf(this->info().call, nbytes_);
  // Cut for the longest share of all (aligning boundaries may add up to kAlign, twice).
  const std::uint64_t longest =
      (nbytes_ + segments_ - 1) / segments_ / static_cast<std::uint64_t>(shares_) + 2 * kAlign;
  plan_ = shape.rails->plan(longest, this->info().seq);
  const auto hosts = static_cast<OwnerIndex>(placement.hosts());
  for (std::uint32_t position = 0; position < plan_.owners.size(); ++position) {
    const OwnerIndex planned = plan_.owners[position];
    for (const Rank share : carried_) {
      // A rail's part that a host owns is its carrier's: what that one pushes stays in its process.
      const OwnerIndex owner =
          planned < hosts
              ? static_cast<OwnerIndex>(placement.carrier(static_cast<Rank>(planned), share))
              : planned - hosts + static_cast<OwnerIndex>(placement.worldSize());
      auto stream = std::find_if(streams_.begin(), streams_.end(),
                                 [owner](const Stream& s) { return s.owner == owner; });
      if (stream == streams_.end()) {
        stream = streams_.insert(streams_.end(), Stream{owner, position, {}});
        owners_.push_back(owner);
      }
      stream->shares.push_back(share);
    }
  }
}

std::vector<std::pair<OwnerIndex, Cursor>> TwoLevel::cursors(OwnerIndex coordinator) {
  std::vector<std::pair<OwnerIndex, Cursor>> cursors;
  cursors.emplace_back(coordinator, Cursor{shared_from_this(), kShow, 0, 0, 1});
  for (std::uint32_t i = 0; i < streams_.size(); ++i) {
    const std::uint64_t rounds = segments_ * streams_[i].shares.size() * plan_.rounds;
    cursors.emplace_back(streams_[i].owner, Cursor{shared_from_this(), i, 0, 0, rounds});
  }
  return cursors;
}

// By segment, and within it by share: every rank that carries two shares to one owner has them in
// the same order, and the oldest piece of all waits for nothing that is behind another.
TwoLevel::At TwoLevel::at(const Stream& stream, std::uint64_t round) const {
  const std::uint64_t of_segment = stream.shares.size() * plan_.rounds;
  const std::uint64_t rest = round % of_segment;
  return {round / of_segment, stream.shares[rest / plan_.rounds], rest % plan_.rounds};
}

Span TwoLevel::segment(std::uint64_t index) const {
  const std::uint64_t begin = boundary(nbytes_, index, segments_);
  return {begin, boundary(nbytes_, index + 1, segments_) - begin};
}

Span TwoLevel::share(std::uint64_t segment, Rank share) const {
  const std::uint64_t nbytes = this->segment(segment).length;
  const std::uint64_t begin = boundary(nbytes, share, shares_);
  return {begin, boundary(nbytes, share + 1, shares_) - begin};
}

bool TwoLevel::ready(const Cursor& cursor) const {
  if (alone_ || cursor.transfer == kShow) return true;
  return at(streams_[cursor.transfer], cursor.round).segment < segmentsSummed();
}

Piece TwoLevel::piece(std::uint32_t transfer, std::uint32_t /*position*/, std::uint64_t round) {
  Piece piece;
  piece.frame = frame();
  if (transfer == kShow) return piece;
  const Stream& stream = streams_[transfer];
  const auto [index, share, within] = at(stream, round);
  const Span of_segment = segment(index);
  const Span of_share = this->share(index, share);
  const Span span = plan_.span(of_share.length, within, stream.position);
  const std::uint64_t offset = of_share.offset + span.offset;  // in the segment
  // A carrier may be late because of another rank of its host. Who is missing shows in the empty
  // chunk.
  piece.frame.timeout_ms = 0;
  piece.frame.slot.lane = wire::partLane(share);
  piece.frame.slot.chunk = static_cast<std::uint32_t>(index * plan_.rounds * plan_.owners.size() +
                                                      plan_.chunk(within, stream.position));
  piece.frame.pusher = piece.frame.puller = rail(share);
  piece.frame.offset = of_segment.offset + offset;
  piece.frame.length = span.length;
  std::byte* const area = alone_ ? out_ + of_segment.offset : areas_[index % kSegmentsInFlight];
  const std::byte* const from = alone_ ? in_ + of_segment.offset : area;
  if (span.length > 0) {
    piece.payload = Payload(Bytes(from + offset, span.length), shared_from_this());
  }
  piece.out = area + offset;
  return piece;
}

void TwoLevel::accept(const Piece& piece, const Payload& result) {
  if (piece.out == nullptr) {
    compared_.store(true, std::memory_order_release);
  } else {
    result.copyTo(piece.out);
    if (alone_) return;
    const std::uint64_t chunks = plan_.rounds * plan_.owners.size();
    const std::uint64_t index = piece.frame.slot.chunk / chunks;
    if (pending_[index % kSegmentsInFlight].fetch_sub(1) != 1) return;
  }
  if (notify_) notify_();
}

void TwoLevel::summed(std::uint64_t index, std::byte* area, std::shared_ptr<const void> hold) {
  REDUCER_CHECK(index == segmentsSummed());
  hold_ = std::move(hold);
  areas_[index % kSegmentsInFlight] = area;
  pending_[index % kSegmentsInFlight] =
      static_cast<std::uint32_t>(carried_.size() * plan_.rounds * plan_.owners.size());
  summed_.store(index + 1, std::memory_order_release);
}

}  // namespace reducer::collective
