// Reading: a hand-written parser of one protobuf message, for bytes that anybody may have sent.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

#include "common/limits.h"
#include "wire/fields.h"
#include "wire/frame.h"
#include "wire/utf8.h"

namespace reducer::wire {
namespace {

constexpr std::uint64_t kMaxUint32 = 0xFFFFFFFFU;

std::string_view viewOf(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

[[gnu::cold]] Status malformed(const std::string& what) {
  return Status(Code::kInvalidArgument, "malformed frame: " + what);
}

/// Reads fields from contiguous bytes. The first failure (a call that returns false) ends the
/// reading, and problem() says why. A failure for want of bytes says so by ranOut(): they may be
/// only the message's beginning.
class Reader {
 public:
  /// `base`: where in the message `bytes` begins, for the texts of errors.
  Reader(Bytes bytes, std::size_t base)
      : begin_(bytes.data()), at_(bytes.data()), end_(bytes.data() + bytes.size()), base_(base) {}

  bool atEnd() const { return at_ == end_; }
  std::size_t left() const { return static_cast<std::size_t>(end_ - at_); }
  std::size_t position() const { return base_ + static_cast<std::size_t>(at_ - begin_); }
  bool ranOut() const { return ran_out_; }
  /// Empty while all is well.
  const std::string& problem() const { return problem_; }

  bool varint(std::uint64_t& value) {
    if (at_ != end_ && *at_ < std::byte{0x80}) {
      value = std::to_integer<std::uint64_t>(*at_++);
      return true;
    }
    return longVarint(value);
  }

  bool number(std::uint64_t max, const char* name, std::uint64_t& value) {
    if (!varint(value)) return false;
    return value <= max || outOfRange(name, value, max);
  }

  template <class T>
  bool number(std::uint64_t max, const char* name, T& out) {
    std::uint64_t value;
    if (!number(max, name, value)) return false;
    out = static_cast<T>(value);
    return true;
  }

  /// An enumeration whose numbers are min..max without a gap.
  template <class T>
  bool known(std::uint64_t min, std::uint64_t max, const char* name, T& out) {
    std::uint64_t value;
    if (!varint(value)) return false;
    if (value < min || value > max)
      return fail(std::string(name) + " " + std::to_string(value) + " is not known");
    out = static_cast<T>(value);
    return true;
  }

  /// rank + 1, or 0 for kAllRanks.
  bool rank(const char* name, Rank& out) {
    std::uint64_t value;
    if (!number(kMaxWorldSize, name, value)) return false;
    out = static_cast<Rank>(value) - 1;
    return true;
  }

  /// The same, or a rail: kMaxWorldSize + 1 + its share.
  bool ranks(const char* name, Rank& out) {
    std::uint64_t value;
    if (!number(2 * kMaxWorldSize, name, value)) return false;
    out = static_cast<Rank>(value) - 1;
    if (out >= kMaxWorldSize) out = rail(out - kMaxWorldSize);
    return true;
  }

  /// The host of every rank, each numbered when its lowest rank comes.
  bool hosts(std::vector<std::uint32_t>& out) {
    Bytes content;
    if (!bytes(kMaxHostsBytes, "hosts", content)) return false;
    if (content.empty()) return fail("hosts of no rank");
    Reader in(content, position() - content.size());
    std::uint32_t next = 0;
    while (!in.atEnd()) {
      std::uint32_t host = 0;
      if (out.size() == static_cast<std::size_t>(kMaxWorldSize)) {
        return fail("hosts of more than " + std::to_string(kMaxWorldSize) + " ranks");
      }
      if (!in.number(next, "host", host)) return failIn("hosts", in);
      if (host == next) ++next;
      out.push_back(host);
    }
    return true;
  }

  /// Indexes, rising.
  bool owners(std::vector<std::uint32_t>& out) {
    Bytes content;
    if (!bytes(kMaxOwnersBytes, "owners", content)) return false;
    if (content.empty()) return fail("a list of no owners");
    Reader in(content, position() - content.size());
    while (!in.atEnd()) {
      std::uint32_t owner = 0;
      if (!in.number(kMaxOwners - 1, "owner", owner)) return failIn("owners", in);
      if (!out.empty() && owner <= out.back()) return fail("owners that do not rise");
      out.push_back(owner);
    }
    return true;
  }

  template <class T>
  bool fixed(T& out) {
    if (left() < sizeof(T)) return failShort();
    out = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) out |= std::to_integer<T>(*at_++) << (8 * i);
    return true;
  }

  bool bytes(std::size_t max, const char* name, Bytes& out) {
    std::uint64_t length;
    if (!number(max, name, length)) return false;
    if (left() < length) return failShort();
    out = Bytes(at_, static_cast<std::size_t>(length));
    at_ += length;
    return true;
  }

  /// Any bytes.
  bool string(const char* name, std::string& out, std::size_t max = kMaxTextBytes) {
    Bytes content;
    if (!bytes(max, name, content)) return false;
    out.assign(viewOf(content));
    return true;
  }

  /// What people read: UTF-8, without control characters.
  bool text(const char* name, std::string& out) {
    Bytes content;
    if (!bytes(kMaxTextBytes, name, content)) return false;
    if (!isUtf8(viewOf(content))) return fail(std::string(name) + " is not UTF-8");
    out = withoutControls(viewOf(content));
    return true;
  }

  /// Passes over a field of any kind that protobuf knows (but groups, which proto3 does not write).
  bool skip(std::uint64_t tag) {
    std::uint64_t value;
    Bytes content;
    switch (tag & 7) {
      case kVarint:
        return varint(value);
      case kFixed64:
        return fixed(value);
      case kDelimited:
        return bytes(kMaxMessageBytes, "a field", content);
      case kFixed32: {
        std::uint32_t word;
        return fixed(word);
      }
      default:
        return fail("wire type " + std::to_string(tag & 7) + " is not known");
    }
  }

  [[gnu::cold]] bool fail(const std::string& what) {
    if (problem_.empty()) problem_ = what + " (byte " + std::to_string(position()) + ")";
    return false;
  }

  /// Takes over what went wrong in a part.
  [[gnu::cold]] bool failIn(const char* part, const Reader& inner) {
    problem_ = std::string("in ") + part + ": " + inner.problem();
    return false;
  }

  [[gnu::cold]] bool unexpected(std::uint64_t tag) {
    return fail("field " + std::to_string(tag >> 3) + " of wire type " + std::to_string(tag & 7) +
                " is not known to protocol version " + std::to_string(kProtocolVersion));
  }

  /// The next field's tag; a field may come once only. (No field that is known has a number
  /// over 31.)
  bool tag(std::uint64_t& tag) {
    if (!varint(tag)) return false;
    if (tag >> 3 > 31) return unexpected(tag);
    const std::uint32_t bit = 1U << (tag >> 3);
    if ((met_ & bit) != 0) return fail("field " + std::to_string(tag >> 3) + " comes twice");
    met_ |= bit;
    return true;
  }
  bool met(std::uint32_t tag) const { return (met_ >> (tag >> 3) & 1) != 0; }

 private:
  [[gnu::cold]] bool failShort() {
    ran_out_ = true;
    return fail("it ends within a field");
  }

  [[gnu::cold]] bool outOfRange(const char* name, std::uint64_t value, std::uint64_t max) {
    return fail(std::string(name) + " " + std::to_string(value) + " is over the limit of " +
                std::to_string(max));
  }

  bool longVarint(std::uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (at_ == end_) return failShort();
      const auto byte = std::to_integer<std::uint64_t>(*at_++);
      if (shift == 63 && byte > 1) return fail("a number of more than 64 bits");
      value |= (byte & 0x7F) << shift;
      if (byte < 0x80) return byte != 0 || shift == 0 || fail("a number written longer than it is");
    }
    return fail("a number of more than 64 bits");
  }

