// What is special to tcp: bytes that no end of ours sends, reasons, falling back, threads that
// help, forks. What every transport promises is in conformance_test.cc.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "conformance.h"
#include "frames.h"
#include "transport/net/greeting.h"
#include "transport/tcp/factory.h"
#include "transport/tcp/inbox.h"
#include "wire/fields.h"

namespace reducer {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::Counter;
using testing::kDeadline;
using testing::numbered;
using testing::pattern;
using testing::patternPayload;
using testing::Recorder;
using transport::Connection;
using transport::Listener;
using transport::TcpTransport;
using wire::Frame;

sockaddr_in loopback(int port) {
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  name.sin_port = htons(static_cast<std::uint16_t>(port));
  return name;
}

int portOf(const std::string& address) { return std::stoi(address.substr(address.rfind(':') + 1)); }

/// A client that is none of ours: it writes the bytes that it is told to.
class RawClient {
 public:
  explicit RawClient(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    const sockaddr_in name = loopback(portOf(address));
    EXPECT_EQ(::connect(fd_, reinterpret_cast<const sockaddr*>(&name), sizeof name), 0);
  }
  ~RawClient() { ::close(fd_); }

  void write(std::string_view bytes) {
    (void)!::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  void greet() {
    write(transport::net::kGreeting);
    EXPECT_EQ(read(transport::net::kGreetingBytes), transport::net::kAccepted);
  }
  /// Exactly so many bytes, or fewer at the end of the stream.
  std::string read(std::size_t nbytes) {
    std::string text;
    char byte = 0;
    while (text.size() < nbytes) {
      pollfd polled{fd_, POLLIN, 0};
      if (::poll(&polled, 1, 10'000) != 1 || ::recv(fd_, &byte, 1, 0) != 1) break;
      text += byte;
    }
    return text;
  }

 private:
  const int fd_;
};

std::string prefix(std::uint32_t header, std::uint32_t payload) {
  std::string bytes;
  for (const std::uint32_t size : {header, payload}) {
    for (int i = 0; i < 4; ++i) bytes += static_cast<char>(size >> (8 * i));
  }
  return bytes;
}

class TcpTransportTest : public ::testing::Test {
 protected:
  std::string listen(Recorder::Hook hook = nullptr) {
    auto listener =
        server_->listen("127.0.0.1:0", [this, hook](std::shared_ptr<Connection> connection) {
          auto recorder = std::make_shared<Recorder>(hook);
          if (admits_) connection->admit(kMaxMessageBytes);
          recorder->hold(std::move(connection));
          const std::lock_guard lock(mutex_);
          accepted_.push_back(recorder);
          accepted_changed_.notify_all();
          return recorder;
        });
    EXPECT_TRUE(listener.ok()) << listener.status().message();
    listener_ = std::move(listener).value();
    return listener_->address();
  }

  std::shared_ptr<Recorder> connect(const std::string& address, Duration timeout = seconds(5)) {
    auto recorder = std::make_shared<Recorder>();
    recorder->hold(client_->connect(address, recorder, timeout));
    clients_.push_back(recorder);
    return recorder;
  }

  std::shared_ptr<Recorder> accepted(std::size_t index = 0) {
    std::unique_lock lock(mutex_);
    if (!accepted_changed_.wait_for(lock, kDeadline, [&] { return accepted_.size() > index; })) {
      ADD_FAILURE() << "no connection came";
      return std::make_shared<Recorder>();
    }
    return accepted_[index];
  }

  void TearDown() override {
    for (const auto& client : clients_) client->drop();
    for (const auto& one : accepted_) one->drop();
  }

  bool admits_ = true;
  std::unique_ptr<TcpTransport> server_ = transport::makeTcpTransport({});
  std::unique_ptr<TcpTransport> client_ = transport::makeTcpTransport({});
  std::unique_ptr<Listener> listener_;

 private:
  std::mutex mutex_;
  std::condition_variable accepted_changed_;
  std::vector<std::shared_ptr<Recorder>> accepted_;
  std::vector<std::shared_ptr<Recorder>> clients_;
};

// ------------------------------------------------------------------ what peers send

TEST_F(TcpTransportTest, WhatIsNeitherTcpNorHttp2IsClosed) {
  const std::string address = listen();
  for (const std::string& begin :
       {std::string("GET / HTTP/1.1\r\n\r\n"), std::string(8, '\x16'),
        std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), std::string("reducer\x02", 8)}) {
    RawClient raw(address);
    raw.write(begin);
    EXPECT_EQ(raw.read(1), "") << begin;
  }
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  EXPECT_TRUE(accepted()->waitForFrames(1));
}

TEST_F(TcpTransportTest, AGreetingMayComeByteByByte) {
  const std::string address = listen();
  RawClient raw(address);
  for (const char byte : transport::net::kGreeting) raw.write(std::string_view(&byte, 1));
  EXPECT_EQ(raw.read(transport::net::kGreetingBytes), transport::net::kAccepted);
  EXPECT_EQ(accepted()->closes(), 0);
}

TEST_F(TcpTransportTest, SizesBeyondTheLimitsAreRefusedUnread) {
  const std::string address = listen();
  const std::vector<std::string> lies = {
      prefix(0xFFFFFFFF, 0),
      prefix(1, 0xFFFFFFFF),
      prefix(static_cast<std::uint32_t>(wire::kMaxHeaderBytes + 1), 0),
      prefix(10, static_cast<std::uint32_t>(kMaxChunkBytes + 1)),
      prefix(0, 0),
      prefix(0, static_cast<std::uint32_t>(kMaxTextBytes + 2))};
  for (std::size_t i = 0; i < lies.size(); ++i) {
    RawClient raw(address);
    raw.greet();
    raw.write(lies[i]);
    ASSERT_FALSE(raw.read(100).empty()) << i;  // the error
    // The other end waits for this one to close: not for ever.
    raw.write("what follows is not looked at");
    EXPECT_TRUE(accepted(i)->arrived().empty());
  }
  for (std::size_t i = 0; i < lies.size(); ++i) {
    ASSERT_TRUE(accepted(i)->waitForClose());
    EXPECT_EQ(accepted(i)->reason().code(), Code::kInvalidArgument);
    EXPECT_NE(accepted(i)->reason().message().find("the limits are"), std::string::npos)
        << accepted(i)->reason().message();
  }
}

TEST_F(TcpTransportTest, AStrangersMessagesAreSmallUntilItIsAdmitted) {
  admits_ = false;
  const std::string address = listen();
  const auto most = static_cast<std::uint32_t>(kMaxStrangerBytes);
  for (const std::string& lie : {prefix(most, 1), prefix(1, most), prefix(100, kMaxChunkBytes)}) {
    RawClient raw(address);
    raw.greet();
    raw.write(lie);
    ASSERT_FALSE(raw.read(100).empty());
  }
  for (std::size_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(accepted(i)->waitForClose());
    EXPECT_NE(accepted(i)->reason().message().find("before it has said who it is"),
              std::string::npos)
        << accepted(i)->reason().message();
  }
  const auto client = connect(address);
  client->connection()->send(numbered(0, 1000), testing::owned(pattern(0, 1000)));
  ASSERT_TRUE(accepted(3)->waitForFrames(1));
  accepted(3)->connection()->admit(kMaxMessageBytes);
  client->connection()->send(numbered(1, kMaxChunkBytes),
                             testing::owned(pattern(1, kMaxChunkBytes)));
  EXPECT_TRUE(accepted(3)->waitForFrames(2));
}

TEST_F(TcpTransportTest, GarbageIsAnsweredByWhatWasWrong) {
  const std::string address = listen();
  testing::Random random(5);
  for (std::size_t i = 0; i < 20; ++i) {
    RawClient raw(address);
    raw.greet();
    const auto garbage = testing::anyBytes(random, 1 + testing::upTo(random, 3000));
    std::string text(reinterpret_cast<const char*>(garbage.data()), garbage.size());
    text[0] = '\xFF';  // no field has this tag
    raw.write(prefix(static_cast<std::uint32_t>(text.size()), 0) + text);
    ASSERT_FALSE(raw.read(100).empty());
    EXPECT_TRUE(accepted(i)->arrived().empty());
  }
  for (std::size_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(accepted(i)->waitForClose());
    EXPECT_EQ(accepted(i)->reason().code(), Code::kInvalidArgument);
    EXPECT_NE(accepted(i)->reason().message().find("byte"), std::string::npos);
  }
}

TEST_F(TcpTransportTest, APeerThatVanishesWithinAFrameIsNamed) {
  const std::string address = listen();
  {
    RawClient raw(address);
    raw.greet();
    raw.write(prefix(20, 1000) + "not all");
    accepted();
  }
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_EQ(accepted()->reason().code(), Code::kUnavailable);
  EXPECT_NE(accepted()->reason().message().find("the connection to 127.0.0.1:"), std::string::npos)
      << accepted()->reason().message();
}

// ------------------------------------------------------------------ the inbox

TEST(TcpInbox, ReadsFramesHoweverTheyAreCut) {
  testing::Random random(7);
  transport::tcp::BlockPool pool;
  for (int run = 0; run < 30; ++run) {
    std::vector<Frame> frames;
    std::vector<std::vector<std::byte>> payloads;
    std::vector<std::byte> stream;
    for (int i = 0; i < 20; ++i) {
      const std::size_t nbytes = testing::upTo(random, i % 5 == 0 ? 400'000 : 3000);
      frames.push_back(numbered(i, nbytes));
      payloads.push_back(pattern(i, nbytes));
      const auto header = wire::encodeHeader(frames.back(), nbytes);
      for (const char byte : prefix(header.size(), nbytes)) stream.push_back(std::byte(byte));
      stream.insert(stream.end(), header.begin(), header.end());
      stream.insert(stream.end(), payloads.back().begin(), payloads.back().end());
    }
    transport::tcp::Inbox inbox(pool);
    std::vector<Payload> kept;  // blocks that are lent must not be written again
    std::size_t at = 0;
    while (at < stream.size()) {
      iovec pieces[transport::tcp::Inbox::kPiecesMax];
      const int count = inbox.space(pieces);
      std::size_t left = std::min(stream.size() - at, 1 + testing::upTo(random, 200'000));
      std::size_t taken = 0;
      for (int i = 0; i < count && left > 0; ++i) {
        const std::size_t nbytes = std::min(left, pieces[i].iov_len);
        std::memcpy(pieces[i].iov_base, stream.data() + at + taken, nbytes);
        taken += nbytes;
        left -= nbytes;
      }
      ASSERT_GT(taken, 0U);
      at += taken;
      inbox.received(taken);
      Payload message;
      std::string bad;
      while (inbox.next(message, bad) == transport::tcp::Inbox::Next::kFrame) {
        auto decoded = wire::decode(message);
        ASSERT_TRUE(decoded.ok());
        ASSERT_EQ(decoded.value().frame, frames[kept.size()]);
        kept.push_back(std::move(decoded.value().payload));
      }
    }
    ASSERT_EQ(kept.size(), frames.size());
    for (std::size_t i = 0; i < kept.size(); ++i) ASSERT_EQ(testing::copyOf(kept[i]), payloads[i]);
  }
}

// ------------------------------------------------------------------ reasons, and other servers

TEST_F(TcpTransportTest, EveryReasonTravelsBothWays) {
  const std::string address = listen();
  std::size_t index = 0;
  for (int code = 1; code <= static_cast<int>(Code::kInternal); ++code) {
    for (const bool from_server : {false, true}) {
      const Status reason(static_cast<Code>(code), "because of número " + std::to_string(code));
      const auto client = connect(address);
      client->connection()->send(numbered(0, 0), {});
      const auto server = accepted(index++);
      ASSERT_TRUE(server->waitForFrames(1));
      (from_server ? server : client)->connection()->close(reason, /*flush=*/true);
      for (const auto& end : {client, server}) {
        ASSERT_TRUE(end->waitForClose());
        EXPECT_EQ(end->reason().code(), reason.code());
        EXPECT_EQ(end->reason().message(), reason.message());
      }
    }
  }
}

TEST_F(TcpTransportTest, AReasonComesWithoutControlCharacters) {
  const std::string address = listen();
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  accepted()->connection()->close(Status(Code::kMismatch, "a\x1B[2Jb\n\tc"), /*flush=*/true);
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().message(), "a?[2Jb\n\tc");
}

/// Accepts a connection and answers whatever comes with these bytes, or closes it.
class OtherServer {
 public:
  explicit OtherServer(std::string answer)
      : fd_(socket(AF_INET, SOCK_STREAM, 0)), answer_(std::move(answer)) {
    sockaddr_in name = loopback(0);
    socklen_t nbytes = sizeof name;
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&name), nbytes), 0);
    EXPECT_EQ(::listen(fd_, 16), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&name), &nbytes), 0);
    address_ = "127.0.0.1:" + std::to_string(ntohs(name.sin_port));
    thread_ = std::thread([this] {
      for (int fd = 0; (fd = ::accept(fd_, nullptr, nullptr)) >= 0; ::close(fd)) {
        if (!answer_.empty()) (void)!::send(fd, answer_.data(), answer_.size(), MSG_NOSIGNAL);
      }
    });
  }
  ~OtherServer() {
    ::shutdown(fd_, SHUT_RDWR);
    thread_.join();
    ::close(fd_);
  }
  const std::string& address() const { return address_; }

