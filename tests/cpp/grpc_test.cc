// What is special to gRPC: raw clients and servers at the other end, reasons in statuses, forks,
// sockets. What every transport promises is in conformance_test.cc.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "conformance.h"
#include "frames.h"
#include "reducer.grpc.pb.h"
#include "transport/grpc/factory.h"
#include "wire/frame.h"

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
using transport::Transport;
using wire::Frame;
using wire::FrameKind;

constexpr char kMethod[] = "/reducer.v1.Data/Exchange";

grpc::ByteBuffer bufferOf(const std::vector<std::byte>& bytes) {
  const grpc::Slice slice(bytes.data(), bytes.size());
  return grpc::ByteBuffer(&slice, 1);
}

std::vector<std::byte> bytesOf(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::vector<std::byte> bytes;
  for (const grpc::Slice& slice : slices) {
    const auto* begin = reinterpret_cast<const std::byte*>(slice.begin());
    bytes.insert(bytes.end(), begin, begin + slice.size());
  }
  return bytes;
}

/// A client that is none of ours: it writes the bytes that it is told to.
class RawClient {
 public:
  explicit RawClient(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    stub_ = std::make_unique<grpc::GenericStub>(
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
    context_.set_wait_for_ready(true);
    call_ = stub_->PrepareCall(&context_, kMethod, &queue_);
    call_->StartCall(&queue_);
    EXPECT_TRUE(next());
  }
  ~RawClient() {
    context_.TryCancel();
    if (!finished_) (void)finish();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  bool write(const std::vector<std::byte>& bytes) {
    call_->Write(bufferOf(bytes), &queue_);
    return next();
  }
  /// False at the stream's end.
  bool read(std::vector<std::byte>* bytes) {
    grpc::ByteBuffer buffer;
    call_->Read(&buffer, &queue_);
    if (!next()) return false;
    *bytes = bytesOf(buffer);
    return true;
  }
  bool writesDone() {
    call_->WritesDone(&queue_);
    return next();
  }
  grpc::Status finish() {
    grpc::Status status;
    finished_ = true;
    call_->Finish(&status, &queue_);
    EXPECT_TRUE(next());
    return status;
  }

 private:
  bool next() {
    void* tag = nullptr;
    bool ok = false;
    const auto deadline = std::chrono::system_clock::now() + kDeadline;
    EXPECT_EQ(queue_.AsyncNext(&tag, &ok, deadline), grpc::CompletionQueue::GOT_EVENT);
    return ok;
  }

  grpc::CompletionQueue queue_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericStub> stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool finished_ = false;
};

class GrpcTransportTest : public ::testing::Test {
 protected:
  std::string listen(Recorder::Hook hook = nullptr) {
    auto listener =
        server_->listen("127.0.0.1:0", [this, hook](std::shared_ptr<Connection> connection) {
          auto recorder = std::make_shared<Recorder>(hook);
          connection->admit(kMaxMessageBytes);
          recorder->hold(std::move(connection));
          const std::lock_guard lock(mutex_);
          accepted_.push_back(recorder);
          changed_.notify_all();
          return recorder;
        });
    EXPECT_TRUE(listener.ok()) << listener.status().message();
    listener_ = std::move(listener).value();
    return listener_->address();
  }

  std::shared_ptr<Recorder> connect(const std::string& address, Duration timeout = seconds(5)) {
    auto recorder = std::make_shared<Recorder>();
    recorder->hold(client_->connect(address, recorder, timeout));
    return recorder;
  }

  std::shared_ptr<Recorder> accepted(std::size_t index = 0) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kDeadline, [&] { return accepted_.size() > index; }));
    return accepted_.size() > index ? accepted_[index] : std::make_shared<Recorder>();
  }

  void TearDown() override {
    for (const auto& recorder : accepted_) recorder->drop();
    listener_.reset();
    client_.reset();
    server_.reset();
  }

  static transport::GrpcOptions twoThreads() {
    transport::GrpcOptions options;
    options.threads = 2;
    return options;
  }

  std::unique_ptr<Transport> server_ = transport::makeGrpcTransport(twoThreads());
  std::unique_ptr<Transport> client_ = transport::makeGrpcTransport({});
  std::unique_ptr<Listener> listener_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Recorder>> accepted_;
};

