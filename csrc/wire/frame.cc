// Writing: see decode.cc for the other direction.
#include "wire/frame.h"

#include <cstring>
#include <string_view>

#include "common/check.h"
#include "common/limits.h"
#include "wire/fields.h"
#include "wire/utf8.h"

namespace reducer::wire {
namespace {

/// All numbers of a frame, its payload's tag and length: 18 varints of at most 10 bytes and their
/// tags fit.
constexpr std::size_t kNumbersBytesMax = 256;

/// Writes fields into memory that is known to suffice.
class Writer {
 public:
  explicit Writer(std::byte* at) : at_(at) {}

  std::byte* at() const { return at_; }

  void varint(std::uint64_t value) {
    while (value >= 0x80) {
      *at_++ = static_cast<std::byte>(value | 0x80);
      value >>= 7;
    }
    *at_++ = static_cast<std::byte>(value);
  }

  /// Proto3: a field that is 0 is not written.
  void number(std::uint32_t tag, std::uint64_t value) {
    if (value != 0) always(tag, value);
  }

  void always(std::uint32_t tag, std::uint64_t value) {
    varint(tag);
    varint(value);
  }

  template <class T>
  void fixed(std::uint32_t tag, T value) {
    varint(tag);
    for (std::size_t i = 0; i < sizeof value; ++i)
      *at_++ = static_cast<std::byte>(value >> (8 * i));
  }

  void bytes(std::uint32_t tag, std::string_view value) {
    if (value.empty()) return;
    varint(tag);
    varint(value.size());
    std::memcpy(at_, value.data(), value.size());
    at_ += value.size();
  }