 private:
  const int fd_;
  const std::string answer_;
  std::string address_;
  std::thread thread_;
};

TEST_F(TcpTransportTest, AServerThatDoesNotSpeakTcpIsCalledSo) {
  for (const std::string& answer : {std::string(), std::string("HTTP/1.1 400 Bad Request\r\n")}) {
    const OtherServer other(answer);
    const auto client = connect(other.address(), milliseconds(300));
    ASSERT_TRUE(client->waitForClose());
    EXPECT_EQ(client->reason().code(), Code::kUnavailable);
    EXPECT_NE(client->reason().message().find("does not speak the tcp transport"),
              std::string::npos)
        << client->reason().message();
  }
}

TEST_F(TcpTransportTest, TheFallbackGetsHandlerFramesAndClose) {
  struct Instead final : Connection {
    void send(const Frame& frame, Payload) override {
      EXPECT_EQ(frame.slot.seq, sent.value());
      sent.raise();
    }
    void close(const Status& why, bool flush) override {
      EXPECT_EQ(why.message(), "enough");
      EXPECT_TRUE(flush);
      closed.raise();
    }
    std::string peer() const override { return "instead"; }
    Counter sent;
    Counter closed;
  };
  const OtherServer other("");
  const auto instead = std::make_shared<Instead>();
  const auto handler = std::make_shared<Recorder>();
  std::string why;
  const auto connection = client_->connectOr(
      other.address(), handler, seconds(60),
      [&](std::shared_ptr<transport::Handler> given, Duration left, const std::string& text) {
        EXPECT_EQ(given, handler);
        EXPECT_GT(left, seconds(50));
        why = text;
        return instead;
      });
  for (std::uint64_t seq = 0; seq < 1000; ++seq) connection->send(numbered(seq, 0), {});
  ASSERT_TRUE(instead->sent.waitFor(1000));
  connection->close(Status(Code::kAborted, "enough"), /*flush=*/true);
  ASSERT_TRUE(instead->closed.waitFor(1));
  EXPECT_NE(why.find("it closed the connection"), std::string::npos) << why;
  EXPECT_EQ(handler->closes(), 0) << "the fallback's affair";
}

