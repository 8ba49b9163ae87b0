#include "transport/grpc/client_stream.h"

#include <utility>

#include "transport/address.h"
#include "transport/grpc/reason.h"
#include "transport/grpc/server_stream.h"

namespace reducer::transport::grpc_detail {
namespace {

// How long the dialer's thread may be kept to find out what is wrong.
constexpr Duration kHandshakeMax = std::chrono::seconds(3);

// In what gRPC says of a server that takes TLS only (net/dialer.cc), and of any that knows no
// HTTP/2.
constexpr char kHttp1[] = "http1.x server";

constexpr char kMethod[] = "/reducer.v1.Data/Exchange";

}  // namespace

ClientStream::Attempt::Attempt(const std::shared_ptr<grpc::Channel>& channel,
                               grpc::CompletionQueue& queue)
    : stub(channel), io(stub.PrepareCall(&context, kMethod, &queue)) {}

ClientStream::ClientStream(Core& core, std::string address, std::shared_ptr<Handler> handler,
                           Duration timeout)
    : Stream(core), address_(std::move(address)), timeout_(timeout) {
  peer_ = address_;
  handler_ = std::move(handler);
}

void ClientStream::dial() {
  begin();
  using Way = net::Dialer::Way;
  // By TLS gRPC connects by itself; when that has failed, this end finds out why.
  core_.dialer().dial(std::static_pointer_cast<ClientStream>(shared_from_this()), address_,
                      timeout_, core_.tls().on() ? Way::kCaller : Way::kSocket);
}

void ClientStream::onSocket(Fd fd) {
  if (core_.tls().on() && fd) {
    Status tried = tryHandshake(std::move(fd), address_, core_.tls(), kHandshakeMax);
    if (tried.code() == Code::kInvalidArgument) return giveUp(tried);
    if (!tried.ok()) return core_.dialer().retry(this, tried.message());
  }
  auto attempt = std::make_shared<Attempt>(core_.channelTo(address_, std::move(fd)), core_.queue());
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) return;
    attempt_ = attempt;
    pending_ += 2;
    attempt_ops_ = 2;
  }
  attempt->io->StartCall(tagOf(start_tag_));
  attempt->io->ReadInitialMetadata(tagOf(metadata_tag_));
}

void ClientStream::onExpired(const std::string& last_error) {
  failure_ = net::noAnswer(address_, timeout_, last_error);
  breakOff();
  end();
}

void ClientStream::onEvent(Op op, bool ok) {
  if (op == Op::kMetadata) onMetadata(ok);
  bool settled = false;
  bool established = false;
  {
    const std::lock_guard lock(mutex_);
    settled = --attempt_ops_ == 0;
    established = established_;
  }
  if (!settled) return;
  if (!established) return onAttemptFailed();
  // gRPC starts a call with the same operation object that it writes with: not before the start is
  // done.
  if (op != Op::kFinish) openForWriting();
}

void ClientStream::onMetadata(bool ok) {
  const auto attempt = this->attempt();
  if (!ok || attempt->context.GetServerInitialMetadata().count(kAcceptedKey) == 0) {
    return finishAttempt();
  }
  {
    const std::lock_guard lock(mutex_);
    established_ = true;
  }
  if (core_.tls().on())
    net::careForSocketsTo(dialledOf(address_), core_.dialer().congestionControl());
  if (core_.dialer().forget(this)) end();
  read();
}

void ClientStream::onAttemptFailed() {
  const auto attempt = this->attempt();
  const grpc::Status& status = attempt->status;
  if (status.error_message().find(kHttp1) != std::string::npos) {
    return giveUp(Status(Code::kInvalidArgument, "no gRPC is spoken at " + address_ +
                                                     ": it is no reducer, or " +
                                                     net::tlsWanted(address_).message()));
  }
  if (status.error_code() != grpc::StatusCode::UNIMPLEMENTED) {
    return core_.dialer().retry(this, textOf(status));
  }
  giveUp(Status(Code::kUnavailable, address_ +
                                        " is a gRPC server, but not a reducer: it does not know " +
                                        kMethod + "; is the address right?"));
}

void ClientStream::giveUp(const Status& failure) {
  if (!core_.dialer().forget(this)) return;
  failure_ = failure;
  breakOff();
  end();
}

void ClientStream::onReadEnd() { finishAttempt(); }

void ClientStream::finishAttempt() {
  {
    const std::lock_guard lock(mutex_);
    ++pending_;
    ++attempt_ops_;
  }
  attempt_->io->Finish(&attempt_->status, tagOf(finish_tag_));
}

void ClientStream::startWrite(const grpc::ByteBuffer& message, grpc::WriteOptions options,
                              void* tag) {
  const std::shared_ptr<Attempt> attempt = attempt_;  // the stream may be over before Write returns
  attempt->io->Write(message, options, tag);
}

void ClientStream::startHalfClose(void* tag) {
  const std::shared_ptr<Attempt> attempt = attempt_;
  attempt->io->WritesDone(tag);
}

std::shared_ptr<ClientStream::Attempt> ClientStream::attempt() {
  const std::lock_guard lock(mutex_);
  return attempt_;
}

void ClientStream::cancel() {
  if (const auto attempt = this->attempt()) attempt->context.TryCancel();
  if (!core_.dialer().forget(this)) return;
  // Dialing is over; but onClosed must not come from within close().
  core_.post([self = std::static_pointer_cast<ClientStream>(shared_from_this())] { self->end(); });
}

void ClientStream::releaseCall() {
  std::shared_ptr<Attempt> released;
  const std::lock_guard lock(mutex_);
  released.swap(attempt_);
}

Status ClientStream::endReason() {
  if (!failure_.ok()) return failure_;
  const auto attempt = this->attempt();
  return fromGrpc(attempt->status, attempt->context, address_);
}

}  // namespace reducer::transport::grpc_detail
