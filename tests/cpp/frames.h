// Frames for tests: random ones of every kind, all of them as a peer may rightly send them.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/payload.h"
#include "wire/frame.h"

namespace reducer::testing {

using Random = std::mt19937_64;

inline std::uint64_t upTo(Random& random, std::uint64_t max) {
  return std::uniform_int_distribution<std::uint64_t>(0, max)(random);
}

/// A number of any magnitude, small ones as often as large ones, so that every varint length
/// occurs.
inline std::uint64_t anyNumber(Random& random, int bits) {
  const std::uint64_t all = bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
  return random() & all >> upTo(random, static_cast<std::uint64_t>(bits) - 1);
}

inline std::string anyText(Random& random) {
  static const std::vector<std::string> letters = {"a", "Z", " ", "\n", "0", "ü", "€", "😀", "~"};
  std::string text;
  const std::uint64_t length = upTo(random, 9) == 0 ? upTo(random, 2000) : upTo(random, 20);
  for (std::uint64_t i = 0; i < length; ++i) text += letters[upTo(random, letters.size() - 1)];
  return text;
}

inline std::string anyJob(Random& random) {
  std::string job(16, '\0');
  for (char& byte : job) byte = static_cast<char>(random());
  return job;
}

inline Rank anyRankOrAll(Random& random) {
  return static_cast<Rank>(upTo(random, static_cast<std::uint64_t>(kMaxWorldSize))) - 1;
}

/// A rank, all ranks, or a rail.
inline Rank anyRanks(Random& random) {
  if (upTo(random, 2) > 0) return anyRankOrAll(random);
  return rail(static_cast<Rank>(upTo(random, kMaxWorldSize - 1)));
}

/// The host of every rank, or nothing.
inline std::vector<std::uint32_t> anyHosts(Random& random, std::int32_t world_size) {
  std::vector<std::uint32_t> hosts;
  if (upTo(random, 2) == 0) return hosts;
  std::uint32_t next = 0;
  const std::uint64_t apart = upTo(random, 3);
  for (std::int32_t rank = 0; rank < world_size; ++rank) {
    const bool another = rank == 0 || upTo(random, apart) == 0;
    hosts.push_back(another ? next : static_cast<std::uint32_t>(upTo(random, next - 1)));
    next += another ? 1 : 0;
  }
  return hosts;
}

inline wire::Hello anyHello(Random& random) {
  wire::Hello hello;
  hello.version = kProtocolVersion;
  hello.job = anyJob(random);
  hello.group = anyText(random);
  hello.world_size = 1 + static_cast<std::int32_t>(upTo(random, kMaxWorldSize - 1));
  hello.rank = static_cast<Rank>(upTo(random, static_cast<std::uint64_t>(hello.world_size) - 1));
  hello.host = anyText(random);
  hello.window_bytes = anyNumber(random, 64);
  hello.config = random();
  hello.config_text = anyText(random);
  hello.hosts = anyHosts(random, hello.world_size);
  hello.heartbeat_ms = static_cast<std::uint32_t>(anyNumber(random, 32));
  hello.failover = upTo(random, 1) == 1;
  if (upTo(random, 1) == 0) hello.token = anyText(random).substr(0, kMaxTokenBytes);
  return hello;
}

/// A frame with all the fields that its kind may have at random values. `payload_nbytes` gets the
/// size of the payload that must go with it.
inline wire::Frame anyFrame(Random& random, std::size_t payload_nbytes_max,
                            std::size_t& payload_nbytes) {
  wire::Frame frame;
  const std::uint64_t kind = 1 + upTo(random, 14);  // 8 and 9 never leave a process
  frame.kind = static_cast<wire::FrameKind>(kind < 8 ? kind : kind + 2);
  payload_nbytes = 0;
  frame.epoch = static_cast<std::uint32_t>(anyNumber(random, 32));
  frame.slot = {anyNumber(random, 64), anyNumber(random, 64),
                static_cast<std::uint32_t>(anyNumber(random, 32))};
  if (frame.kind == wire::FrameKind::kHello) frame.hello = anyHello(random);
  if (frame.kind == wire::FrameKind::kWelcome) {
    frame.hello.version = kProtocolVersion;
    frame.hello.host = anyText(random);
  }
  if (frame.kind == wire::FrameKind::kLost || frame.kind == wire::FrameKind::kEpoch ||
      frame.kind == wire::FrameKind::kBack) {
    std::uint32_t owner = 0;
    const std::uint64_t least = frame.kind == wire::FrameKind::kEpoch ? 0 : 1;
    for (std::uint64_t i = upTo(random, 20) + least; i > 0; --i) {
      owner += 1 + static_cast<std::uint32_t>(upTo(random, 300));
      frame.owners.push_back(owner);
    }
    if (upTo(random, 1) == 1) frame.text = anyText(random);
  }
  if (frame.kind == wire::FrameKind::kSettled) frame.acked = anyNumber(random, 64);
  if (frame.kind == wire::FrameKind::kLate) {
    frame.pusher = anyRankOrAll(random);
    frame.text = anyText(random);
  }
  if (frame.kind == wire::FrameKind::kError || frame.kind == wire::FrameKind::kCancel) {
    frame.fatal = upTo(random, 1) == 1;
    frame.code = static_cast<Code>(upTo(random, 8));
    frame.text = anyText(random);
  }
  if (frame.kind == wire::FrameKind::kPush || frame.kind == wire::FrameKind::kResult) {
    frame.call.collective = static_cast<Collective>(1 + upTo(random, 9));
    frame.call.op = static_cast<ReduceOp>(upTo(random, 8));
    frame.call.dtype = static_cast<DataType>(1 + upTo(random, 16));
    frame.call.root = anyRankOrAll(random);
    frame.call.count = anyNumber(random, 64);
    frame.pusher = anyRanks(random);
    frame.puller = anyRanks(random);
    frame.offset = anyNumber(random, 62);
    frame.acked = anyNumber(random, 64);
    frame.again = frame.kind == wire::FrameKind::kPush && upTo(random, 1) == 1;
    frame.timeout_ms = static_cast<std::uint32_t>(anyNumber(random, 32));
    frame.length = upTo(random, payload_nbytes_max);
    if (upTo(random, 3) > 0) payload_nbytes = frame.length;
    frame.has_checksum = upTo(random, 1) == 1;
    if (frame.has_checksum) frame.checksum = static_cast<std::uint32_t>(random());
  }
  return frame;
}

inline std::vector<std::byte> anyBytes(Random& random, std::size_t nbytes) {
  std::vector<std::byte> bytes(nbytes);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

/// One piece that owns its bytes.
inline Payload owned(std::vector<std::byte> bytes) {
  auto owner = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  const Bytes piece(*owner);
  return Payload(piece, std::move(owner));
}

/// The same bytes in pieces that end at `cuts` (ascending). Each piece has memory of exactly its
/// size, so that a sanitizer sees a step over its end.
inline Payload inPieces(const std::vector<std::byte>& bytes, const std::vector<std::size_t>& cuts) {
  auto owner = std::make_shared<std::vector<std::unique_ptr<std::byte[]>>>();
  std::vector<Bytes> pieces;
  std::size_t begin = 0;
  const auto add = [&](std::size_t end) {
    if (end <= begin) return;
    owner->push_back(std::make_unique<std::byte[]>(end - begin));
    std::copy(bytes.begin() + static_cast<std::ptrdiff_t>(begin),
              bytes.begin() + static_cast<std::ptrdiff_t>(end), owner->back().get());
    pieces.emplace_back(owner->back().get(), end - begin);
    begin = end;
  };
  for (const std::size_t cut : cuts) add(cut);
  add(bytes.size());
  return Payload(std::move(pieces), std::move(owner));
}

inline std::vector<std::byte> copyOf(const Payload& payload) {
  std::vector<std::byte> bytes(payload.nbytes());
  payload.copyTo(bytes.data());
  return bytes;
}

/// The whole message: header, then payload.
inline std::vector<std::byte> messageOf(const wire::Frame& frame,
                                        const std::vector<std::byte>& payload) {
  std::vector<std::byte> message = wire::encodeHeader(frame, payload.size());
  message.insert(message.end(), payload.begin(), payload.end());
  return message;
}

}  // namespace reducer::testing
