// Who owns which bytes: the one thing in which `direct`, `server` and `mixed` differ.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/settings.h"

namespace reducer::collective {

/// Index of an owner in a group: 0 .. n-1 are the reducers inside the workers, by rank; n .. n+k-1
/// the standalone ones.
using OwnerIndex = std::uint32_t;

/// Bytes of one chunk.
struct Span {
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
};

/// How one transfer is cut. It goes in rounds; in each round every owner gets one chunk, its size
/// proportional to the owner's weight, so that at every moment all NICs carry their share. Computed
/// in integers: all ranks get the same plan from the same size and sequence number.
class Plan {
 public:
  /// Chunk number of (round, position); owners[position] owns it.
  std::uint32_t chunk(std::uint64_t round, std::size_t position) const {
    return static_cast<std::uint32_t>(round * owners.size() + position);
  }
  Span span(std::uint64_t round, std::size_t position) const {
    return span(nbytes, round, position);
  }
  /// The same of a transfer of another size, cut in as many rounds.
  Span span(std::uint64_t of_nbytes, std::uint64_t round, std::size_t position) const;
  /// Cuts it in more rounds, if need be, so that no chunk is longer.
  void limit(std::uint64_t chunk_bytes_max);

  std::vector<OwnerIndex> owners;  ///< by position
  std::vector<std::uint64_t>
      before;  ///< sum of the weights of the positions before; one more entry: the total
  std::uint64_t nbytes = 0;
  std::uint64_t rounds = 1;
  std::uint64_t window_rounds = 0;  ///< that the window holds, if it was set; 0: it was not
  bool full_chunks = false;         ///< chunks are as large as they may be

 private:
  std::uint64_t boundary(std::uint64_t of_nbytes, std::uint64_t round, std::size_t position) const;
};

/// The owners of a group with their shares. Immutable after construction; thread safe.
class ShardMap {
 public:
  /// An owner for each weight that is not 0 (ownerWeights()); `chunk_bytes` 0 and `window_bytes` 0
  /// choose.
  ShardMap(const std::vector<std::uint64_t>& weights, std::size_t chunk_bytes,
           std::size_t window_bytes);
  /// n workers, k standalone reducers, with NICs of one speed. `algorithm` must not be kAuto;
  /// kRing gives the map of `direct` (for the collectives that are not all-reduce).
  ShardMap(Algorithm algorithm, std::uint32_t n, std::uint32_t k, std::size_t chunk_bytes,
           std::size_t window_bytes);

  /// What `auto` means for n workers and k standalone reducers.
  static Algorithm resolve(Algorithm algorithm, std::uint32_t k);

  Plan plan(std::uint64_t nbytes, std::uint64_t seq) const {
    return planFrom(coordinator(seq), nbytes);
  }
  /// The same with chunk 0 at `first`, which must be an owner.
  Plan planFrom(OwnerIndex first, std::uint64_t nbytes) const;
  /// A transfer that one owner has to itself.
  Plan planFor(OwnerIndex owner, std::uint64_t nbytes) const;

  /// Owner of chunk 0 of operation `seq`, where a group has this map alone.
  OwnerIndex coordinator(std::uint64_t seq) const { return owners_[seq % owners_.size()]; }

  const std::vector<OwnerIndex>& owners() const { return owners_; }
  bool owns(OwnerIndex owner) const;
  std::size_t chunkBytes() const { return chunk_bytes_; }
  /// Most chunk bytes that one worker has outstanding at this owner.
  std::size_t windowBytes(OwnerIndex owner) const;
  /// The same over all owners.
  std::size_t windowBytesTotal() const;

 private:
  /// Cuts a plan whose largest share is so large.
  void cut(Plan& plan, std::uint64_t largest) const;

  std::vector<OwnerIndex> owners_;      // rising
  std::vector<std::uint64_t> weights_;  // beside owners_
  std::uint64_t weight_total_ = 0;
  std::uint64_t weight_max_ = 0;
  std::size_t chunk_bytes_ = 0;
  std::size_t window_bytes_ = 0;
  bool window_set_ = false;
};

}  // namespace reducer::collective
