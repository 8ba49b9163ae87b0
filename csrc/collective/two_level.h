// Collectives in two levels: what ranks of a host have in common goes through their shared memory,
// and between hosts every byte goes once.
//
// A collective is a list of strips. Each is carried by a rail: one rank of every host
// (Placement::carrier). On a host that pushes it, the carrier sums the strip over the host's ranks
// in shared memory, or takes it from the rank whose it is, and pushes that; on a host that pulls
// it, the carrier puts the answer into shared memory, from which the ranks that want it copy it.
// Strips go in segments, a slice of each strip at a time. A rank that has its host to itself pushes
// from its input and takes answers into its output.
//
// Beside the rails every rank shows its call in an empty chunk at the coordinator, as for every
// collective: there the calls are compared, and missing ranks are named.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "collective/operation.h"
#include "collective/shard_map.h"
#include "common/placement.h"

namespace reducer::collective {

/// Segments of one rank in shared memory at a time: while the answers to one come in, others are
/// summed and copied.
inline constexpr std::size_t kSegmentsInFlight = 4;

/// Bytes of a segment, equal on all ranks. `chunk_bytes`: as set by the user, 0 if not; a small one
/// makes segments small, too.
std::size_t segmentBytes(const Placement& placement, std::size_t chunk_bytes);
/// The same of what has a strip for every rank, and so needs more room; 0: it is too much.
std::size_t ownedSegmentBytes(const Placement& placement, std::size_t chunk_bytes);

/// Bytes that one rail carries.
struct Strip {
  const std::byte* in = nullptr;  ///< this rank's; null: none of them are
  std::byte* out = nullptr;       ///< null: this rank does not want them
  std::uint64_t nbytes = 0;
  Rank share = 0;           ///< the rail's
  Rank source = kAllRanks;  ///< whose bytes; kAllRanks: the sum of all ranks'
  Rank sink = kAllRanks;    ///< who gets them
  Rank owner = kAllRanks;   ///< that sums or hands on all of it; kAllRanks: the owners of the map
};

/// A tensor that all owners share, one strip for each rank of the widest host: all-reduce, reduce,
/// broadcast.
std::vector<Strip> sharedStrips(const Placement& placement, const std::byte* in, std::byte* out,
                                std::uint64_t nbytes, Rank source, Rank sink);

/// A strip for each rank, which owns it; those without bytes are left out. `sums`: of all ranks'
/// bytes, for the owner (reduce-scatter); else of the owner's bytes, for all (all-gather).
/// ins[r], outs[r]: as in Strip; nbytes[r]: equal on all ranks.
std::vector<Strip> ownedStrips(const Placement& placement, std::span<const std::byte* const> ins,
                               std::span<std::byte* const> outs,
                               std::span<const std::uint64_t> nbytes, bool sums);

/// Thread safety: piece(), ready() and accept() as for every Operation; what is the stage's is
/// called by the one thread of the HostStage.
class TwoLevel final : public Operation {
 public:
  struct Shape {
    const Placement* placement = nullptr;
    Rank rank = 0;
    const ShardMap* rails = nullptr;  ///< its workers are hosts
    std::size_t segment_bytes = 0;    ///< segmentBytes(), or ownedSegmentBytes()
    std::size_t window_bytes = 0;     ///< no chunk may be larger
  };

  /// `strips`: at least one, of more than no bytes; all or none of them with an owner.
  TwoLevel(Info info, const Shape& shape, std::vector<Strip> strips);

  /// What to queue at the start: on the coordinator's link, and on those of the rails' owners.
  std::vector<std::pair<OwnerIndex, Cursor>> cursors(OwnerIndex coordinator);

  Piece piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) override;
  bool ready(const Cursor& cursor) const override;
  std::uint64_t key(const Cursor& cursor) const override;
  void accept(const Piece& piece, const Payload& result) override;

  /// The owners of what this rank carries.
  const std::vector<OwnerIndex>& owners() const { return owners_; }
  /// Equal on ranks whose calls are equal, sizes included.
  std::uint64_t fingerprint() const { return fingerprint_; }
  std::uint64_t segments() const { return segments_; }
  const std::vector<Strip>& strips() const { return strips_; }
  /// What of a strip is in a segment: where in the strip, and from where on in the segment's area.
  Span slice(std::uint64_t segment, std::size_t strip) const;
  std::uint64_t areaOffset(std::size_t strip) const { return area_offsets_[strip]; }

  /// For the stage. `notify`: called when answers have come, from any thread.
  void staged(std::function<void()> notify) { notify_ = std::move(notify); }
  /// What this rank carries of segment `index` is in `area` and may go out; answers come to the
  /// same places. In order of the segments. `hold` keeps the memory.
  void summed(std::uint64_t index, std::byte* area, std::shared_ptr<const void> hold);
  std::uint64_t segmentsSummed() const { return summed_.load(std::memory_order_acquire); }
  /// All answers to a segment that was summed are there, and nothing refers to its area any more:
  /// what one rank alone pushes is handed on from there, perhaps after the answer.
  bool answered(std::uint64_t index) const {
    return pending_[index % kSegmentsInFlight].load(std::memory_order_acquire) == 0 &&
           held_[index % kSegmentsInFlight].load(std::memory_order_acquire) == 0;
  }
  /// The calls of all ranks were found equal.
  bool compared() const { return compared_.load(std::memory_order_acquire); }

 private:
  /// A strip that this rank carries, or what one owner gets of it.
  struct Item {
    std::uint32_t strip;
    std::uint32_t position;  // in the plan
  };
  /// What goes to one owner: of each of so many segments, each item in so many rounds.
  struct Stream {
    OwnerIndex owner;
    std::uint64_t segments;
    std::uint64_t rounds;
    std::vector<Item> items;
  };
  /// Kept by a payload that is in a segment's area.
  class Hold;
  struct At {
    std::uint64_t segment;
    Item item;
    std::uint64_t round;
  };
  At at(const Stream& stream, std::uint64_t round) const;
  bool owned() const { return strips_[0].owner != kAllRanks; }
  /// Segments that have some of a strip: the first ones.
  std::uint64_t segmentsOf(const Strip& strip) const;
  /// No slice of the strip is longer.
  std::uint64_t sliceMax(const Strip& strip) const;
  void layOut(std::size_t segment_bytes);
  void addShared(const ShardMap& rails, std::size_t window_bytes);
  void addOwned(const ShardMap& rails, std::size_t window_bytes);

  const Placement& placement_;
  const Rank rank_;
  const Rank host_;
  const bool alone_;  // on its host
  const std::vector<Strip> strips_;
  std::uint64_t segments_ = 1;
  std::vector<std::uint64_t> area_offsets_;  // beside strips_
  Plan plan_;  // of a slice that several own: hosts, then standalone reducers
  std::vector<Stream> streams_;
  std::vector<OwnerIndex> owners_;
  std::uint64_t fingerprint_ = 0;

  std::function<void()> notify_;
  std::shared_ptr<const void> hold_;
  std::array<std::byte*, kSegmentsInFlight> areas_{};
  std::array<std::atomic<std::uint32_t>, kSegmentsInFlight> pending_{};  // answers to come
  std::array<std::atomic<std::uint32_t>, kSegmentsInFlight> held_{};     // Holds
  std::atomic<std::uint64_t> summed_{0};
  std::atomic<bool> compared_{false};
};

}  // namespace reducer::collective
