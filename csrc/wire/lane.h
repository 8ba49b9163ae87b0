// Lanes: independent sequences of operations within a group. The number is on the wire
// (SlotId::lane).
//
//   0              the collectives, in issue order
//   part lane      the part of a collective that one rank pushes, where several ranks push to one
//   owner (gather, all-to-all) pair lane      send and recv of one (sender, receiver, tag)
#pragma once

#include <cstdint>

#include "common/types.h"

namespace reducer::wire {

inline constexpr std::uint64_t kCollectiveLane = 0;
inline constexpr std::uint64_t kPairBit = std::uint64_t{1} << 63;
inline constexpr std::uint64_t kPartBit = std::uint64_t{1} << 62;

/// Ranks are below 2^12 (kMaxWorldSize).
constexpr std::uint64_t pairLane(Rank from, Rank to, std::uint32_t tag) {
  return kPairBit | static_cast<std::uint64_t>(from) << 44 | static_cast<std::uint64_t>(to) << 32 |
         tag;
}

constexpr std::uint64_t partLane(Rank pusher) {
  return kPartBit | static_cast<std::uint64_t>(pusher);
}

/// The lane that an operation is numbered in: a part belongs to its collective.
constexpr std::uint64_t operationLane(std::uint64_t lane) {
  return (lane & kPairBit) == 0 && (lane & kPartBit) != 0 ? kCollectiveLane : lane;
}

constexpr std::uint32_t tagOf(std::uint64_t pair_lane) {
  return static_cast<std::uint32_t>(pair_lane);
}

}  // namespace reducer::wire
