// A frame: the unit on the wire. See reducer.proto, which describes the same bytes to other
// clients.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/payload.h"
#include "common/status.h"
#include "common/types.h"

namespace reducer::wire {

/// The numbers are on the wire.
enum class FrameKind : std::uint8_t {
  kHello = 1,    ///< worker -> reducer, first on a connection: who I am
  kWelcome = 2,  ///< reducer -> worker: the answer to kHello
  kPush = 3,     ///< worker -> reducer: my part of a slot; with payload if this rank is a pusher
  kResult = 4,   ///< reducer -> worker: the slot is done; with payload if this rank is a puller
  kError =
      5,  ///< reducer -> worker: the operation (lane, seq) failed, or with `fatal` the connection
  kCancel = 6,   ///< worker -> reducer: this rank gives up the operation (lane, seq)
  kBye = 7,      ///< worker -> reducer: this rank leaves the group in good order
  kArrived = 8,  ///< reducer -> the worker in its own process, never on the wire: a send to this
                 ///< rank waits, and no receive was there before it
  kLeft = 9,     ///< reducer -> the worker in its own process, never on the wire: rank `pusher` has
                 ///< left the group in good order
  // How a lost reducer is replaced: docs/protocol.md.
  kLost = 10,   ///< worker -> rank 0's reducer: `owners` are lost to this rank
  kEpoch = 11,  ///< rank 0's reducer -> worker: `owners` are lost, for all, in this epoch; those
                ///< that were and are no more take part again from operation `slot.seq` on; or a
                ///< worker is, whose last known collective is `call`, and its number + 1 slot.seq
  kSettled =
      12,      ///< worker -> reducer: all that this rank had to move here in `epoch` has been sent
  kBeat = 13,  ///< both ways: this end is alive
  kBack = 14,  ///< worker -> rank 0's reducer: this rank has a connection to the lost owner in
               ///< `owners` again; the other way: have one, and say so. `epoch`: of which attempt.
               ///< `text`: which reducer that is, "host:pid"; without an attempt, and the other
               ///< way: "name", if the owner's name is to be looked up anew
  kHold = 15,  ///< rank 0's reducer -> worker: start no operation until the next kEpoch; the other
               ///< way: so it is, from operation `slot.seq` on. `epoch`: of which attempt
  kLate = 16,  ///< reducer -> worker: `text` says who is missing from a slot for long; rank
               ///< `pusher` is to say it aloud
  kResend = 17,  ///< both ways: what came for this slot was damaged; once more, please. The answer
                 ///< of a worker that has given it up: it will not come
};

/// Which slot of a group a frame belongs to.
struct SlotId {
  std::uint64_t lane = 0;  ///< 0: collectives; else a pair of ranks and a tag (see collective/)
  std::uint64_t seq = 0;   ///< number of the operation in its lane, in issue order, from 0
  std::uint32_t chunk = 0;
  bool operator==(const SlotId&) const = default;
};

/// What all ranks must agree on. Two frames of one slot with different calls are a mismatch.
struct Call {
  Collective collective = Collective::kAllReduce;
  ReduceOp op = ReduceOp::kNone;
  DataType dtype = DataType::kUInt8;
  std::uint8_t codec = 0;   ///< 0: as is. Others are reserved.
  Rank root = kAllRanks;    ///< root of rooted collectives, else kAllRanks
  std::uint64_t count = 0;  ///< elements of the whole operation, as the user gave it
  bool operator==(const Call&) const = default;
};

/// Who a worker is: the content of kHello.
struct Hello {
  std::uint32_t version = 0;
  std::string job;    ///< random 16 bytes, equal on all ranks of one group instance
  std::string group;  ///< its readable name, for messages
  Rank rank = 0;
  std::int32_t world_size = 0;
  std::string host;                ///< "hostname:pid", for messages
  std::uint64_t window_bytes = 0;  ///< most chunk bytes this worker will have outstanding here
  std::uint64_t config = 0;        ///< digest of the settings that must be equal on all ranks
  std::string config_text;         ///< the same settings, readable, for the message if they differ
  /// The host of every rank, numbered by its lowest rank (Placement); empty: one for each.
  std::vector<std::uint32_t> hosts;
  /// How long this end may be silent before the other takes it for lost, and the other before this
  /// one does; 0: for ever.
  std::uint32_t heartbeat_ms = 0;
  bool failover = false;  ///< the group goes on if this reducer leaves
  std::string token;      ///< the job's secret: in no message, ever; empty: it has none
  bool operator==(const Hello&) const = default;
};

/// Workers and standalone reducers of one group.
inline constexpr std::uint32_t kMaxOwners = 1 << 14;

/// Everything of a frame but the payload. Fields that a kind does not use stay at their defaults,
/// and defaults are not on the wire.
struct Frame {
  FrameKind kind = FrameKind::kPush;
  std::uint32_t epoch = 0;  ///< how many changes of owners the sender knows of; kResult: `acked`'s
  SlotId slot;
  Call call;
  /// The one rank that pushes, a rail, or kAllRanks. kError: the rank whose death is the reason.
  Rank pusher = kAllRanks;
  Rank puller = kAllRanks;       ///< the one rank that pulls, a rail, or kAllRanks
  std::uint64_t offset = 0;      ///< bytes, within the operation's transfer
  std::uint64_t length = 0;      ///< bytes of this chunk (payload size where there is a payload)
  std::uint32_t timeout_ms = 0;  ///< kPush: how long the slot may wait for other ranks; 0: for ever
  bool has_checksum = false;
  std::uint32_t checksum = 0;  ///< CRC32C of the payload
  bool fatal = false;          ///< kError: nothing more will work on this connection
  /// kPush, kSettled: every piece with a smaller key that goes to this owner is answered on this
  /// rank. kResult: on all ranks.
  std::uint64_t acked = 0;
  /// kPush: the payload is the result that another owner had given to this rank, or what this rank
  /// had pushed there and was answered; no answer is wanted.
  bool again = false;
  std::vector<std::uint32_t> owners;  ///< kLost, kEpoch, kBack: indexes of owners, rising
  Code code = Code::kOk;              ///< kError, kCancel
  std::string text;                   ///< kError, kCancel, kLate: the message
  Hello hello;                        ///< kHello; kWelcome: version, and host = the reducer's
  bool operator==(const Frame&) const = default;
};

/// The bytes that precede the payload: all fields, then tag and length of `payload_nbytes` bytes
/// (absent if 0). Followed by the payload itself they are one valid protobuf message
/// reducer.v1.Frame.
std::vector<std::byte> encodeHeader(const Frame& frame, std::size_t payload_nbytes);

struct Decoded {
  Frame frame;
  Payload payload;  ///< refers to the message's own pieces: nothing is copied
};

/// Reads a whole message. Trusts nothing: truncated or overlong varints, wrong wire types, numbers
/// out of range, an unknown kind, a payload that is not last or not of the stated size, all give
/// kInvalidArgument with a text that says what was wrong and at which byte. Unknown fields are
/// refused too (both ends speak one version; of a Hello of another one nothing but version and
/// token is promised). Texts come without control characters (utf8.h). Never allocates more than
/// the message's own size suggests.
Result<Decoded> decode(const Payload& message);

/// CRC32C (Castagnoli) of the payload's bytes, across pieces.
std::uint32_t crc32c(const Payload& payload);

}  // namespace reducer::wire