// ------------------------------------------------------------------ what others send

TEST_F(GrpcTransportTest, GarbageIsAnsweredByAnErrorFrameAndOthersGoOn) {
  const std::string address =
      listen([](Recorder& recorder, const Frame& frame, const Payload& payload) {
        recorder.connection()->send(frame, payload);
      });
  const auto good = connect(address);
  good->connection()->send(numbered(0, 10), testing::owned(pattern(0, 10)));
  ASSERT_TRUE(good->waitForFrames(1));
  testing::Random random(1);
  for (int i = 0; i < 20; ++i) {
    RawClient raw(address);
    std::vector<std::byte> garbage = testing::anyBytes(random, 1 + testing::upTo(random, 3000));
    garbage[0] = std::byte{0xFF};  // no field has this tag
    ASSERT_TRUE(raw.write(garbage));
    std::vector<std::byte> answer;
    ASSERT_TRUE(raw.read(&answer));
    const auto decoded = wire::decode(testing::owned(answer));
    ASSERT_TRUE(decoded.ok());
    Frame error = wire::Decoded(wire::decode(testing::owned(answer)).value()).frame;
    EXPECT_EQ(error.kind, FrameKind::kError);
    EXPECT_TRUE(error.fatal);
    EXPECT_EQ(error.code, Code::kInvalidArgument);
    EXPECT_NE(error.text.find("byte"), std::string::npos) << error.text;
    EXPECT_FALSE(raw.read(&answer));
    EXPECT_EQ(raw.finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  good->connection()->send(numbered(1, 10), testing::owned(pattern(1, 10)));
  EXPECT_TRUE(good->waitForFrames(2));
  EXPECT_EQ(good->closes(), 0);
}

TEST_F(GrpcTransportTest, AMessageOverTheLimitEndsItsStreamAlone) {
  const std::string address = listen();
  const auto good = connect(address);
  good->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  RawClient raw(address);
  ASSERT_TRUE(raw.write(std::vector<std::byte>(kMaxMessageBytes + 1)) || true);
  std::vector<std::byte> answer;
  while (raw.read(&answer)) {
  }
  EXPECT_FALSE(raw.finish().ok());
  ASSERT_TRUE(accepted(1)->waitForClose());
  EXPECT_TRUE(accepted(1)->arrived().empty());
  EXPECT_FALSE(accepted(1)->reason().ok());
  good->connection()->send(numbered(1, 0), {});
  EXPECT_TRUE(accepted()->waitForFrames(2));
}

TEST_F(GrpcTransportTest, AnOrdinaryClientMayCloseInGoodOrder) {
  const std::string address = listen();
  RawClient raw(address);
  ASSERT_TRUE(raw.write(testing::messageOf(numbered(3, 5), pattern(3, 5))));
  ASSERT_TRUE(raw.writesDone());
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_TRUE(accepted()->reason().ok()) << accepted()->reason().message();
  testing::expectNumbered(*accepted(), 3, 1, [](std::uint64_t) { return 5U; });
  std::vector<std::byte> answer;
  EXPECT_FALSE(raw.read(&answer));
  EXPECT_TRUE(raw.finish().ok());
}

TEST_F(GrpcTransportTest, APeerThatVanishesIsNamed) {
  const std::string address = listen();
  {
    RawClient raw(address);
    ASSERT_TRUE(raw.write(testing::messageOf(numbered(0, 0), {})));
    ASSERT_TRUE(accepted()->waitForFrames(1));
  }  // cancels the call
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_EQ(accepted()->reason().code(), Code::kUnavailable);
  EXPECT_NE(accepted()->reason().message().find("127.0.0.1:"), std::string::npos)
      << accepted()->reason().message();
}

// ------------------------------------------------------------------ reasons

TEST_F(GrpcTransportTest, EveryReasonOfAServerTravels) {
  const std::string address = listen();
  std::size_t index = 0;
  for (int code = 1; code <= static_cast<int>(Code::kInternal); ++code, ++index) {
    const Status reason(static_cast<Code>(code),
                        "because of número " + std::to_string(code) + ": 100% €\nline 2");
    const auto client = connect(address);
    client->connection()->send(numbered(0, 0), {});
    ASSERT_TRUE(accepted(index)->waitForFrames(1));
    accepted(index)->connection()->close(reason, /*flush=*/true);
    ASSERT_TRUE(client->waitForClose());
    EXPECT_EQ(client->reason().code(), reason.code());
    EXPECT_EQ(client->reason().message(), reason.message());
  }
}

TEST_F(GrpcTransportTest, AReasonComesWithoutControlCharacters) {
  const std::string address = listen();
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  accepted()->connection()->close(Status(Code::kMismatch, "a\x1B[2Jb\n\tc"), /*flush=*/true);
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().message(), "a?[2Jb\n\tc");
}

TEST_F(GrpcTransportTest, AVeryLongReasonStillTravels) {
  const std::string address = listen();
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  std::string text;
  for (int i = 0; i < 4000; ++i) text += "€";
  accepted()->connection()->close(Status(Code::kMismatch, text), /*flush=*/true);
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().code(), Code::kMismatch);
  EXPECT_EQ(client->reason().message().compare(0, 300, text, 0, 300), 0);
}

