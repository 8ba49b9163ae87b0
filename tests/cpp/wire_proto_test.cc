// The hand-written codec and the one that protobuf generates from reducer.proto say the same.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "frames.h"
#include "reducer.pb.h"
#include "wire/frame.h"

namespace reducer {
namespace {

using testing::anyBytes;
using testing::anyFrame;
using testing::copyOf;
using testing::messageOf;
using testing::owned;
using testing::Random;
using wire::Frame;
using wire::FrameKind;

std::string asString(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::vector<std::byte> asBytes(const std::string& text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

std::uint32_t onWire(Rank rank) {
  return static_cast<std::uint32_t>(isRail(rank) ? 4097 + shareOf(rank) : rank + 1);
}

bool aboutSlot(const Frame& frame) {
  return frame.kind == FrameKind::kPush || frame.kind == FrameKind::kResult;
}

void fillHello(const wire::Hello& hello, v1::Hello& out) {
  out.set_version(hello.version);
  out.set_job(hello.job);
  out.set_group(hello.group);
  out.set_rank(static_cast<std::uint32_t>(hello.rank));
  out.set_world_size(static_cast<std::uint32_t>(hello.world_size));
  out.set_host(hello.host);
  out.set_window_bytes(hello.window_bytes);
  out.set_config(hello.config);
  out.set_config_text(hello.config_text);
  for (const std::uint32_t host : hello.hosts) out.add_hosts(host);
  out.set_heartbeat_ms(hello.heartbeat_ms);
  out.set_failover(hello.failover);
  out.set_token(hello.token);
}

/// The same frame as another client would build it.
v1::Frame toProto(const Frame& frame, const std::vector<std::byte>& payload) {
  v1::Frame out;
  out.set_kind(static_cast<std::uint32_t>(frame.kind));
  out.set_epoch(frame.epoch);
  out.set_lane(frame.slot.lane);
  out.set_seq(frame.slot.seq);
  out.set_chunk(frame.slot.chunk);
  if (aboutSlot(frame)) {
    out.set_collective(static_cast<std::uint32_t>(frame.call.collective));
    out.set_op(static_cast<std::uint32_t>(frame.call.op));
    out.set_dtype(static_cast<std::uint32_t>(frame.call.dtype));
    out.set_codec(frame.call.codec);
    out.set_count(frame.call.count);
  }
  out.set_root(onWire(frame.call.root));
  out.set_pusher(onWire(frame.pusher));
  out.set_puller(onWire(frame.puller));
  out.set_offset(frame.offset);
  out.set_length(frame.length);
  out.set_timeout_ms(frame.timeout_ms);
  if (frame.has_checksum) out.set_checksum(frame.checksum);
  out.set_fatal(frame.fatal);
  out.set_code(static_cast<std::uint32_t>(frame.code));
  out.set_text(frame.text);
  if (frame.kind == FrameKind::kHello || frame.kind == FrameKind::kWelcome) {
    fillHello(frame.hello, *out.mutable_hello());
  }
  out.set_acked(frame.acked);
  out.set_again(frame.again);
  for (const std::uint32_t owner : frame.owners) out.add_owners(owner);
  out.set_payload(asString(payload));
  return out;
}

TEST(WireProto, WhatWeWriteProtobufReads) {
  Random random(21);
  for (int i = 0; i < 5000; ++i) {
    std::size_t nbytes = 0;
    const Frame frame = anyFrame(random, 200, nbytes);
    const auto payload = anyBytes(random, nbytes);
    v1::Frame parsed;
    ASSERT_TRUE(parsed.ParseFromString(asString(messageOf(frame, payload)))) << i;
    ASSERT_TRUE(parsed.GetReflection()->GetUnknownFields(parsed).empty());
    ASSERT_EQ(parsed.SerializeAsString(), toProto(frame, payload).SerializeAsString()) << i;
  }
}

TEST(WireProto, WhatProtobufWritesWeRead) {
  Random random(22);
  for (int i = 0; i < 5000; ++i) {
    std::size_t nbytes = 0;
    const Frame frame = anyFrame(random, 200, nbytes);
    const auto payload = anyBytes(random, nbytes);
    const std::string message = toProto(frame, payload).SerializeAsString();
    auto decoded = wire::decode(owned(asBytes(message)));
    ASSERT_TRUE(decoded.ok()) << i << ": " << decoded.status().message();
    ASSERT_EQ(decoded.value().frame, frame) << i;
    ASSERT_EQ(copyOf(decoded.value().payload), payload) << i;
    ASSERT_EQ(asString(messageOf(frame, payload)), message)
        << "not the same bytes, though the same meaning";
  }
}

TEST(WireProto, TheHelloOfALaterVersionIsStillReadAsAHello) {
  v1::Frame future;
  future.set_kind(1);
  future.mutable_hello()->set_version(12);
  future.mutable_hello()
      ->GetReflection()
      ->MutableUnknownFields(future.mutable_hello())
      ->AddVarint(77, 5);
  future.GetReflection()->MutableUnknownFields(&future)->AddLengthDelimited(
      99, "what this version cannot know");
  auto decoded = wire::decode(owned(asBytes(future.SerializeAsString())));
  ASSERT_TRUE(decoded.ok()) << decoded.status().message();
  EXPECT_EQ(decoded.value().frame.kind, FrameKind::kHello);
  EXPECT_EQ(decoded.value().frame.hello.version, 12U);
}

}  // namespace
}  // namespace reducer
