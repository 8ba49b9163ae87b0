#include "transport/grpc/server_stream.h"

#include "transport/grpc/reason.h"

namespace reducer::transport::grpc_detail {

void ServerStream::request() {
  begin();
  call_->context.AsyncNotifyWhenDone(tagOf(done_tag_));
  core_.service().RequestExchange(&call_->context, &call_->io, &core_.queue(), &core_.queue(),
                                  tagOf(start_tag_));
}

void ServerStream::onEvent(Op op, bool ok) {
  if (op == Op::kStart && ok) {
    core_.acceptNext();
    accept();
  } else if (op == Op::kMetadata && ok) {
    openForWriting();
  }
}

void ServerStream::accept() {
  bool cancelled = false;
  {
    const std::lock_guard lock(mutex_);
    ++pending_;  // the done tag comes for calls that have started, and only for them
    started_ = true;
    cancelled = cancelled_;
  }
  if (cancelled) return call_->context.TryCancel();
  Core::Origin origin = core_.originOf(call_->context.peer());
  peer_ = origin.peer;
  origin_ = std::move(origin.listener);
  guest_ = std::move(origin.guest);
  listener_.store(origin_.get());
  if (origin_ && !guest_) return sendAway();
  // Whoever closes the listener sets `closed` and then looks for its streams: here it is the other
  // way round.
  call_->context.AddInitialMetadata(kAcceptedKey, "1");
  if (origin_ && !origin_->closed) {
    handler_ = origin_->acceptor(std::make_shared<StreamConnection>(shared_from_this()));
  }
  if (!handler_) return abort(Status(Code::kUnavailable, "nobody listens here any more"));
  begin();
  call_->io.SendInitialMetadata(tagOf(metadata_tag_));
  read();
}

// Whoever has not been told that it is accepted tries again.
void ServerStream::sendAway() {
  close(Status(Code::kUnavailable, net::kCrowded), /*flush=*/true);
  openForWriting();
}

void ServerStream::admit(std::size_t message_bytes) {
  message_max_ = message_bytes;
  if (guest_) guest_->leave();
}

void ServerStream::startWrite(const grpc::ByteBuffer& message, grpc::WriteOptions options,
                              void* tag) {
  const std::shared_ptr<Call> call = call_;  // the stream may be over before Write returns
  call->io.Write(message, options, tag);
}

void ServerStream::startHalfClose(void* tag) {
  const std::shared_ptr<Call> call = call_;
  call->io.Finish(toGrpc(reason_, call->context), tag);
}

void ServerStream::cancel() {
  std::shared_ptr<Call> call;
  {
    const std::lock_guard lock(mutex_);
    if (started_) call = call_;  // else there is nothing that could be cancelled
  }
  if (call) call->context.TryCancel();
}

void ServerStream::releaseCall() {
  std::shared_ptr<Call> released;
  const std::lock_guard lock(mutex_);
  released.swap(call_);
}

Status ServerStream::endReason() {
  if (!started_ || !call_->context.IsCancelled()) return {};
  return Status(Code::kUnavailable, "the connection to " + peer_ + " was lost");
}

}  // namespace reducer::transport::grpc_detail