// ------------------------------------------------------------------ other servers

TEST_F(GrpcTransportTest, AGrpcServerThatIsNoReducerIsNamedSoon) {
  v1::Control::Service other;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&other);
  const auto server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);
  const std::string address = "127.0.0.1:" + std::to_string(port);
  const auto client = connect(address, seconds(60));
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().code(), Code::kUnavailable);
  EXPECT_NE(client->reason().message().find(address + " is a gRPC server, but not a reducer"),
            std::string::npos)
      << client->reason().message();
  server->Shutdown(std::chrono::system_clock::now());
}

/// Accepts TCP connections (the kernel does) and never says a word.
class SilentServer {
 public:
  SilentServer() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in name{};
    name.sin_family = AF_INET;
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t nbytes = sizeof name;
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&name), nbytes), 0);
    EXPECT_EQ(::listen(fd_, 16), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&name), &nbytes), 0);
    address_ = "127.0.0.1:" + std::to_string(ntohs(name.sin_port));
  }
  ~SilentServer() { ::close(fd_); }
  const std::string& address() const { return address_; }

 private:
  const int fd_;
  std::string address_;
};

TEST_F(GrpcTransportTest, AServerThatSaysNothingIsGivenUpAtTheDeadline) {
  const SilentServer silent;
  const auto client = connect(silent.address(), milliseconds(400));
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(client->waitForClose());
  EXPECT_EQ(client->reason().code(), Code::kUnavailable);
  EXPECT_NE(client->reason().message().find(silent.address() + " did not answer within 0.4 s"),
            std::string::npos)
      << client->reason().message();
}

TEST_F(GrpcTransportTest, ARefusedConnectionIsCalledSo) {
  std::string address;
  {
    const SilentServer gone;
    address = gone.address();
  }
  const auto client = connect(address, milliseconds(300));
  ASSERT_TRUE(client->waitForClose());
  EXPECT_NE(client->reason().message().find("connection refused"), std::string::npos)
      << client->reason().message();
  const auto unknown = connect("no-such-host.invalid:1", milliseconds(300));
  ASSERT_TRUE(unknown->waitForClose());
  EXPECT_NE(unknown->reason().message().find("'no-such-host.invalid' is not known"),
            std::string::npos)
      << unknown->reason().message();
}

