#include "collective/two_level.h"

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/limits.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

constexpr std::uint64_t kAlign = 64;

// Of all ranks of a host together in shared memory, at most; and of a segment. Where every rank has
// a strip, a segment must hold a slice of each.
constexpr std::size_t kHostBytesMax = std::size_t{64} << 20;
constexpr std::size_t kOwnedHostBytesMax = std::size_t{512} << 20;
constexpr std::size_t kSegmentBytesMax = std::size_t{1} << 20;

// What a slice of an owned strip has at least: less would cost a frame without saving anything.
constexpr std::uint64_t kOwnedSliceMin = 4096;

// Cursor::transfer: of the empty chunk; streams are counted from 0.
constexpr std::uint32_t kShow = std::numeric_limits<std::uint32_t>::max();

/// Boundary i of n parts of `nbytes`, on whole cache lines, and so on whole elements.
std::uint64_t boundary(std::uint64_t nbytes, std::uint64_t i, std::uint64_t n) {
  if (i == n) return nbytes;
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(nbytes) * i / n) / kAlign *
         kAlign;
}

Span part(std::uint64_t nbytes, std::uint64_t i, std::uint64_t n) {
  const std::uint64_t begin = boundary(nbytes, i, n);
  return {begin, boundary(nbytes, i + 1, n) - begin};
}

// A slice may be longer than its part of the segment, by aligning its two ends, and is padded.
constexpr std::uint64_t kSlack = 3 * kAlign;

std::uint64_t aligned(std::uint64_t nbytes) { return (nbytes + kAlign - 1) / kAlign * kAlign; }

std::uint64_t mixed(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0xBF58476D1CE4E5B9ULL;
  return hash ^ (hash >> 31);
}

