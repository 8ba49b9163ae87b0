// What the ranks of one host write for each other in shared memory, and read of each other.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "collective/two_level.h"
#include "common/status.h"
#include "local/futex.h"
#include "local/progress.h"

namespace reducer::collective {

/// A segment of an operation: the operation's number, then the segment's. Grows in the order in
/// which segments are taken up.
using SegmentKey = std::uint64_t;
inline constexpr int kSegmentBits = 24;
constexpr SegmentKey keyOf(std::uint64_t number, std::uint64_t segment) {
  return number << kSegmentBits | segment;
}

/// The board of one rank: it alone writes there, all ranks of the host read. Valid when zeroed.
struct HostBoard {
  /// How far a segment has come on this rank.
  enum Stage : std::uint32_t {
    kNothing = 0,
    kBrought = 1,   ///< its parts of the shares that others carry are in its area
    kAnswered = 2,  ///< the results of the shares that it carries are in its area
  };
  /// What one of the rank's areas holds.
  struct alignas(local::kLine) Entry {
    std::atomic<SegmentKey> key;  // + 1; 0: none yet
    std::atomic<std::uint64_t> fingerprint;
    std::atomic<std::uint32_t> stage;
  };
  /// An operation that failed on this rank, and why.
  struct alignas(local::kLine) Notice {
    std::atomic<std::uint64_t> number;  // + 1; 0: none, or being written
    std::uint32_t code;
    std::uint32_t nbytes;
    std::array<char, 1008> text;
  };

  /// Sleeps until rung, for `most`, unless it was rung since `seen` was read.
  void sleep(std::uint32_t seen, Duration most) {
    sleepers.fetch_add(1);
    if (bell.load() == seen) local::futexWait(bell, seen, most);
    sleepers.fetch_sub(1);
  }
  void ring() {
    bell.fetch_add(1);
    local::wake(bell, sleepers);
  }

  /// Whether the rank has brought a segment this far.
  const Entry* find(SegmentKey key, Stage stage) const {
    for (const Entry& entry : entries) {
      if (entry.key.load() == key + 1 && entry.stage.load() >= stage) return &entry;
    }
    return nullptr;
  }

  void tell(std::uint64_t failed, const Status& why);
  std::optional<Status> told(std::uint64_t number) const;

  alignas(local::kLine) std::atomic<std::uint32_t> bell;
  std::atomic<std::uint32_t> sleepers;
  std::atomic<std::uint32_t> left;  ///< 1: in good order
  /// This rank reads no other's area any more for a segment below.
  alignas(local::kLine) std::atomic<SegmentKey> done;
  std::array<Entry, kSegmentsInFlight> entries;
  std::array<Notice, 8> notices;  ///< by number
};

/// The boards of all ranks of the host, then their areas.
class HostMemory {
 public:
  static std::size_t nbytes(std::size_t ranks, std::size_t segment_bytes) {
    return ranks * (sizeof(HostBoard) + kSegmentsInFlight * segment_bytes);
  }
  /// `data`: zeroed at first, nbytes() of it; kept by `owner`.
  HostMemory(std::byte* data, std::shared_ptr<const void> owner, std::size_t ranks,
             std::size_t segment_bytes)
      : data_(data), owner_(std::move(owner)), ranks_(ranks), segment_bytes_(segment_bytes) {}

  HostBoard& board(std::size_t place) const { return reinterpret_cast<HostBoard*>(data_)[place]; }
  std::byte* area(std::size_t place, std::size_t index) const {
    return data_ + ranks_ * sizeof(HostBoard) +
           (place * kSegmentsInFlight + index) * segment_bytes_;
  }
  std::size_t ranks() const { return ranks_; }
  const std::shared_ptr<const void>& owner() const { return owner_; }

  void ringAll() const {
    for (std::size_t place = 0; place < ranks_; ++place) board(place).ring();
  }
  /// All ranks have brought the segment this far. Who finds so after its own step rings: one of
  /// them does, the last.
  bool all(SegmentKey key, HostBoard::Stage stage) const {
    for (std::size_t place = 0; place < ranks_; ++place) {
      if (board(place).find(key, stage) == nullptr) return false;
    }
    return true;
  }

 private:
  std::byte* const data_;
  const std::shared_ptr<const void> owner_;
  const std::size_t ranks_;
  const std::size_t segment_bytes_;
};

}  // namespace reducer::collective
