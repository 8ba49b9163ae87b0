// Lanes: independent sequences of operations within a group. The number is on the wire
// (SlotId::lane).
//
//   0               the collectives, in issue order
//   part lane       the part of a collective that one rank pushes, where several ranks push to one
//                   owner (gather, all-to-all)
//   step lane       the second step of one collective, whose size the first step told: each its own
//                   lane and window, since ranks may start several of them in different orders
//   pair lane       send and recv of one (sender, receiver, tag)
#pragma once

#include <cstdint>

#include "common/types.h"

namespace reducer::wire {

inline constexpr std::uint64_t kCollectiveLane = 0;
inline constexpr std::uint64_t kPairBit = std::uint64_t{1} << 63;
inline constexpr std::uint64_t kPartBit = std::uint64_t{1} << 62;

inline constexpr std::uint64_t kStepBit = std::uint64_t{1} << 61;

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

constexpr bool isPairLane(std::uint64_t lane) { return (lane & kPairBit) != 0; }

/// `number`: of the second steps of this group, from 0.
constexpr std::uint64_t stepLane(std::uint64_t number) { return kStepBit | number; }

constexpr std::uint64_t stepNumber(std::uint64_t step_lane) { return step_lane ^ kStepBit; }

constexpr bool isStepLane(std::uint64_t lane) {
  return (lane & kStepBit) != 0 && (lane & (kPairBit | kPartBit)) == 0;
}

/// True where a slot of the lane may have every rank of the group as pusher or puller.
constexpr bool isEverybodys(std::uint64_t lane) {
  return lane == kCollectiveLane || isStepLane(lane);
}

constexpr Rank senderOf(std::uint64_t pair_lane) {
  return static_cast<Rank>(pair_lane >> 44 & 0xFFF);
}

constexpr Rank receiverOf(std::uint64_t pair_lane) {
  return static_cast<Rank>(pair_lane >> 32 & 0xFFF);
}

constexpr std::uint32_t tagOf(std::uint64_t pair_lane) {
  return static_cast<std::uint32_t>(pair_lane);
}

}  // namespace reducer::wire