TEST_F(GrpcTransportTest, ADeadlineOfConnectingIsNotOneOfTheStream) {
  const auto client = connect(listen(), milliseconds(200));
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  Counter ticks;
  const auto timer = client_->every(milliseconds(100), [&](TimePoint) { ticks.raise(); });
  ASSERT_TRUE(ticks.waitFor(4));
  client->connection()->send(numbered(1, 0), {});
  EXPECT_TRUE(accepted()->waitForFrames(2));
  EXPECT_EQ(client->closes(), 0);
}

// ------------------------------------------------------------------ sizes and ends

TEST_F(GrpcTransportTest, TheLargestChunkPassesBothWays) {
  const std::string address =
      listen([](Recorder& recorder, const Frame& frame, const Payload& payload) {
        recorder.connection()->send(frame, payload);
      });
  const auto client = connect(address);
  const auto released = std::make_shared<Counter>();
  for (std::uint64_t seq = 0; seq < 3; ++seq) {
    client->connection()->send(numbered(seq, kMaxChunkBytes),
                               patternPayload(seq, kMaxChunkBytes, 1, released));
  }
  ASSERT_TRUE(client->waitForFrames(3));
  testing::expectNumbered(*client, 0, 3, [](std::uint64_t) { return kMaxChunkBytes; });
  EXPECT_TRUE(released->waitFor(3));
}

TEST_F(GrpcTransportTest, EndsSoonThoughPeersHang) {
  const std::string address = listen();
  const auto released = std::make_shared<Counter>();
  std::vector<std::unique_ptr<RawClient>> hanging;  // they never read
  for (std::size_t i = 0; i < 4; ++i) {
    hanging.push_back(std::make_unique<RawClient>(address));
    ASSERT_TRUE(hanging.back()->write(testing::messageOf(numbered(0, 0), {})));
    ASSERT_TRUE(accepted(i)->waitForFrames(1));
    for (std::uint64_t seq = 0; seq < 32; ++seq) {
      accepted(i)->connection()->send(numbered(seq, 1 << 20),
                                      patternPayload(seq, 1 << 20, 1, released));
    }
  }
  const TimePoint begin = Clock::now();
  listener_.reset();
  server_.reset();
  EXPECT_LT(Clock::now() - begin, seconds(2));
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(accepted(i)->closes(), 1);
  EXPECT_TRUE(released->waitFor(4 * 32));
}

TEST_F(GrpcTransportTest, AFlushDoesNotWaitForAHangingPeerForEver) {
  const std::string address = listen();
  RawClient hanging(address);
  ASSERT_TRUE(hanging.write(testing::messageOf(numbered(0, 0), {})));
  ASSERT_TRUE(accepted()->waitForFrames(1));
  const auto released = std::make_shared<Counter>();
  for (std::uint64_t seq = 0; seq < 32; ++seq) {
    accepted()->connection()->send(numbered(seq, 1 << 20),
                                   patternPayload(seq, 1 << 20, 1, released));
  }
  accepted()->connection()->close(Status(Code::kAborted, "enough"), /*flush=*/true);
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_EQ(accepted()->reason().message(), "enough");
  EXPECT_TRUE(released->waitFor(32));
}

TEST_F(GrpcTransportTest, APayloadsReleaseMayLeadBackIntoItsConnection) {
  // As an operation does, whose end starts the next one: here with frames that are dropped unsent.
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
  const auto fill = [&](const std::shared_ptr<Connection>& connection) {
    for (std::uint64_t seq = 0; seq < 64; ++seq) {
      auto owner = std::make_shared<Owner>();
      owner->connection = connection;
      owner->released = released;
      connection->send(numbered(seq, bytes.size()), Payload(Bytes(bytes), std::move(owner)));
    }
  };
  const std::string address = listen();
  auto hanging = std::make_unique<RawClient>(address);
  ASSERT_TRUE(hanging->write(testing::messageOf(numbered(0, 0), {})));
  ASSERT_TRUE(accepted()->waitForFrames(1));
  fill(accepted()->connection());
  hanging.reset();  // the rest of the queue is dropped
  ASSERT_TRUE(accepted()->waitForClose());
  EXPECT_TRUE(released->waitFor(64));
  const auto unheard = connect(SilentServer().address(), seconds(60));
  fill(unheard->connection());
  unheard->connection()->close({}, /*flush=*/false);
  ASSERT_TRUE(unheard->waitForClose());
  EXPECT_TRUE(released->waitFor(128));
}