// ------------------------------------------------------------------ slow readers

TEST_F(TcpTransportTest, AFlushDoesNotWaitForAHangingPeerForEver) {
  const std::string address = listen();
  RawClient hanging(address);
  hanging.greet();
  const auto released = std::make_shared<Counter>();
  const auto server = accepted();
  for (std::uint64_t seq = 0; seq < 32; ++seq) {
    server->connection()->send(numbered(seq, 1 << 20), patternPayload(seq, 1 << 20, 1, released));
  }
  server->connection()->close(Status(Code::kAborted, "enough"), /*flush=*/true);
  ASSERT_TRUE(server->waitForClose());
  EXPECT_EQ(server->reason().message(), "enough");
  EXPECT_TRUE(released->waitFor(32));
}

TEST_F(TcpTransportTest, APayloadsReleaseMayLeadBackIntoItsConnection) {
  struct Owner {
    std::weak_ptr<Connection> connection;
    std::shared_ptr<Counter> released;
    ~Owner() {
      if (const auto alive = connection.lock()) {
        alive->send(numbered(99, 0), {});
        alive->close(Status(Code::kAborted, "from a release"), /*flush=*/false);
      }
      released->raise();
    }
  };
  static const std::vector<std::byte> bytes(1 << 20);
  const auto released = std::make_shared<Counter>();
  const std::string address = listen();
  auto hanging = std::make_unique<RawClient>(address);
  hanging->greet();
  const auto connection = accepted()->connection();
  for (std::uint64_t seq = 0; seq < 64; ++seq) {
    auto owner = std::make_shared<Owner>();
    owner->connection = connection;
    owner->released = released;
    connection->send(numbered(seq, bytes.size()), Payload(Bytes(bytes), std::move(owner)));
  }
  hanging.reset();
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_TRUE(released->waitFor(64));
}