std::uint64_t fingerprintOf(const wire::Call& call, const std::vector<Strip>& strips) {
  std::uint64_t hash = 0x9E3779B97F4A7C15ULL;
  for (const std::uint64_t value :
       {static_cast<std::uint64_t>(call.collective), static_cast<std::uint64_t>(call.op),
        static_cast<std::uint64_t>(call.dtype), static_cast<std::uint64_t>(call.codec),
        static_cast<std::uint64_t>(call.root), call.count}) {
    hash = mixed(hash, value);
  }
  for (const Strip& strip : strips) {
    for (const Rank rank : {strip.share, strip.source, strip.sink, strip.owner}) {
      hash = mixed(hash, static_cast<std::uint64_t>(rank));
    }
    hash = mixed(hash, strip.nbytes);
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

std::size_t ownedSegmentBytes(const Placement& placement, std::size_t chunk_bytes) {
  const auto ranks = static_cast<std::size_t>(placement.widest());
  const std::size_t slices =
      static_cast<std::size_t>(placement.worldSize()) * (kOwnedSliceMin + kSlack);
  const std::size_t wanted = std::max(segmentBytes(placement, chunk_bytes), 2 * slices);
  return wanted * kSegmentsInFlight * ranks <= kOwnedHostBytesMax ? wanted : 0;
}

class TwoLevel::Hold {
 public:
  Hold(std::shared_ptr<TwoLevel> operation, std::uint64_t segment)
      : operation_(std::move(operation)), slot_(segment % kSegmentsInFlight) {
    operation_->held_[slot_].fetch_add(1);
  }
  ~Hold() {
    const bool last = operation_->held_[slot_].fetch_sub(1) == 1;
    if (last && operation_->pending_[slot_].load() == 0 && operation_->notify_) {
      operation_->notify_();
    }
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  const std::shared_ptr<TwoLevel> operation_;
  const std::size_t slot_;
};

std::vector<Strip> sharedStrips(const Placement& placement, const std::byte* in, std::byte* out,
                                std::uint64_t nbytes, Rank source, Rank sink) {
  std::vector<Strip> strips;
  const auto shares = static_cast<std::uint64_t>(placement.widest());
  for (std::uint64_t share = 0; share < shares; ++share) {
    const std::uint64_t begin = boundary(nbytes, share, shares);
    Strip strip;
    if (in != nullptr) strip.in = in + begin;
    if (out != nullptr) strip.out = out + begin;
    strip.nbytes = boundary(nbytes, share + 1, shares) - begin;
    strip.share = static_cast<Rank>(share);
    strip.source = source;
    strip.sink = sink;
    if (strip.nbytes > 0) strips.push_back(strip);
  }
  return strips;
}

// The rail of a rank's strip is the one on which that rank carries: it reaches, or leaves, its
// owner without a copy to another rank of the host.
std::vector<Strip> ownedStrips(const Placement& placement, std::span<const std::byte* const> ins,
                               std::span<std::byte* const> outs,
                               std::span<const std::uint64_t> nbytes, bool sums) {
  std::vector<Strip> strips;
  for (Rank rank = 0; rank < placement.worldSize(); ++rank) {
    if (nbytes[rank] == 0) continue;
    const std::span<const Rank> beside = placement.ranksOf(placement.hostOf(rank));
    Strip strip;
    strip.in = ins[rank];
    strip.out = outs[rank];
    strip.nbytes = nbytes[rank];
    strip.share =
        static_cast<Rank>(std::lower_bound(beside.begin(), beside.end(), rank) - beside.begin());
    strip.source = sums ? kAllRanks : rank;
    strip.sink = sums ? rank : kAllRanks;
    strip.owner = rank;
    strips.push_back(strip);
  }
  return strips;
}

TwoLevel::TwoLevel(Info info, const Shape& shape, std::vector<Strip> strips)
    : Operation(std::move(info)),
      placement_(*shape.placement),
      rank_(shape.rank),
      host_(placement_.hostOf(rank_)),
      alone_(placement_.ranksOf(host_).size() == 1),
      strips_(std::move(strips)) {
  layOut(shape.segment_bytes);
  fingerprint_ = fingerprintOf(this->info().call, strips_);
  if (owned()) {
    addOwned(*shape.rails, shape.window_bytes);
  } else {
    addShared(*shape.rails, shape.window_bytes);
  }
}

std::uint64_t TwoLevel::segmentsOf(const Strip& strip) const {
  if (!owned()) return segments_;
  return std::min(segments_, (strip.nbytes + kOwnedSliceMin - 1) / kOwnedSliceMin);
}

std::uint64_t TwoLevel::sliceMax(const Strip& strip) const {
  return std::min(strip.nbytes, strip.nbytes / segmentsOf(strip) + 2 * kAlign);
}

void TwoLevel::layOut(std::size_t segment_bytes) {
  std::uint64_t nbytes = 0;
  for (const Strip& strip : strips_) {
    REDUCER_CHECK(strip.nbytes > 0 && (strip.owner != kAllRanks) == owned());
    nbytes += strip.nbytes;
  }
  const std::uint64_t least = strips_.size() * (kSlack + (owned() ? kOwnedSliceMin : 0));
  REDUCER_CHECK(nbytes > 0 && least < segment_bytes);
  segments_ = (nbytes + segment_bytes - least - 1) / (segment_bytes - least);
  std::uint64_t end = 0;
  for (const Strip& strip : strips_) {
    area_offsets_.push_back(end);
    end += aligned(sliceMax(strip));
  }
  REDUCER_CHECK(end <= segment_bytes);
}

// A rail's part that a host owns is its carrier's: what that one pushes stays in its process.
void TwoLevel::addShared(const ShardMap& rails, std::size_t window_bytes) {
  std::uint64_t longest = 0;
  for (const Strip& strip : strips_) longest = std::max(longest, sliceMax(strip));
  plan_ = rails.plan(longest, info().seq);
  plan_.limit(window_bytes);
  const auto hosts = static_cast<OwnerIndex>(placement_.hosts());
  for (std::uint32_t position = 0; position < plan_.owners.size(); ++position) {
    const OwnerIndex planned = plan_.owners[position];
    for (std::uint32_t i = 0; i < strips_.size(); ++i) {
      const Rank share = strips_[i].share;
      if (!placement_.carries(rank_, share)) continue;
      const OwnerIndex owner =
          planned < hosts
              ? static_cast<OwnerIndex>(placement_.carrier(static_cast<Rank>(planned), share))
              : planned - hosts + static_cast<OwnerIndex>(placement_.worldSize());
      auto stream = std::find_if(streams_.begin(), streams_.end(),
                                 [owner](const Stream& s) { return s.owner == owner; });
      if (stream == streams_.end()) {
        stream = streams_.insert(streams_.end(), Stream{owner, segments_, plan_.rounds, {}});
        owners_.push_back(owner);
      }
      stream->items.push_back({i, position});
    }
  }
}

void TwoLevel::addOwned(const ShardMap& rails, std::size_t window_bytes) {
  for (std::uint32_t i = 0; i < strips_.size(); ++i) {
    const Strip& strip = strips_[i];
    if (!placement_.carries(rank_, strip.share)) continue;
    const auto owner = static_cast<OwnerIndex>(strip.owner);
    Plan plan = rails.planFor(owner, sliceMax(strip));
    plan.limit(window_bytes);
    streams_.push_back(Stream{owner, segmentsOf(strip), plan.rounds, {{i, 0}}});
    owners_.push_back(owner);
  }
}

std::vector<std::pair<OwnerIndex, Cursor>> TwoLevel::cursors(OwnerIndex coordinator) {
  std::vector<std::pair<OwnerIndex, Cursor>> cursors;
  cursors.emplace_back(coordinator, Cursor{shared_from_this(), kShow, 0, 0, 1});
  for (std::uint32_t i = 0; i < streams_.size(); ++i) {
    const Stream& stream = streams_[i];
    const std::uint64_t rounds = stream.segments * stream.items.size() * stream.rounds;
    cursors.emplace_back(stream.owner, Cursor{shared_from_this(), i, 0, 0, rounds});
  }
  return cursors;
}

// By segment, and within it by strip: every rank that carries two strips to one owner has them in
// the same order, and the oldest piece of all waits for nothing that is behind another.
TwoLevel::At TwoLevel::at(const Stream& stream, std::uint64_t round) const {
  const std::uint64_t of_segment = stream.items.size() * stream.rounds;
  const std::uint64_t rest = round % of_segment;
  return {round / of_segment, stream.items[rest / stream.rounds], rest % stream.rounds};
}

Span TwoLevel::slice(std::uint64_t segment, std::size_t strip) const {
  const std::uint64_t nbytes = strips_[strip].nbytes;
  const std::uint64_t segments = segmentsOf(strips_[strip]);
  if (segment >= segments) return {nbytes, 0};
  return part(nbytes, segment, segments);
}

bool TwoLevel::ready(const Cursor& cursor) const {
  if (alone_ || cursor.transfer == kShow) return true;
  return at(streams_[cursor.transfer], cursor.at()).segment < segmentsSummed();
}

std::uint64_t TwoLevel::key(const Cursor& cursor) const {
  if (cursor.transfer == kShow) return pieceKey(info().seq, 0);
  const Stream& stream = streams_[cursor.transfer];
  const auto [segment, item, within] = at(stream, cursor.at());
  const std::uint64_t owners = owned() ? 1 : plan_.owners.size();
  const std::uint64_t before = (segment * strips_.size() + item.strip) * stream.rounds * owners;
  return pieceKey(info().seq, 1 + before + within * owners + item.position);
}

Piece TwoLevel::piece(std::uint32_t transfer, std::uint32_t /*position*/, std::uint64_t round) {
  Piece piece;
  piece.transfer = transfer;
  piece.frame = frame();
  if (transfer == kShow) return piece;
  const Stream& stream = streams_[transfer];
  const auto [segment, item, within] = at(stream, round);
  piece.round = segment;
  const Strip& strip = strips_[item.strip];
  const Span slice = this->slice(segment, item.strip);
  const Span span = owned() ? part(slice.length, within, stream.rounds)
                            : plan_.span(slice.length, within, item.position);
  // A carrier may be late because of another rank of its host. Who is missing shows in the empty
  // chunk.
  piece.frame.timeout_ms = 0;
  piece.frame.slot.lane = wire::partLane(strip.owner == kAllRanks ? strip.share : strip.owner);
  const std::uint64_t first = segment * stream.rounds * (owned() ? 1 : plan_.owners.size());
  piece.frame.slot.chunk =
      static_cast<std::uint32_t>(first + (owned() ? within : plan_.chunk(within, item.position)));
  const auto on_rail = [&](Rank rank) {
    return rank == kAllRanks ? rail(strip.share)
                             : placement_.carrier(placement_.hostOf(rank), strip.share);
  };
  const auto here = [&](Rank rank) {
    return rank == kAllRanks || placement_.hostOf(rank) == host_;
  };
  piece.frame.pusher = on_rail(strip.source);
  piece.frame.puller = on_rail(strip.sink);
  piece.frame.offset = slice.offset + span.offset;
  piece.frame.length = span.length;
  std::byte* const area =
      alone_ ? nullptr : areas_[segment % kSegmentsInFlight] + areaOffset(item.strip) + span.offset;
  if (here(strip.source) && span.length > 0) {
    const auto self = std::static_pointer_cast<TwoLevel>(shared_from_this());
    piece.payload = alone_
                        ? Payload(Bytes(strip.in + piece.frame.offset, span.length), self)
                        : Payload(Bytes(area, span.length), std::make_shared<Hold>(self, segment));
  }
  // What this rank alone pushes does not come back.
  if (here(strip.sink) && piece.frame.pusher != rank_) {
    piece.out = alone_ ? strip.out + piece.frame.offset : area;
  }
  return piece;
}

void TwoLevel::accept(const Piece& piece, const Payload& result) {
  if (piece.transfer == kShow) {
    compared_.store(true, std::memory_order_release);
  } else {
    Operation::accept(piece, result);
    if (alone_) return;
    if (pending_[piece.round % kSegmentsInFlight].fetch_sub(1) != 1) return;
  }
  if (notify_) notify_();
}

void TwoLevel::summed(std::uint64_t index, std::byte* area, std::shared_ptr<const void> hold) {
  REDUCER_CHECK(index == segmentsSummed());
  hold_ = std::move(hold);
  areas_[index % kSegmentsInFlight] = area;
  std::uint64_t answers = 0;
  for (const Stream& stream : streams_) {
    if (index < stream.segments) answers += stream.items.size() * stream.rounds;
  }
  pending_[index % kSegmentsInFlight] = static_cast<std::uint32_t>(answers);
  summed_.store(index + 1, std::memory_order_release);
}

}  // namespace reducer::collective
