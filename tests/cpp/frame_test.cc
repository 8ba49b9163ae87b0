#include "wire/frame.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "frames.h"
#include "wire/crc32c.h"

namespace reducer {
namespace {

using testing::anyBytes;
using testing::anyFrame;
using testing::copyOf;
using testing::inPieces;
using testing::messageOf;
using testing::owned;
using testing::Random;
using testing::upTo;
using wire::Decoded;
using wire::Frame;
using wire::FrameKind;

std::vector<std::byte> raw(std::initializer_list<int> values) {
  std::vector<std::byte> bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

Result<Decoded> decodeAlone(const std::vector<std::byte>& bytes) {
  return wire::decode(inPieces(bytes, {}));
}

/// Expects that `bytes` are refused with a text that contains `part`.
void expectRefused(const std::vector<std::byte>& bytes, const std::string& part) {
  const auto decoded = decodeAlone(bytes);
  ASSERT_FALSE(decoded.ok()) << "wanted: " << part;
  EXPECT_EQ(decoded.status().code(), Code::kInvalidArgument);
  EXPECT_NE(decoded.status().message().find(part), std::string::npos)
      << decoded.status().message() << "\nwanted: " << part;
}

Frame pushFrame(std::uint64_t length) {
  Frame frame;
  frame.kind = FrameKind::kPush;
  frame.slot = {0, 300, 7};
  frame.call = {Collective::kAllReduce, ReduceOp::kSum, DataType::kFloat32, 0, kAllRanks, 1 << 20};
  frame.length = length;
  return frame;
}

Frame helloFrame() {
  Frame frame;
  frame.kind = FrameKind::kHello;
  frame.hello = {
      kProtocolVersion, std::string(16, 'j'), "dp", 1, 4, "node1:77", 1 << 20, 5, "a=b", {}};
  return frame;
}

TEST(Frame, RandomFramesComeBackEqual) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    std::size_t nbytes = 0;
    const Frame frame = anyFrame(random, 300, nbytes);
    const auto payload = anyBytes(random, nbytes);
    auto decoded = decodeAlone(messageOf(frame, payload));
    ASSERT_TRUE(decoded.ok()) << i << ": " << decoded.status().message();
    ASSERT_EQ(decoded.value().frame, frame) << i;
    ASSERT_EQ(copyOf(decoded.value().payload), payload) << i;
  }
}

TEST(Frame, EveryPairOfCutsGivesTheSame) {
  Random random(2);
  for (int i = 0; i < 40; ++i) {
    std::size_t nbytes = 0;
    Frame frame = anyFrame(random, 40, nbytes);
    frame.text.resize(0);
    const auto payload = anyBytes(random, nbytes);
    const auto message = messageOf(frame, payload);
    if (message.size() > 200) continue;
    for (std::size_t a = 0; a <= message.size(); ++a) {
      for (std::size_t b = a; b <= message.size(); b += 1 + b % 3) {
        auto decoded = wire::decode(inPieces(message, {a, b}));
        ASSERT_TRUE(decoded.ok()) << a << " " << b << ": " << decoded.status().message();
        ASSERT_EQ(decoded.value().frame, frame);
        ASSERT_EQ(copyOf(decoded.value().payload), payload);
      }
    }
  }
}

TEST(Frame, LongHeadersMayStraddlePiecesAnywhere) {
  Random random(3);
  Frame frame = helloFrame();
  frame.hello.group = std::string(8000, 'g');
  frame.hello.config_text = std::string(kMaxTextBytes, 'c');
  const auto message = messageOf(frame, {});
  for (int i = 0; i < 300; ++i) {
    std::vector<std::size_t> cuts;
    for (std::uint64_t n = upTo(random, 20); n > 0; --n)
      cuts.push_back(upTo(random, message.size()));
    std::sort(cuts.begin(), cuts.end());
    auto decoded = wire::decode(inPieces(message, cuts));
    ASSERT_TRUE(decoded.ok()) << decoded.status().message();
    ASSERT_EQ(decoded.value().frame, frame);
  }
}

TEST(Frame, SingleBytePiecesWork) {
  Random random(4);
  const auto payload = anyBytes(random, 1000);
  const Frame frame = pushFrame(payload.size());
  const auto message = messageOf(frame, payload);
  std::vector<std::size_t> cuts(message.size());
  for (std::size_t i = 0; i < cuts.size(); ++i) cuts[i] = i;
  auto decoded = wire::decode(inPieces(message, cuts));
  ASSERT_TRUE(decoded.ok()) << decoded.status().message();
  EXPECT_EQ(decoded.value().frame, frame);
  EXPECT_EQ(copyOf(decoded.value().payload), payload);
  EXPECT_EQ(decoded.value().payload.pieces().size(), payload.size());
}

TEST(Frame, ThePayloadIsNotCopied) {
  Random random(5);
  const auto payload = anyBytes(random, 100);
  const auto message = messageOf(pushFrame(payload.size()), payload);
  const Payload whole = inPieces(message, {message.size() - 60});
  auto decoded = wire::decode(whole);
  ASSERT_TRUE(decoded.ok());
  const Payload& out = decoded.value().payload;
  EXPECT_EQ(out.owner(), whole.owner());
  ASSERT_EQ(out.pieces().size(), 2U);
  EXPECT_EQ(out.pieces()[0].data() + 40, whole.pieces()[0].data() + whole.pieces()[0].size());
  EXPECT_EQ(out.pieces()[1].data(), whole.pieces()[1].data());
}

TEST(Frame, ATruncatedMessageIsRefusedAtEveryByte) {
  Random random(6);
  for (int i = 0; i < 300; ++i) {
    std::size_t nbytes = 0;
    const Frame frame = anyFrame(random, 60, nbytes);
    const auto message = messageOf(frame, anyBytes(random, nbytes));
    const std::size_t numbers_nbytes = wire::encodeHeader(frame, 0).size();
    for (std::size_t length = 0; length < message.size(); ++length) {
      const std::vector<std::byte> part(message.begin(),
                                        message.begin() + static_cast<std::ptrdiff_t>(length));
      auto decoded = decodeAlone(part);
      // Protobuf has no end mark: without its last fields a message is another one, if the cut is
      // between two of them. But nothing of a payload may be missing, and no field may be broken.
      if (!decoded.ok()) continue;
      ASSERT_LE(length, numbers_nbytes);
      ASSERT_EQ(decoded.value().payload.nbytes(), 0U);
      ASSERT_EQ(wire::encodeHeader(decoded.value().frame, 0), part);
    }
  }
}

TEST(Frame, MutatedMessagesNeverCrash) {
  Random random(7);
  std::size_t accepted = 0;
  for (int i = 0; i < 60000; ++i) {
    std::size_t nbytes = 0;
    const Frame frame = anyFrame(random, 30, nbytes);
    auto message = messageOf(frame, anyBytes(random, nbytes));
    for (std::uint64_t n = 1 + upTo(random, 3); n > 0 && !message.empty(); --n) {
      const auto at =
          message.begin() + static_cast<std::ptrdiff_t>(upTo(random, message.size() - 1));
      switch (upTo(random, 3)) {
        case 0:
          *at = static_cast<std::byte>(random());
          break;
        case 1:
          *at ^= static_cast<std::byte>(1 << upTo(random, 7));
          break;
        case 2:
          message.erase(at);
          break;
        default:
          message.insert(at, static_cast<std::byte>(random()));
          break;
      }
    }
    const std::size_t cut = upTo(random, message.size());
    auto decoded = wire::decode(inPieces(message, {cut}));
    const auto alone = decodeAlone(message);
    ASSERT_EQ(decoded.ok(), alone.ok());
    if (!decoded.ok()) {
      ASSERT_EQ(decoded.status().message(), alone.status().message());
      continue;
    }
    ++accepted;
    // What is accepted can be written again and means the same.
    auto again = decodeAlone(messageOf(decoded.value().frame, copyOf(decoded.value().payload)));
    if (decoded.value().frame.hello.version == kProtocolVersion ||
        decoded.value().frame.kind != FrameKind::kHello) {
      ASSERT_TRUE(again.ok()) << again.status().message();
      ASSERT_EQ(again.value().frame, decoded.value().frame);
    }
  }
  EXPECT_GT(accepted, 100U);
}

TEST(Frame, RandomBytesNeverCrash) {
  Random random(8);
  for (int i = 0; i < 100000; ++i) {
    auto bytes = anyBytes(random, upTo(random, 80));
    if (bytes.size() > 1 && upTo(random, 1) == 1) {
      bytes[0] = std::byte{0x08};
      bytes[1] = static_cast<std::byte>(1 + upTo(random, 6));
    }
    auto decoded = decodeAlone(bytes);
    ASSERT_EQ(decoded.ok(), decoded.status().message().empty());
  }
}

TEST(Frame, RefusesWhatIsNoMessage) {
  expectRefused({}, "it is empty");
  expectRefused(raw({0x10, 5}), "it has no kind");
  expectRefused(raw({0x08, 0}), "kind 0 is not known");
  expectRefused(raw({0x08, 8}), "kind 8 is not known");
  expectRefused(raw({0x08, 7, 0x08, 7}), "field 1 comes twice (byte 3)");
  expectRefused(raw({0x08, 9}), "kind 9 is not known");
  expectRefused(raw({0x08, 18}), "kind 18 is not known");
  expectRefused(raw({0x08, 10}), "lost owners, but none is named");
  expectRefused(raw({0x08, 14}), "lost owners, but none is named");
  EXPECT_TRUE(decodeAlone(raw({0x08, 11})).ok());  // none are lost any more
  expectRefused(raw({0x08, 7, 0xC2, 1, 1, 3}), "owners in a frame that has none (kind 7)");
  expectRefused(raw({0x08, 11, 0xC2, 1, 0}), "a list of no owners");
  expectRefused(raw({0x08, 11, 0xC2, 1, 2, 3, 3}), "owners that do not rise");
  expectRefused(raw({0x08, 11, 0xC2, 1, 3, 0x80, 0x80, 1}), "owner 16384 is over the limit");
  wire::Frame push;
  push.kind = wire::FrameKind::kPush;
  push.text = "more than a slot's places are counted for";
  expectRefused(wire::encodeHeader(push, 0), "a push or result has no text");
  expectRefused(raw({0x08, 7, 0xB8, 1, 1}), "only a push comes again, and this is of kind 7");
  expectRefused(raw({0x08, 7, 0xC8, 1, 1}), "field 25 of wire type 0 is not known");
  expectRefused(raw({0x08, 7, 0x80, 2, 1}), "field 32 of wire type 0 is not known");
  expectRefused(raw({0x08, 7, 0x12, 1, 1}), "field 2 of wire type 2 is not known");
  expectRefused(raw({0x08, 7, 0x00, 1}), "field 0");
  expectRefused(raw({0x08, 0x87, 0x00}), "a number written longer than it is");
  expectRefused(raw({0x08, 7, 0x18, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2}),
                "a number of more than 64 bits");
  expectRefused(raw({0x08, 7, 0x18, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1}),
                "a number of more than 64 bits");
  expectRefused(raw({0x08, 7, 0x10, 255, 255, 255, 255, 31}), "epoch 8589934591 is over the limit");
  expectRefused(raw({0x08, 7, 0x18}), "it ends within a field (byte 3)");
  expectRefused(raw({0x08, 5, 0x8D, 1, 1, 2, 3}), "it ends within a field");
  expectRefused(std::vector<std::byte>(kMaxMessageBytes + 1), "bytes and the limit is");
}

TEST(Frame, RefusesNumbersOutOfRange) {
  const auto header = [](auto change, std::size_t payload_nbytes = 0) {
    Frame frame = pushFrame(payload_nbytes);
    change(frame);
    return wire::encodeHeader(frame, 0);
  };
  EXPECT_TRUE(decodeAlone(header([](Frame&) {})).ok());
  EXPECT_TRUE(decodeAlone(header([](Frame& f) { f.call.dtype = kLastDataType; })).ok());
  expectRefused(header([](Frame& f) { f.call.dtype = static_cast<DataType>(18); }), "dtype 18");
  expectRefused(header([](Frame& f) { f.call.dtype = static_cast<DataType>(0); }), "dtype 0");
  expectRefused(header([](Frame& f) { f.call.op = static_cast<ReduceOp>(9); }), "op 9");
  expectRefused(header([](Frame& f) { f.call.collective = static_cast<Collective>(12); }),
                "collective 12");
  expectRefused(header([](Frame& f) { f.call.codec = 1; }), "codec 1");
  expectRefused(header([](Frame& f) { f.code = static_cast<Code>(9); }), "code 9");
  expectRefused(header([](Frame& f) { f.call.root = kMaxWorldSize; }), "root + 1 4097 is over");
  expectRefused(header([](Frame& f) { f.pusher = rail(kMaxWorldSize); }),
                "pusher + 1 8193 is over");
  expectRefused(header([](Frame& f) { f.puller = rail(1 << 20); }), "puller + 1");
  expectRefused(header([](Frame& f) { f.length = kMaxChunkBytes + 1; }), "length 16777217 is over");
  expectRefused(header([](Frame& f) { f.offset = ~std::uint64_t{0}, f.length = 1; }),
                "offset + length is over 64 bits");
  expectRefused(raw({0x08, 3, 0x40, 1}), "names its collective and dtype");
}

TEST(Frame, RefusesPayloadsThatDoNotFit) {
  Random random(9);
  const auto payload = anyBytes(random, 10);
  auto message = messageOf(pushFrame(10), payload);
  message.push_back(std::byte{1});
  expectRefused(message, "the payload says 10 bytes and 11 follow");
  message.pop_back();
  message.pop_back();
  expectRefused(message, "the payload says 10 bytes and 9 follow");
  expectRefused(messageOf(pushFrame(11), payload), "length is 11 and the payload has 10 bytes");
  Frame bye;
  bye.kind = FrameKind::kBye;
  bye.length = 10;
  expectRefused(messageOf(bye, payload), "a payload in a frame that has none");
}

TEST(Frame, RefusesBadHellos) {
  const auto hello = [](auto change) {
    Frame frame = helloFrame();
    change(frame.hello);
    return wire::encodeHeader(frame, 0);
  };
  EXPECT_TRUE(decodeAlone(hello([](wire::Hello&) {})).ok());
  expectRefused(hello([](wire::Hello& h) { h.rank = 4; }), "rank 4 of a world of 4");
  expectRefused(hello([](wire::Hello& h) { h.rank = -1; }), "in hello: rank 4294967295 is over");
  expectRefused(hello([](wire::Hello& h) { h.world_size = 0; }), "the world size is 0");
  expectRefused(hello([](wire::Hello& h) { h.world_size = kMaxWorldSize + 1; }), "world size 4097");
  EXPECT_TRUE(decodeAlone(hello([](wire::Hello& h) { h.hosts = {0, 1, 0, 2}; })).ok());
  expectRefused(hello([](wire::Hello& h) {
                  h.hosts = {0, 1, 3, 2};
                }),
                "in hello: in hosts: host 3 is over the limit of 2");
  expectRefused(hello([](wire::Hello& h) {
                  h.hosts = {0, 1, 0};
                }),
                "the hosts of 3 ranks in a world of 4");
  expectRefused(raw({0x08, 1, 0xAA, 1, 4, 0x08, kProtocolVersion, 0x52, 0}),
                "in hello: hosts of no rank");
  // 256 bytes may be a token; of a longer one nothing is read.
  EXPECT_TRUE(decodeAlone(hello([](wire::Hello& h) { h.token = std::string(256, 't'); })).ok());
  expectRefused(raw({0x08, 1, 0xAA, 1, 5, 0x08, kProtocolVersion, 0x6A, 0x81, 2}),
                "in hello: token 257 is over the limit of 256");
  expectRefused(raw({0x08, 2}), "a hello or welcome without its content");
  expectRefused(raw({0x08, 1}), "a hello or welcome without its content");
  expectRefused(raw({0x08, 7, 0xAA, 1, 0}), "a hello in a frame that has none");
  expectRefused(raw({0x08, 1, 0xAA, 1, 3, 0x08, kProtocolVersion, 0x20}),
                "in hello: it ends within a field");
  expectRefused(raw({0x08, 1, 0xAA, 1, 4, 0x08, kProtocolVersion, 0x50, 1}), "in hello: field 10");
  expectRefused(raw({0x08, 1, 0xAA, 1, 4, 0x08, kProtocolVersion, 0x08, kProtocolVersion}),
                "in hello: field 1 comes twice");
}

TEST(Frame, AHelloOfAnotherVersionIsReadAsFarAsItsVersion) {
  Frame frame = helloFrame();
  frame.hello.version = kProtocolVersion + 1;
  auto same_fields = decodeAlone(wire::encodeHeader(frame, 0));
  ASSERT_TRUE(same_fields.ok());
  EXPECT_EQ(same_fields.value().frame.hello.version, kProtocolVersion + 1);
  // Fields, wire types and orders that this version does not have.
  const auto future = raw({0xA2, 6,    2, 1,    1, 0xAA, 1, 10,   0x50, 1, 0x12, 1, 7,
                           0x08, 0xE7, 7, 0x22, 0, 0x08, 1, 0x9D, 3,    1, 2,    3, 4});
  for (std::size_t cut = 0; cut < future.size(); ++cut) {
    auto decoded = wire::decode(inPieces(future, {cut}));
    ASSERT_TRUE(decoded.ok()) << decoded.status().message();
    EXPECT_EQ(decoded.value().frame.kind, FrameKind::kHello);
    EXPECT_EQ(decoded.value().frame.hello.version, 999U);
    if (cut > 18) {
      const std::vector<std::byte> part(future.begin(), future.begin() + std::ptrdiff_t(cut));
      EXPECT_EQ(decodeAlone(part).ok(), cut == 20) << cut;
    }
  }
  // Its token decides whether it is told of this end's.
  auto known = decodeAlone(raw({0x08, 1, 0xAA, 1, 9, 0x08, 99, 0x50, 1, 0x6A, 3, 'k', 'e', 'y'}));
  ASSERT_TRUE(known.ok()) << known.status().message();
  EXPECT_EQ(known.value().frame.hello.token, "key");
  EXPECT_EQ(known.value().frame.hello.version, 99U);
  // No version at all is version 0; a hello of this version is not excused.
  EXPECT_TRUE(decodeAlone(raw({0x08, 1, 0xAA, 1, 0})).ok());
  expectRefused(raw({0x08, 1, 0xAA, 1, 2, 0x08, kProtocolVersion, 0xA2, 6, 0}), "field 100");
}

TEST(Frame, TextsAreCutAndMadeUtf8BySendersAndCheckedByReceivers) {
  Frame error;
  error.kind = FrameKind::kError;
  error.text = std::string(kMaxTextBytes - 1, 'x') + "€uro";
  auto cut = decodeAlone(wire::encodeHeader(error, 0));
  ASSERT_TRUE(cut.ok()) << cut.status().message();
  EXPECT_EQ(cut.value().frame.text, std::string(kMaxTextBytes - 1, 'x'));
  error.text = "caf\xE9 \xC0\x80 \xED\xA0\x80 \xF5 ok\xE2\x82";
  auto mended = decodeAlone(wire::encodeHeader(error, 0));
  ASSERT_TRUE(mended.ok()) << mended.status().message();
  EXPECT_EQ(mended.value().frame.text, "caf? ?? ??? ? ok??");
  expectRefused(raw({0x08, 5, 0xA2, 1, 2, 0xC3, 0x28}), "text is not UTF-8");
  std::vector<std::byte> long_text = raw({0x08, 5, 0xA2, 1, 0x81, 0x40});
  long_text.resize(long_text.size() + kMaxTextBytes + 1, std::byte{'x'});
  expectRefused(long_text, "text 8193 is over the limit of 8192");
}

TEST(Frame, TextsOfPeersHaveNoControlCharacters) {
  std::string all;
  for (int c = 0; c < 0x80; ++c) all += static_cast<char>(c);
  all += "é\u0085";  // C1 has a place of its own in Unicode
  std::string wanted = all;
  for (char& c : wanted) {
    if (c == '\x7F' || (c >= 0 && c < ' ' && c != '\n' && c != '\t')) c = '?';
  }
  ASSERT_EQ(std::count(wanted.begin(), wanted.end(), '?'), 1 + 30 + 1);
  Frame hello = helloFrame();
  hello.hello.group = hello.hello.host = hello.hello.config_text = all;
  hello.hello.token = all.substr(0, 20);
  auto decoded = decodeAlone(wire::encodeHeader(hello, 0));
  ASSERT_TRUE(decoded.ok()) << decoded.status().message();
  const wire::Hello read = decoded.value().frame.hello;
  EXPECT_EQ(read.group, wanted);
  EXPECT_EQ(read.host, wanted);
  EXPECT_EQ(read.config_text, wanted);
  EXPECT_EQ(read.token, hello.hello.token);  // in no message
  for (const FrameKind kind : {FrameKind::kError, FrameKind::kCancel, FrameKind::kLate}) {
    Frame frame;
    frame.kind = kind;
    frame.text = "\x1B]0;title\x07 two\nlines\tand \x9B";
    auto one = decodeAlone(wire::encodeHeader(frame, 0));
    ASSERT_TRUE(one.ok()) << one.status().message();
    EXPECT_EQ(one.value().frame.text, "?]0;title? two\nlines\tand ?");
  }
}

TEST(Frame, DefaultsAreNotOnTheWire) {
  Frame bye;
  bye.kind = FrameKind::kBye;
  EXPECT_EQ(wire::encodeHeader(bye, 0), raw({0x08, 7}));
  EXPECT_LE(wire::encodeHeader(pushFrame(1 << 20), 1 << 20).size(), 32U);
}

TEST(Crc32c, KnownValues) {
  const std::string digits = "123456789";
  const auto of = [](const std::string& text) {
    std::vector<std::byte> bytes(text.size());
    if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
    return wire::crc32c(owned(bytes));
  };
  EXPECT_EQ(of(digits), 0xE3069283U);
  EXPECT_EQ(of(""), 0U);
  EXPECT_EQ(of(std::string(32, '\0')), 0x8A9136AAU);  // RFC 3720, B.4
  EXPECT_EQ(of(std::string(32, '\xFF')), 0x62A8AB43U);
}

TEST(Crc32c, TableInstructionAndPiecesAgree) {
  Random random(10);
  for (int i = 0; i < 2000; ++i) {
    const auto bytes = anyBytes(random, upTo(random, 200));
    std::vector<std::size_t> cuts;
    for (std::uint64_t n = upTo(random, 5); n > 0; --n) cuts.push_back(upTo(random, bytes.size()));
    std::sort(cuts.begin(), cuts.end());
    const std::uint32_t one = wire::crc32c(owned(bytes));
    ASSERT_EQ(wire::crc32c(inPieces(bytes, cuts)), one);
    ASSERT_EQ(wire::internal::crc32cByTable(inPieces(bytes, cuts)), one);
  }
}

}  // namespace
}  // namespace reducer
