// Bounds that hold everywhere. What a peer sends beyond them is refused, not believed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reducer {

/// Version of the wire protocol. Both ends must speak the same one.
inline constexpr std::uint32_t kProtocolVersion = 3;

/// With checksums, what comes damaged is asked for again; so many times in a row, then it is an
/// error: something is broken, and not just unlucky.
inline constexpr int kDamagedInRowMax = 16;

inline constexpr std::int32_t kMaxWorldSize = 4096;

/// The name of a group instance on the wire: random bytes, so that two never have the same.
inline constexpr std::size_t kJobBytes = 16;

/// The smallest and the largest chunk that may be asked for by REDUCER_CHUNK_BYTES.
inline constexpr std::size_t kMinChunkBytes = 4096;
inline constexpr std::size_t kMaxChunkBytes = std::size_t{16} << 20;

/// Longest text (an error, a host name) in a frame; a longer one is cut by the sender.
inline constexpr std::size_t kMaxTextBytes = 8192;

/// Longest name of a host or a group in a hello: a reducer keeps several copies.
inline constexpr std::size_t kMaxNameBytes = 256;

/// A job's token: the shortest that is let in (shorter ones can be guessed) and the longest.
inline constexpr std::size_t kMinTokenBytes = 16;
inline constexpr std::size_t kMaxTokenBytes = 256;

/// Largest message of a peer that has not said who it is: no hello is longer.
inline constexpr std::size_t kMaxStrangerBytes = 64 << 10;

/// Largest whole message: the largest chunk and a header.
inline constexpr std::size_t kMaxMessageBytes = kMaxChunkBytes + 3 * kMaxTextBytes;

}  // namespace reducer
