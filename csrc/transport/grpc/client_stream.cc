#include "transport/grpc/client_stream.h"

#include <grpcpp/create_channel_posix.h>

#include <utility>

#include "transport/grpc/channel_args.h"
#include "transport/grpc/reason.h"
#include "transport/grpc/server_stream.h"

namespace reducer::transport::grpc_detail {
namespace {

constexpr char kMethod[] = "/reducer.v1.Data/Exchange";

}  // namespace

ClientStream::Attempt::Attempt(const std::string& address, int fd, grpc::CompletionQueue& queue)
    : stub(grpc::CreateCustomInsecureChannelFromFd(address, fd, clientArguments())),
      io(stub.PrepareCall(&context, kMethod, &queue)) {}

ClientStream::ClientStream(Core& core, std::string address, std::shared_ptr<Handler> handler,
                           Duration timeout)
    : Stream(core), address_(std::move(address)), timeout_(timeout) {
  peer_ = address_;
  handler_ = std::move(handler);
}

void ClientStream::dial() {
  begin();
  core_.dialer().dial(std::static_pointer_cast<ClientStream>(shared_from_this()), address_,
                      timeout_, /*greet=*/false);
}

void ClientStream::onSocket(Fd fd) {
  auto attempt = std::make_shared<Attempt>(address_, fd.release(), core_.queue());
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
  if (core_.dialer().forget(this)) end();
  read();
}

void ClientStream::onAttemptFailed() {
  const auto attempt = this->attempt();
  const grpc::Status& status = attempt->status;
  if (status.error_code() != grpc::StatusCode::UNIMPLEMENTED) {
    return core_.dialer().retry(this, status.error_message());
  }
  const Status failure(Code::kUnavailable,
                       address_ + " is a gRPC server, but not a reducer: it does not know " +
                           kMethod + "; is the address right?");
  if (!core_.dialer().forget(this)) return;
  failure_ = failure;
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