 private:
  std::byte* at_;
};

std::uint64_t onWire(Rank rank) {
  const std::int64_t number =
      isRail(rank) ? std::int64_t{kMaxWorldSize} + 1 + shareOf(rank) : std::int64_t{rank} + 1;
  return static_cast<std::uint64_t>(number);
}

void writeNumbers(Writer& out, const Frame& frame) {
  const bool about_slot = frame.kind == FrameKind::kPush || frame.kind == FrameKind::kResult;
  const Call& call = frame.call;
  out.always(frame_tag::kKind, static_cast<std::uint64_t>(frame.kind));
  out.number(frame_tag::kEpoch, frame.epoch);
  out.number(frame_tag::kLane, frame.slot.lane);
  out.number(frame_tag::kSeq, frame.slot.seq);
  out.number(frame_tag::kChunk, frame.slot.chunk);
  // 0 is no collective and no type: where they have a meaning they are written, else only if set.
  if (about_slot || call.collective != Call().collective) {
    out.always(frame_tag::kCollective, static_cast<std::uint64_t>(call.collective));
  }
  out.number(frame_tag::kOp, static_cast<std::uint64_t>(call.op));
  if (about_slot || call.dtype != Call().dtype) {
    out.always(frame_tag::kDtype, static_cast<std::uint64_t>(call.dtype));
  }
  out.number(frame_tag::kCodec, call.codec);
  out.number(frame_tag::kRoot, onWire(call.root));
  out.number(frame_tag::kCount, call.count);
  out.number(frame_tag::kPusher, onWire(frame.pusher));
  out.number(frame_tag::kPuller, onWire(frame.puller));
  out.number(frame_tag::kOffset, frame.offset);
  out.number(frame_tag::kLength, frame.length);
  out.number(frame_tag::kTimeoutMs, frame.timeout_ms);
  if (frame.has_checksum) out.fixed(frame_tag::kChecksum, frame.checksum);
  out.number(frame_tag::kFatal, frame.fatal ? 1 : 0);
  out.number(frame_tag::kCode, static_cast<std::uint64_t>(frame.code));
}

void writePayloadPrefix(Writer& out, std::size_t payload_nbytes) {
  if (payload_nbytes == 0) return;
  out.varint(frame_tag::kPayload);
  out.varint(payload_nbytes);
}

/// What comes behind the text and the hello, where there are such.
void writeFailover(Writer& out, const Frame& frame) {
  out.number(frame_tag::kAcked, frame.acked);
  out.number(frame_tag::kAgain, frame.again ? 1 : 0);
}

void writeOwners(Writer& out, const std::vector<std::uint32_t>& owners) {
  if (owners.empty()) return;
  REDUCER_CHECK(owners.size() <= kMaxOwners && owners.back() < kMaxOwners);
  std::vector<std::byte> packed(kMaxOwnersBytes);
  Writer content(packed.data());
  for (const std::uint32_t owner : owners) content.varint(owner);
  const auto nbytes = static_cast<std::size_t>(content.at() - packed.data());
  out.bytes(frame_tag::kOwners, {reinterpret_cast<const char*>(packed.data()), nbytes});
}

void writeHosts(Writer& out, const std::vector<std::uint32_t>& hosts) {
  if (hosts.empty()) return;
  REDUCER_CHECK(hosts.size() <= static_cast<std::size_t>(kMaxWorldSize));
  std::byte packed[kMaxHostsBytes];
  Writer content(packed);
  for (const std::uint32_t host : hosts) content.varint(host);
  const auto nbytes = static_cast<std::size_t>(content.at() - packed);
  out.bytes(hello_tag::kHosts, {reinterpret_cast<const char*>(packed), nbytes});
}

std::vector<std::byte> encodeHello(const Hello& hello) {
  const std::string group = toUtf8(hello.group, kMaxTextBytes);
  const std::string host = toUtf8(hello.host, kMaxTextBytes);
  const std::string config_text = toUtf8(hello.config_text, kMaxTextBytes);
  const std::string_view job = std::string_view(hello.job).substr(0, kMaxTextBytes);
  std::vector<std::byte> bytes(kNumbersBytesMax + job.size() + group.size() + host.size() +
                               config_text.size() + kMaxHostsBytes + kMaxTokenBytes);
  Writer out(bytes.data());
  out.number(hello_tag::kVersion, hello.version);
  out.bytes(hello_tag::kJob, job);
  out.bytes(hello_tag::kGroup, group);
  out.number(hello_tag::kRank, static_cast<std::uint32_t>(hello.rank));
  out.number(hello_tag::kWorldSize, static_cast<std::uint32_t>(hello.world_size));
  out.bytes(hello_tag::kHost, host);
  out.number(hello_tag::kWindowBytes, hello.window_bytes);
  if (hello.config != 0) out.fixed(hello_tag::kConfig, hello.config);
  out.bytes(hello_tag::kConfigText, config_text);
  writeHosts(out, hello.hosts);
  out.number(hello_tag::kHeartbeatMs, hello.heartbeat_ms);
  out.number(hello_tag::kFailover, hello.failover ? 1 : 0);
  out.bytes(hello_tag::kToken, std::string_view(hello.token).substr(0, kMaxTokenBytes));
  bytes.resize(static_cast<std::size_t>(out.at() - bytes.data()));
  return bytes;
}

/// The rare frames: errors, the two that open a connection, lost owners.
std::vector<std::byte> encodeWithTexts(const Frame& frame, std::size_t payload_nbytes,
                                       bool with_hello) {
  const std::string text = toUtf8(frame.text, kMaxTextBytes);
  std::vector<std::byte> hello;
  if (with_hello) hello = encodeHello(frame.hello);
  const std::size_t owners_bytes = frame.owners.empty() ? 0 : kMaxOwnersBytes;
  std::vector<std::byte> header(kNumbersBytesMax + text.size() + hello.size() + owners_bytes);
  Writer out(header.data());
  writeNumbers(out, frame);
  out.bytes(frame_tag::kText, text);
  if (with_hello) {
    out.varint(frame_tag::kHello);
    out.varint(hello.size());
    if (!hello.empty()) std::memcpy(out.at(), hello.data(), hello.size());
    out = Writer(out.at() + hello.size());
  }
  writeFailover(out, frame);
  writeOwners(out, frame.owners);
  writePayloadPrefix(out, payload_nbytes);
  header.resize(static_cast<std::size_t>(out.at() - header.data()));
  return header;
}

}  // namespace

std::vector<std::byte> encodeHeader(const Frame& frame, std::size_t payload_nbytes) {
  const bool with_hello = frame.kind == FrameKind::kHello || frame.kind == FrameKind::kWelcome;
  if (with_hello || !frame.text.empty() || !frame.owners.empty()) {
    return encodeWithTexts(frame, payload_nbytes, with_hello);
  }
  std::byte numbers[kNumbersBytesMax];
  Writer out(numbers);
  writeNumbers(out, frame);
  writeFailover(out, frame);
  writePayloadPrefix(out, payload_nbytes);
  return std::vector<std::byte>(numbers, out.at());
}

}  // namespace reducer::wire
