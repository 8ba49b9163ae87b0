#include "transport/grpc/stream.h"

#include <chrono>
#include <cstdio>
#include <utility>

#include "transport/grpc/message.h"

namespace reducer::transport {
namespace {

constexpr char kMethod[] = "/reducer.v1.Data/Exchange";

// Our codes as gRPC's, there and back, so that a reason survives the journey.
constexpr std::pair<Code, grpc::StatusCode> kCodes[] = {
    {Code::kOk, grpc::StatusCode::OK},
    {Code::kInvalidArgument, grpc::StatusCode::INVALID_ARGUMENT},
    {Code::kMismatch, grpc::StatusCode::FAILED_PRECONDITION},
    {Code::kTimeout, grpc::StatusCode::DEADLINE_EXCEEDED},
    {Code::kUnavailable, grpc::StatusCode::UNAVAILABLE},
    {Code::kResourceExhausted, grpc::StatusCode::RESOURCE_EXHAUSTED},
    {Code::kAborted, grpc::StatusCode::ABORTED},
    {Code::kVersion, grpc::StatusCode::OUT_OF_RANGE},
    {Code::kInternal, grpc::StatusCode::INTERNAL},
};

grpc::Status toGrpc(const Status& status) {
  for (const auto& [ours, theirs] : kCodes) {
    if (ours == status.code()) return {theirs, status.message()};
  }
  return {grpc::StatusCode::UNKNOWN, status.message()};
}

Status fromGrpc(const grpc::Status& status) {
  for (const auto& [ours, theirs] : kCodes) {
    if (theirs == status.error_code()) return {ours, status.error_message()};
  }
  return {Code::kUnavailable, status.error_message()};
}

std::string readable(std::string peer) {  // gRPC writes "ipv4:1.2.3.4:5" and escapes brackets
  for (const char* prefix : {"ipv4:", "ipv6:"}) {
    if (peer.rfind(prefix, 0) == 0) peer.erase(0, 5);
  }
  for (const auto& [escaped, plain] : {std::pair{"%5B", "["}, std::pair{"%5D", "]"}}) {
    const std::size_t at = peer.find(escaped);
    if (at != std::string::npos) peer.replace(at, 3, plain);
  }
  return peer;
}

}  // namespace

// ------------------------------------------------------------------ both ends

Stream::Stream(std::function<void(Stream*)> gone) : gone_(std::move(gone)) {
  for (int i = 0; i < 6; ++i) {
    tags_[i].stream = this;
    tags_[i].operation = static_cast<Operation>(i);
  }
}

Stream::~Stream() = default;

void Stream::setHandler(std::shared_ptr<Handler> handler) { handler_ = std::move(handler); }

void* Stream::begin(Operation operation) {
  if (outstanding_++ == 0) self_ = shared_from_this();
  return static_cast<Tag*>(&tags_[static_cast<int>(operation)]);
}

void Stream::send(const wire::Frame& frame, const Payload& payload) {
  grpc::ByteBuffer message = toMessage(frame, payload);
  const std::lock_guard lock(mutex_);
  if (flush_requested_ || finishing_ || closed_locally_) return;
  queue_.push_back(std::move(message));
  writeNext();
}

void Stream::close(const Status& reason, bool flush) {
  const std::lock_guard lock(mutex_);
  if (closed_locally_) return;
  closed_locally_ = true;
  local_reason_ = reason;
  if (flush) {
    flush_requested_ = true;
    writeNext();
  } else {
    cancel();
  }
}

void Stream::writeNext() {
  if (!started_ || writing_ || finishing_) return;
  if (!queue_.empty()) {
    writing_ = true;
    const grpc::ByteBuffer message = std::move(queue_.front());
    queue_.pop_front();
    startWrite(message, begin(Operation::kWrite));
  } else if (flush_requested_ && !flushed_) {
    flushed_ = true;
    startFlushed(local_reason_);
  }
}

void Stream::readNext() { startRead(&incoming_, begin(Operation::kRead)); }

void Stream::finishOnce() {
  if (finishing_) return;
  finishing_ = true;
  startFinish(local_reason_);
}

void Stream::onOperation(Operation operation, bool ok) {
  switch (operation) {
    case Operation::kStart:
      onStarted(ok);
      break;
    case Operation::kRead:
      onRead(ok);
      break;
    case Operation::kWrite:
      onWritten(ok);
      break;
    case Operation::kHalfClose:
      onHalfClosed();
      break;
    default:
      break;
  }
  std::shared_ptr<Stream> last;
  {
    const std::lock_guard lock(mutex_);
    if (--outstanding_ > 0) return;
    last = std::move(self_);
    queue_.clear();
    finishing_ = true;
    release();
  }
  end();
}

// Nothing is outstanding and nothing can be started any more.
void Stream::end() {
  const std::shared_ptr<Handler> handler = std::move(handler_);
  if (handler) handler->onClosed(closed_locally_ ? local_reason_ : endReason());
  gone_(this);
}

void Stream::onStarted(bool ok) {
  const std::lock_guard lock(mutex_);
  started_ = ok;
  if (!ok) {
    finishOnce();
    return;
  }
  readNext();
  writeNext();
}

void Stream::onRead(bool ok) {
  if (ok) {
    const bool go_on = deliver(std::exchange(incoming_, grpc::ByteBuffer()));
    const std::lock_guard lock(mutex_);
    // After a broken frame nothing is read any more; the flush that was asked for ends the call.
    if (go_on) {
      readNext();
      return;
    }
    reading_done_ = true;
    return;
  }
  const std::lock_guard lock(mutex_);
  reading_done_ = true;
  onReadEnd();
}

bool Stream::deliver(grpc::ByteBuffer buffer) {
  Result<wire::Decoded> decoded = wire::decode(toPayload(buffer));
  buffer.Clear();
  if (decoded.ok()) {
    handler_->onFrame(std::move(decoded.value().frame), std::move(decoded.value().payload));
    return true;
  }
  wire::Frame error;
  error.kind = wire::FrameKind::kError;
  error.fatal = true;
  error.code = decoded.status().code();
  error.text = decoded.status().message();
  send(error, {});
  close(decoded.status(), /*flush=*/true);
  return false;
}

void Stream::onWritten(bool ok) {
  const std::lock_guard lock(mutex_);
  writing_ = false;
  if (ok) {
    writeNext();
    return;
  }
  queue_.clear();
  if (reading_done_) finishOnce();  // else the read fails too, and finishes
}

void Stream::onHalfClosed() {
  const std::lock_guard lock(mutex_);
  if (reading_done_) finishOnce();
}

// ------------------------------------------------------------------ the client's end

void ClientStream::start(std::shared_ptr<grpc::Channel> channel, grpc::CompletionQueue* queue,
                         Duration timeout) {
  timeout_ = timeout;
  channel_ = std::move(channel);
  stub_ = std::make_unique<grpc::GenericStub>(channel_);
  context_->set_wait_for_ready(true);
  deadline_tag_.stream = this;
  const std::lock_guard lock(mutex_);
  call_ = stub_->PrepareCall(context_.get(), kMethod, queue);
  begin(Operation::kDone);  // the alarm's
  deadline_.Set(queue, std::chrono::system_clock::now() + timeout,
                static_cast<Tag*>(&deadline_tag_));
  call_->StartCall(begin(Operation::kStart));
}

void ClientStream::onDeadline(bool expired) {
  {
    const std::lock_guard lock(mutex_);
    if (expired && !started_) {
      timed_out_ = true;
      context_->TryCancel();
    }
  }
  onOperation(Operation::kDone, expired);
}

void ClientStream::onStarted(bool ok) {
  deadline_.Cancel();
  Stream::onStarted(ok);
}

void ClientStream::startFlushed(const Status& /*reason*/) {
  call_->WritesDone(begin(Operation::kHalfClose));
}

void ClientStream::startFinish(const Status& /*reason*/) {
  call_->Finish(&status_, begin(Operation::kFinish));
}

// The server ended the call: nothing that is still queued has a reader.
void ClientStream::onReadEnd() { finishOnce(); }

void ClientStream::release() {
  call_.reset();
  context_.reset();
}

Status ClientStream::endReason() {
  if (timed_out_) {
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%g s", std::chrono::duration<double>(timeout_).count());
    const bool refused = channel_->GetState(false) == GRPC_CHANNEL_TRANSIENT_FAILURE;
    return {Code::kUnavailable,
            address_ + " did not answer within " + seconds + " (" +
                (refused ? "connections are refused or the host cannot be reached"
                         : "the host does not react") +
                "); is a reducer running there?"};
  }
  if (status_.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    return {Code::kUnavailable,
            address_ + " is a gRPC server, but no reducer: " + status_.error_message()};
  }
  if (status_.error_code() == grpc::StatusCode::UNAVAILABLE ||
      status_.error_code() == grpc::StatusCode::UNKNOWN ||
      status_.error_code() == grpc::StatusCode::CANCELLED) {
    return {Code::kUnavailable,
            "the connection to " + address_ + " was lost (" + status_.error_message() + ")"};
  }
  return fromGrpc(status_);
}

// ------------------------------------------------------------------ the server's end

void* ServerStream::prepare() {
  const std::lock_guard lock(mutex_);
  return begin(Operation::kDone);
}

void ServerStream::start() {
  const std::lock_guard lock(mutex_);
  started_ = true;
  readNext();
  writeNext();
}

void ServerStream::abandon() { onOperation(Operation::kDone, false); }

void ServerStream::startFlushed(const Status& reason) {
  finishing_ = true;
  call_.Finish(toGrpc(reason), begin(Operation::kFinish));
}

// The client sends no more (or is gone, then the write fails): what is queued still goes out before
// the end.
void ServerStream::onReadEnd() {
  flush_requested_ = true;
  writeNext();
}

void ServerStream::startFinish(const Status& /*reason*/) {
  call_.Finish(grpc::Status::OK, begin(Operation::kFinish));
}

Status ServerStream::endReason() {
  if (!context_.IsCancelled()) return {};
  return {Code::kUnavailable, "the connection from " + peer() + " was lost"};
}

std::string ServerStream::peer() const { return readable(context_.peer()); }

}  // namespace reducer::transport
