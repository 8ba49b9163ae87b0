// Numbers of reducer.proto's fields and what their bytes look like; shared by both directions and
// nobody else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/limits.h"
#include "common/payload.h"
#include "wire/frame.h"

namespace reducer::wire {

enum WireType : std::uint32_t { kVarint = 0, kFixed64 = 1, kDelimited = 2, kFixed32 = 5 };

constexpr std::uint32_t fieldTag(std::uint32_t field, WireType type) { return field << 3 | type; }

namespace frame_tag {
inline constexpr std::uint32_t kKind = fieldTag(1, kVarint);
inline constexpr std::uint32_t kEpoch = fieldTag(2, kVarint);
inline constexpr std::uint32_t kLane = fieldTag(3, kVarint);
inline constexpr std::uint32_t kSeq = fieldTag(4, kVarint);
inline constexpr std::uint32_t kChunk = fieldTag(5, kVarint);
inline constexpr std::uint32_t kCollective = fieldTag(6, kVarint);
inline constexpr std::uint32_t kOp = fieldTag(7, kVarint);
inline constexpr std::uint32_t kDtype = fieldTag(8, kVarint);
inline constexpr std::uint32_t kCodec = fieldTag(9, kVarint);
inline constexpr std::uint32_t kRoot = fieldTag(10, kVarint);
inline constexpr std::uint32_t kCount = fieldTag(11, kVarint);
inline constexpr std::uint32_t kPusher = fieldTag(12, kVarint);
inline constexpr std::uint32_t kPuller = fieldTag(13, kVarint);
inline constexpr std::uint32_t kOffset = fieldTag(14, kVarint);
inline constexpr std::uint32_t kLength = fieldTag(15, kVarint);
inline constexpr std::uint32_t kTimeoutMs = fieldTag(16, kVarint);
inline constexpr std::uint32_t kChecksum = fieldTag(17, kFixed32);
inline constexpr std::uint32_t kFatal = fieldTag(18, kVarint);
inline constexpr std::uint32_t kCode = fieldTag(19, kVarint);
inline constexpr std::uint32_t kText = fieldTag(20, kDelimited);
inline constexpr std::uint32_t kHello = fieldTag(21, kDelimited);
inline constexpr std::uint32_t kAcked = fieldTag(22, kVarint);
inline constexpr std::uint32_t kAgain = fieldTag(23, kVarint);
inline constexpr std::uint32_t kOwners = fieldTag(24, kDelimited);
inline constexpr std::uint32_t kPayload = fieldTag(31, kDelimited);
}  // namespace frame_tag

namespace hello_tag {
inline constexpr std::uint32_t kVersion = fieldTag(1, kVarint);
inline constexpr std::uint32_t kJob = fieldTag(2, kDelimited);
inline constexpr std::uint32_t kGroup = fieldTag(3, kDelimited);
inline constexpr std::uint32_t kRank = fieldTag(4, kVarint);
inline constexpr std::uint32_t kWorldSize = fieldTag(5, kVarint);
inline constexpr std::uint32_t kHost = fieldTag(6, kDelimited);
inline constexpr std::uint32_t kWindowBytes = fieldTag(7, kVarint);
inline constexpr std::uint32_t kConfig = fieldTag(8, kFixed64);
inline constexpr std::uint32_t kConfigText = fieldTag(9, kDelimited);
inline constexpr std::uint32_t kHosts = fieldTag(10, kDelimited);
inline constexpr std::uint32_t kHeartbeatMs = fieldTag(11, kVarint);
inline constexpr std::uint32_t kFailover = fieldTag(12, kVarint);
inline constexpr std::uint32_t kToken = fieldTag(13, kDelimited);
}  // namespace hello_tag

/// The host of every rank of the largest group: varints of two bytes.
inline constexpr std::size_t kMaxHostsBytes = 2 * static_cast<std::size_t>(kMaxWorldSize);

/// Owners of the largest group, workers first: varints of two bytes.
inline constexpr std::size_t kMaxOwnersBytes = 2 * std::size_t{kMaxOwners};

/// More than any header needs: five texts (of the frame and of its hello), the hosts, the owners,
/// the token, and some 150 bytes of numbers.
inline constexpr std::size_t kMaxHeaderBytes =
    5 * kMaxTextBytes + kMaxHostsBytes + kMaxOwnersBytes + kMaxTokenBytes + 512;

}  // namespace reducer::wire