// ------------------------------------------------------------------ processes and sockets

/// How many of this process' sockets are bound to the port, or connected to it. For use after
/// fork().
int socketsWithPort(int port) {
  int count = 0;
  for (int fd = 0; fd < 1024; ++fd) {
    sockaddr_in name{};
    socklen_t nbytes = sizeof name;
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&name), &nbytes) != 0 ||
        name.sin_family != AF_INET)
      continue;
    const bool bound = ntohs(name.sin_port) == port;
    nbytes = sizeof name;
    const bool connected = getpeername(fd, reinterpret_cast<sockaddr*>(&name), &nbytes) == 0 &&
                           ntohs(name.sin_port) == port;
    if (bound || connected) ++count;
  }
  return count;
}

TEST_F(GrpcTransportTest, AForkedChildHoldsNoConnectionAndMayDestroyWhatItInherited) {
  const std::string address = listen();
  const auto client = connect(address);
  client->connection()->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  const auto timer = client_->every(milliseconds(50), [](TimePoint) {});
  const int port = std::stoi(address.substr(address.rfind(':') + 1));
  // The dialer lets go of its own soon after the peer was admitted.
  const auto deadline = std::chrono::steady_clock::now() + seconds(5);
  while (socketsWithPort(port) != 3 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  ASSERT_EQ(socketsWithPort(port), 3);
  const pid_t child = fork();
  if (child == 0) {
    // Were they open here, the others would not notice that the parent dies.
    const int left = socketsWithPort(port);
    client->connection()->send(numbered(1, 0), {});
    client->connection()->close({}, /*flush=*/true);
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

TEST_F(GrpcTransportTest, EachConnectionMayHaveItsCongestionControl) {
  // "auto" is reno, which every Linux kernel has.
  const auto reno = transport::makeGrpcTransport(transport::GrpcOptions());
  const auto handler = std::make_shared<Recorder>();
  const auto connection = reno->connect(listen(), handler, seconds(5));
  connection->send(numbered(0, 0), {});
  ASSERT_TRUE(accepted()->waitForFrames(1));
  const std::string address = listener_->address();
  const int port = std::stoi(address.substr(address.rfind(':') + 1));
  std::map<std::string, int> kinds;
  for (int fd = 0; fd < 1024; ++fd) {
    sockaddr_in name{};
    socklen_t nbytes = sizeof name;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&name), &nbytes) != 0 ||
        ntohs(name.sin_port) != port)
      continue;
    char kind[16] = {};
    nbytes = sizeof kind;
    ASSERT_EQ(getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, kind, &nbytes), 0);
    ++kinds[kind];
  }
  EXPECT_EQ(kinds, (std::map<std::string, int>{{"reno", 1}}));
}

TEST_F(GrpcTransportTest, AnUnknownCongestionControlIsRefusedByName) {
  transport::GrpcOptions options;
  options.congestion_control = "nosuch";
  const auto odd = transport::makeGrpcTransport(options);
  const auto listener =
      odd->listen("127.0.0.1:0", [](std::shared_ptr<Connection>) { return nullptr; });
  ASSERT_FALSE(listener.ok());
  EXPECT_NE(listener.status().message().find("'nosuch' cannot be used"), std::string::npos);
  EXPECT_NE(listener.status().message().find("reno"), std::string::npos)
      << listener.status().message();
  const auto handler = std::make_shared<Recorder>();
  const auto connection = odd->connect(listen(), handler, milliseconds(200));
  ASSERT_TRUE(handler->waitForClose());
  EXPECT_NE(handler->reason().message().find("'nosuch' cannot be used"), std::string::npos);
}

}  // namespace
}  // namespace reducer