  const std::byte* begin_;
  const std::byte* at_;
  const std::byte* end_;
  std::size_t base_;
  std::uint32_t met_ = 0;  // by field number; they end at 31
  bool ran_out_ = false;
  std::string problem_;
};

bool readHelloField(Reader& in, std::uint64_t tag, Hello& hello) {
  switch (tag) {
    case hello_tag::kVersion:
      return in.number(kMaxUint32, "version", hello.version);
    case hello_tag::kJob:
      return in.string("job", hello.job);
    case hello_tag::kGroup:
      return in.text("group", hello.group);
    case hello_tag::kRank:
      return in.number(kMaxWorldSize - 1, "rank", hello.rank);
    case hello_tag::kWorldSize:
      return in.number(kMaxWorldSize, "world size", hello.world_size);
    case hello_tag::kHost:
      return in.text("host", hello.host);
    case hello_tag::kWindowBytes:
      return in.varint(hello.window_bytes);
    case hello_tag::kConfig:
      return in.fixed(hello.config);
    case hello_tag::kConfigText:
      return in.text("config text", hello.config_text);
    case hello_tag::kHosts:
      return in.hosts(hello.hosts);
    case hello_tag::kHeartbeatMs:
      return in.number(kMaxUint32, "heartbeat", hello.heartbeat_ms);
    case hello_tag::kFailover:
      return in.number(1, "failover", hello.failover);
    case hello_tag::kToken:
      return in.string("token", hello.token, kMaxTokenBytes);
    default:
      return in.unexpected(tag);
  }
}

bool readHello(Reader& outer, Hello& hello) {
  Bytes content;
  if (!outer.bytes(kMaxHeaderBytes, "hello", content)) return false;
  Reader in(content, outer.position() - content.size());
  while (!in.atEnd()) {
    std::uint64_t tag;
    if (!in.tag(tag) || !readHelloField(in, tag, hello)) return outer.failIn("hello", in);
  }
  return true;
}

/// Some kinds never leave a process.
bool kind(Reader& in, FrameKind& out) {
  std::uint64_t value;
  if (!in.varint(value)) return false;
  const bool here = value == static_cast<std::uint64_t>(FrameKind::kArrived) ||
                    value == static_cast<std::uint64_t>(FrameKind::kLeft);
  if (value < 1 || value > static_cast<std::uint64_t>(FrameKind::kResend) || here) {
    return in.fail("kind " + std::to_string(value) + " is not known");
  }
  out = static_cast<FrameKind>(value);
  return true;
}

/// Every field but the payload.
bool readField(Reader& in, std::uint64_t tag, Frame& frame) {
  switch (tag) {
    case frame_tag::kKind:
      return kind(in, frame.kind);
    case frame_tag::kEpoch:
      return in.number(kMaxUint32, "epoch", frame.epoch);
    case frame_tag::kLane:
      return in.varint(frame.slot.lane);
    case frame_tag::kSeq:
      return in.varint(frame.slot.seq);
    case frame_tag::kChunk:
      return in.number(kMaxUint32, "chunk", frame.slot.chunk);
    case frame_tag::kCollective:
      return in.known(1, static_cast<std::uint64_t>(kLastCollective), "collective",
                      frame.call.collective);
    case frame_tag::kOp:
      return in.known(0, 8, "op", frame.call.op);
    case frame_tag::kDtype:
      return in.known(1, static_cast<std::uint64_t>(kLastDataType), "dtype", frame.call.dtype);
    case frame_tag::kCodec:
      return in.known(0, 0, "codec", frame.call.codec);
    case frame_tag::kRoot:
      return in.rank("root + 1", frame.call.root);
    case frame_tag::kCount:
      return in.varint(frame.call.count);
    case frame_tag::kPusher:
      return in.ranks("pusher + 1", frame.pusher);
    case frame_tag::kPuller:
      return in.ranks("puller + 1", frame.puller);
    case frame_tag::kOffset:
      return in.varint(frame.offset);
    case frame_tag::kLength:
      return in.number(kMaxChunkBytes, "length", frame.length);
    case frame_tag::kTimeoutMs:
      return in.number(kMaxUint32, "timeout_ms", frame.timeout_ms);
    case frame_tag::kChecksum:
      return frame.has_checksum = in.fixed(frame.checksum);
    case frame_tag::kFatal:
      return in.number(1, "fatal", frame.fatal);
    case frame_tag::kCode:
      return in.known(0, 8, "code", frame.code);
    case frame_tag::kText:
      return in.text("text", frame.text);
    case frame_tag::kHello:
      return readHello(in, frame.hello);
    case frame_tag::kAcked:
      return in.varint(frame.acked);
    case frame_tag::kAgain:
      return in.number(1, "again", frame.again);
    case frame_tag::kOwners:
      return in.owners(frame.owners);
    default:
      return in.unexpected(tag);
  }
}

/// What one field alone cannot tell.
bool consistent(Reader& in, const Frame& frame, std::size_t payload_nbytes) {
  const bool about_slot = frame.kind == FrameKind::kPush || frame.kind == FrameKind::kResult;
  if (!in.met(frame_tag::kKind)) return in.fail("it has no kind");
  if (about_slot && !(in.met(frame_tag::kCollective) && in.met(frame_tag::kDtype))) {
    return in.fail("a push or result names its collective and dtype");
  }
  if (in.met(frame_tag::kPayload)) {
    if (!about_slot)
      return in.fail("a payload in a frame that has none (kind " + std::to_string(int(frame.kind)) +
                     ")");
    if (frame.length != payload_nbytes) {
      return in.fail("length is " + std::to_string(frame.length) + " and the payload has " +
                     std::to_string(payload_nbytes) + " bytes");
    }
  }
  if (frame.offset + frame.length < frame.offset) return in.fail("offset + length is over 64 bits");
  const bool opens = frame.kind == FrameKind::kHello || frame.kind == FrameKind::kWelcome;
  if (opens != in.met(frame_tag::kHello)) {
    return opens ? in.fail("a hello or welcome without its content")
                 : in.fail("a hello in a frame that has none (kind " +
                           std::to_string(int(frame.kind)) + ")");
  }
  const bool may_list = frame.kind == FrameKind::kEpoch;  // none are lost any more
  const bool lists = frame.kind == FrameKind::kLost || frame.kind == FrameKind::kBack;
  if (!may_list && lists != in.met(frame_tag::kOwners)) {
    return lists ? in.fail("lost owners, but none is named")
                 : in.fail("owners in a frame that has none (kind " +
                           std::to_string(int(frame.kind)) + ")");
  }
  if (about_slot && in.met(frame_tag::kText)) return in.fail("a push or result has no text");
  if (frame.again && frame.kind != FrameKind::kPush) {
    return in.fail("only a push comes again, and this is of kind " +
                   std::to_string(int(frame.kind)));
  }
  if (frame.kind == FrameKind::kHello) {
    if (frame.hello.world_size < 1) return in.fail("the world size is 0");
    if (frame.hello.rank >= frame.hello.world_size) {
      return in.fail("rank " + std::to_string(frame.hello.rank) + " of a world of " +
                     std::to_string(frame.hello.world_size));
    }
    const std::size_t hosts = frame.hello.hosts.size();
    if (hosts != 0 && hosts != static_cast<std::size_t>(frame.hello.world_size)) {
      return in.fail("the hosts of " + std::to_string(hosts) + " ranks in a world of " +
                     std::to_string(frame.hello.world_size));
    }
  }
  return true;
}

enum class Outcome { kDone, kNeedMore, kBad };

/// Reads the header from `region`, the first bytes of a message of `total` bytes. The payload is
/// what follows `payload_at`. kNeedMore: the header does not end within the region.
Outcome readHeader(Bytes region, std::size_t total, Frame& frame, std::size_t& payload_at,
                   Status& bad) {
  Reader in(region, 0);
  const bool whole = region.size() == total;
  std::uint64_t payload_nbytes = 0;
  bool good = true;
  while (good && !in.met(frame_tag::kPayload)) {
    if (in.atEnd()) {
      if (!whole) return Outcome::kNeedMore;
      break;
    }
    std::uint64_t tag;
    good = in.tag(tag);
    if (good && tag == frame_tag::kPayload) {
      good = in.varint(payload_nbytes);
      if (good && payload_nbytes != total - in.position()) {
        good = in.fail("the payload says " + std::to_string(payload_nbytes) + " bytes and " +
                       std::to_string(total - in.position()) + " follow, though it comes last");
      }
    } else if (good) {
      good = readField(in, tag, frame);
    }
  }
  payload_at = in.position();
  if (good && consistent(in, frame, static_cast<std::size_t>(payload_nbytes)))
    return Outcome::kDone;
  if (in.ranOut() && !whole) return Outcome::kNeedMore;
  bad = malformed(in.problem());
  return Outcome::kBad;
}

/// The bytes [begin, end of message) of `message`, in its own pieces.
Payload sliceFrom(const Payload& message, std::size_t begin) {
  if (begin == message.nbytes()) return {};
  const std::span<const Bytes> all = message.pieces();
  std::size_t index = 0;
  for (; begin >= all[index].size(); ++index) begin -= all[index].size();
  if (index + 1 == all.size()) return Payload(all[index].subspan(begin), message.owner());
  std::vector<Bytes> pieces(all.begin() + static_cast<std::ptrdiff_t>(index), all.end());
  pieces.front() = pieces.front().subspan(begin);
  return Payload(std::move(pieces), message.owner());
}

/// Copies the first bytes of `message` to `out`, as many as both have.
Bytes gather(const Payload& message, std::span<std::byte> out) {
  std::size_t filled = 0;
  for (const Bytes& piece : message.pieces()) {
    const std::size_t part = std::min(piece.size(), out.size() - filled);
    if (part > 0) std::memcpy(out.data() + filled, piece.data(), part);
    filled += part;
    if (filled == out.size()) break;
  }
  return out.first(filled);
}

/// The header where it lies if it does not straddle pieces, else from a copy of the first bytes:
/// few if they suffice.
Outcome findHeader(const Payload& message, Frame& frame, std::size_t& payload_at, Status& bad) {
  const std::size_t total = message.nbytes();
  Outcome outcome = readHeader(message.pieces()[0], total, frame, payload_at, bad);
  if (outcome != Outcome::kNeedMore) return outcome;
  std::byte few[512];
  frame = {};
  outcome = readHeader(gather(message, few), total, frame, payload_at, bad);
  if (outcome != Outcome::kNeedMore) return outcome;
  std::vector<std::byte> many(std::min(total, kMaxHeaderBytes));
  frame = {};
  outcome = readHeader(gather(message, many), total, frame, payload_at, bad);
  if (outcome == Outcome::kNeedMore) {
    bad = malformed("its header is longer than " + std::to_string(kMaxHeaderBytes) + " bytes");
    return Outcome::kBad;
  }
  return outcome;
}

/// Walks over well-formed fields of any number and keeps the last number under `number_tag` and the
/// last content under `content_tag`, as any protobuf parser would. False if the bytes are not well
/// formed.
bool findFields(Bytes bytes, std::uint32_t number_tag, std::uint64_t& number,
                std::uint32_t content_tag, std::optional<Bytes>& content) {
  Reader in(bytes, 0);
  while (!in.atEnd()) {
    std::uint64_t tag;
    if (!in.varint(tag) || tag >> 3 == 0) return false;
    if (tag == number_tag) {
      if (!in.varint(number)) return false;
    } else if (tag == content_tag) {
      if (!in.bytes(kMaxHeaderBytes, "content", content.emplace())) return false;
    } else if (!in.skip(tag)) {
      return false;
    }
  }
  return true;
}

/// True if `message` is the hello of a worker of another protocol version, whatever else it says.
/// Its version is read, and its token, without which it is not to learn of this end's.
bool isForeignHello(const Payload& message, Frame& frame) {
  if (message.nbytes() > kMaxHeaderBytes) return false;
  std::vector<std::byte> copy(message.nbytes());
  message.copyTo(copy.data());
  std::uint64_t kind = 0;
  std::uint64_t version = 0;
  std::optional<Bytes> hello;
  std::optional<Bytes> token;
  if (!findFields(copy, frame_tag::kKind, kind, frame_tag::kHello, hello) || !hello ||
      kind != static_cast<std::uint64_t>(FrameKind::kHello)) {
    return false;
  }
  if (!findFields(*hello, hello_tag::kVersion, version, hello_tag::kToken, token) ||
      version > kMaxUint32 || version == kProtocolVersion) {
    return false;
  }
  frame = {};
  frame.kind = FrameKind::kHello;
  frame.hello.version = static_cast<std::uint32_t>(version);
  if (token && token->size() <= kMaxTokenBytes) frame.hello.token = viewOf(*token);
  return true;
}

}  // namespace

Result<Decoded> decode(const Payload& message) {
  if (message.nbytes() == 0) return malformed("it is empty");
  if (message.nbytes() > kMaxMessageBytes) {
    return malformed("it has " + std::to_string(message.nbytes()) + " bytes and the limit is " +
                     std::to_string(kMaxMessageBytes));
  }
  Decoded decoded;
  Status bad;
  std::size_t payload_at = 0;
  if (findHeader(message, decoded.frame, payload_at, bad) == Outcome::kDone) {
    decoded.payload = sliceFrom(message, payload_at);
    return decoded;
  }
  if (isForeignHello(message, decoded.frame)) return decoded;
  return bad;
}

}  // namespace reducer::wire