// ------------------------------------------------------------------ threads that help

TEST_F(TcpTransportTest, AThreadThatWaitsServesTheEvents) {
  // The hook of the last frame may end after the test has.
  const auto here = std::make_shared<std::atomic<int>>(0);
  const std::string address =
      listen([here, me = std::this_thread::get_id()](Recorder&, const Frame&, const Payload&) {
        if (std::this_thread::get_id() == me) ++*here;
      });
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  const auto server = accepted();
  ASSERT_TRUE(server->waitForFrames(1));
  const auto helper = server_->helper();
  ASSERT_NE(helper, nullptr);
  for (std::size_t seq = 1; seq <= 200; ++seq) {
    client->connection()->send(numbered(seq, 0), {});
    helper->help([&] { return server->arrived().size() > seq; }, Clock::now() + kDeadline);
    ASSERT_TRUE(server->waitForFrames(seq + 1));
  }
  EXPECT_GT(*here, 0) << "it never served an event";
  testing::expectNumbered(*server, 0, 201, [](std::uint64_t) { return 0U; });
}

TEST_F(TcpTransportTest, AHelperIsWokenByWhatEndsElsewhere) {
  const auto helper = client_->helper();
  std::atomic<bool> ended = false;
  for (int i = 0; i < 50; ++i) {
    ended = false;
    std::thread other([&] {
      if (i % 2 == 0) std::this_thread::yield();
      ended = true;
      helper->wake();
    });
    const TimePoint begin = Clock::now();
    helper->help([&] { return ended.load(); }, begin + kDeadline);
    EXPECT_TRUE(ended);
    EXPECT_LT(Clock::now() - begin, milliseconds(900)) << "nobody woke it";
    other.join();
  }
  // Its time is over, or the transport is.
  helper->help([] { return false; }, Clock::now() + milliseconds(20));
  std::thread late([&] { helper->help([] { return false; }, Clock::now() + kDeadline); });
  client_.reset();
  late.join();
  helper->help([] { return false; }, Clock::now() + kDeadline);
  helper->wake();
}

