// Ring all-reduce: the baseline. Its sums are in ring order, which differs from segment to segment,
// so its bits are not those of the other algorithms.
#pragma once

#include <memory>

#include "collective/link.h"
#include "collective/operation.h"

namespace reducer::collective {

/// The tensor is cut into n segments, each into `chunks` chunks. In step t (0 <= t < 2(n-1)) rank r
/// sends one segment to rank r+1 and gets one from rank r-1: first sums that grow, then finished
/// segments. A chunk goes on as soon as it is there; no step waits for a whole segment. Source of
/// the schedule: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
/// workstations" (2009).
class RingAllReduce final : public Operation {
 public:
  /// `out` holds the input already. n > 1. `next` is the link to rank + 1.
  RingAllReduce(Info info, std::byte* out, Rank rank, Rank world_size, std::size_t chunk_bytes,
                std::shared_ptr<Link> next);

  /// What to queue at the start: on the link to the reducer inside this process, and on `next`.
  std::vector<Cursor> pulls();
  Cursor firstPushes();

  Piece piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) override;
  void accept(const Piece& piece, const Payload& result) override;

 private:
  Span spanOf(std::uint32_t segment, std::uint64_t chunk) const;
  std::uint32_t sentSegment(std::uint32_t step) const;

  std::byte* const out_;
  const std::uint32_t rank_;
  const std::uint32_t n_;
  const std::shared_ptr<Link> next_;
  const std::size_t nbytes_;
  std::uint64_t chunks_ = 1;
};

}  // namespace reducer::collective
