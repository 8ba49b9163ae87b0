// All-reduce in two levels: the ranks of a host sum among themselves first, each a share of the
// bytes, and only the hosts' sums travel.
//
// The tensor goes in segments, and each segment in shares, one for each rank of the widest host.
// Share j of every host is carried by one of its ranks (Placement::carrier): it sums the share over
// the host's ranks in shared memory, pushes the sum on rail j, and puts the answer back into shared
// memory, from which all ranks of the host copy it. A rank that has its host to itself pushes from
// its input and takes answers into its output.
//
// Beside the rails every rank shows its call in an empty chunk at the coordinator, as for every
// collective: there the calls are compared, and missing ranks are named.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
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

/// Thread safety: piece(), ready() and accept() as for every Operation; what is the stage's is
/// called by the one thread of the HostStage.
class TwoLevel final : public Operation {
 public:
  struct Shape {
    const Placement* placement = nullptr;
    Rank rank = 0;
    const ShardMap* rails = nullptr;  ///< its workers are hosts
    std::size_t segment_bytes = 0;
    std::uint64_t nbytes = 0;  ///< of this rank's tensor; not 0
  };

  TwoLevel(Info info, const Shape& shape, const std::byte* in, std::byte* out);

  /// What to queue at the start: on the coordinator's link, and on those of the rails' owners.
  std::vector<std::pair<OwnerIndex, Cursor>> cursors(OwnerIndex coordinator);

  Piece piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) override;
  bool ready(const Cursor& cursor) const override;
  void accept(const Piece& piece, const Payload& result) override;

  /// The owners of what this rank carries.
  const std::vector<OwnerIndex>& owners() const { return owners_; }
  /// Equal on ranks whose calls are equal, sizes included.
  std::uint64_t fingerprint() const { return fingerprint_; }
  std::uint64_t segments() const { return segments_; }
  const std::byte* in() const { return in_; }
  std::byte* out() const { return out_; }
  const std::vector<Rank>& carried() const { return carried_; }
  Rank shares() const { return shares_; }
  /// Where a segment lies in the tensor, and a share of it in the segment.
  Span segment(std::uint64_t index) const;
  Span share(std::uint64_t segment, Rank share) const;

  /// For the stage. `notify`: called when answers have come, from any thread.
  void staged(std::function<void()> notify) { notify_ = std::move(notify); }
  /// The host's sums of segment `index` of what this rank carries are in `area`, at the offsets of
  /// its shares, and may go out; answers come to the same places. In order of the segments. `hold`
  /// keeps the memory.
  void summed(std::uint64_t index, std::byte* area, std::shared_ptr<const void> hold);
  std::uint64_t segmentsSummed() const { return summed_.load(std::memory_order_acquire); }
  /// All answers to a segment that was summed are there.
  bool answered(std::uint64_t index) const {
    return pending_[index % kSegmentsInFlight].load(std::memory_order_acquire) == 0;
  }
  /// The calls of all ranks were found equal.
  bool compared() const { return compared_.load(std::memory_order_acquire); }

 private:
  /// What one owner gets of the shares that this rank carries: a position of the shares' plan.
  struct Stream {
    OwnerIndex owner;
    std::uint32_t position;
    std::vector<Rank> shares;
  };
  struct At {
    std::uint64_t segment;
    Rank share;
    std::uint64_t round;
  };
  At at(const Stream& stream, std::uint64_t round) const;

  const std::uint64_t nbytes_;
  const std::byte* const in_;
  std::byte* const out_;
  const Rank shares_;
  const bool alone_;  // on its host
  std::vector<Rank> carried_;
  std::uint64_t segments_ = 1;
  Plan plan_;  // of a share; its owners are hosts, then standalone reducers
  std::vector<Stream> streams_;
  std::vector<OwnerIndex> owners_;
  std::uint64_t fingerprint_ = 0;

  std::function<void()> notify_;
  std::shared_ptr<const void> hold_;
  std::array<std::byte*, kSegmentsInFlight> areas_{};
  std::array<std::atomic<std::uint32_t>, kSegmentsInFlight> pending_{};  // answers to come
  std::atomic<std::uint64_t> summed_{0};
  std::atomic<bool> compared_{false};
};

}  // namespace reducer::collective