TEST_F(TcpTransportTest, TimersAndTasksGoOnWhileAThreadHelps) {
  Counter ticks;
  Counter tasks;
  const auto timer = client_->every(milliseconds(5), [&](TimePoint) { ticks.raise(); });
  std::atomic<bool> ended = false;
  std::thread other([&] {
    for (std::size_t i = 1; i <= 20; ++i) {
      client_->post([&] { tasks.raise(); });
      EXPECT_TRUE(tasks.waitFor(i));
    }
    EXPECT_TRUE(ticks.waitFor(20));
    ended = true;
    client_->helper()->wake();
  });
  client_->helper()->help([&] { return ended.load(); }, Clock::now() + kDeadline);
  other.join();
}

// ------------------------------------------------------------------ processes

TEST_F(TcpTransportTest, AForkedChildHoldsNoConnectionAndMayDestroyWhatItInherited) {
  const std::string address = listen();
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  const auto timer = client_->every(milliseconds(50), [](TimePoint) {});
  const auto sockets = [port = portOf(address)] {
    int count = 0;
    for (int fd = 0; fd < 1024; ++fd) {
      sockaddr_in name{};
      socklen_t nbytes = sizeof name;
      if (getsockname(fd, reinterpret_cast<sockaddr*>(&name), &nbytes) == 0 &&
          name.sin_family == AF_INET && ntohs(name.sin_port) == port) {
        ++count;
      }
    }
    return count;
  };
  ASSERT_EQ(sockets(), 2);  // the listener and what it accepted
  const auto helper = client_->helper();
  const pid_t child = fork();
  if (child == 0) {
    const int left = sockets();
    helper->help([] { return false; }, Clock::now() + kDeadline);
    client->connection()->send(numbered(1, 0), {});
    client->drop();
    listener_.reset();
    client_.reset();
    server_.reset();
    _exit(left == 0 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  client->connection()->send(numbered(1, 0), {});
  EXPECT_TRUE(accepted()->waitForFrames(2));
}

}  // namespace
}  // namespace reducer
