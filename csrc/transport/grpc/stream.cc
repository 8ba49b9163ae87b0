#include "transport/grpc/stream.h"

#include <utility>

#include "common/limits.h"
#include "transport/grpc/core.h"
#include "transport/grpc/message.h"
#include "transport/message_limit.h"

namespace reducer::transport::grpc_detail {
namespace {

// A closed stream waits for its peer as long as that takes frames, and then this long. Without a
// connection there is less hope.
constexpr Duration kLinger = std::chrono::seconds(5);
constexpr Duration kLingerUnconnected = std::chrono::seconds(2);

}  // namespace

// ------------------------------------------------------------------ sending

void Stream::send(const wire::Frame& frame, const Payload& payload) {
  if (orphaned()) return;
  grpc::ByteBuffer message = toMessage(frame, payload);
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    if (writing_ || !connected_) {
      queue_.emplace_back();
      queue_.back().Swap(&message);
      return;
    }
    writing_ = true;
    ++pending_;
  }
  startWrite(message, grpc::WriteOptions(), tagOf(write_tag_));
}

Stream::Next Stream::nextHeld(grpc::ByteBuffer& message) {
  if (!connected_ || writing_) return Next::kNothing;
  if (!queue_.empty()) {
    message.Swap(&queue_.front());
    queue_.pop_front();
    writing_ = true;
    ++pending_;
    return queue_.empty() ? Next::kWrite : Next::kWriteMore;
  }
  if (!flush_ || half_closed_) return Next::kNothing;
  half_closed_ = true;
  ++pending_;
  return Next::kHalfClose;
}

void Stream::proceed(Next next, const grpc::ByteBuffer& message) {
  if (next == Next::kWrite) startWrite(message, grpc::WriteOptions(), tagOf(write_tag_));
  if (next == Next::kWriteMore)
    startWrite(message, grpc::WriteOptions().set_buffer_hint(), tagOf(write_tag_));
  if (next == Next::kHalfClose) startHalfClose(tagOf(half_close_tag_));
  if (next == Next::kCancel) cancel();
}

void Stream::onWritten(bool ok) {
  if (!ok) return breakOff();
  grpc::ByteBuffer message;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    ++written_;
    writing_ = false;
    next = nextHeld(message);
  }
  proceed(next, message);
}

void Stream::openForWriting() {
  grpc::ByteBuffer message;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    connected_ = true;
    next = nextHeld(message);
  }
  proceed(next, message);
}

// ------------------------------------------------------------------ receiving

void Stream::read() {
  begin();
  startRead(&incoming_, tagOf(read_tag_));
}

void Stream::onRead(bool ok) {
  if (!ok) return onReadEnd();
  grpc::ByteBuffer message;
  message.Swap(&incoming_);
  bool closing = false;
  {
    const std::lock_guard lock(mutex_);
    closing = closing_;
  }
  if (!closing && message.Length() > messageMax()) {
    refuse(Status(Code::kInvalidArgument, tooLong(message.Length(), messageMax())));
  } else if (!closing) {
    auto decoded = fromMessage(message);
    message.Clear();  // the payload has its own references: what the handler drops is free
    if (decoded.ok()) {
      handler_->onFrame(std::move(decoded.value().frame), std::move(decoded.value().payload));
    } else {
      refuse(decoded.status());
    }
  }
  read();
}

void Stream::refuse(const Status& why) {
  wire::Frame error;
  error.kind = wire::FrameKind::kError;
  error.fatal = true;
  error.code = why.code();
  error.text = peer_ + " sent what cannot be read: " + why.message();
  send(error, {});
  close(Status(why.code(), error.text), /*flush=*/true);
}

// ------------------------------------------------------------------ closing

void Stream::close(const Status& reason, bool flush) {
  if (orphaned()) return;
  Queue dropped;
  grpc::ByteBuffer message;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    if (closing_ || over_) return;
    settled_ = true;
    reason_ = reason;
    const bool wait = flush && (hasPeer() || !queue_.empty());
    next = wait ? closeHeld(message) : cancelHeld(dropped);
  }
  proceed(next, message);
}

void Stream::abort(const Status& reason) {
  Queue dropped;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    if (over_) return;
    if (!closing_) {
      settled_ = true;
      reason_ = reason;
    }
    next = cancelHeld(dropped);
  }
  proceed(next, {});
}

void Stream::closeAfterQueue() {
  grpc::ByteBuffer message;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    if (!closing_) next = closeHeld(message);
  }
  proceed(next, message);
}

void Stream::breakOff() {
  Queue dropped;
  Next next = Next::kNothing;
  {
    const std::lock_guard lock(mutex_);
    next = cancelHeld(dropped);
  }
  proceed(next, {});
}

Stream::Next Stream::closeHeld(grpc::ByteBuffer& message) {
  closing_ = true;
  flush_ = true;
  lingering_ = true;
  ++pending_;
  armLingerHeld();
  return nextHeld(message);
}

Stream::Next Stream::cancelHeld(Queue& dropped) {
  closing_ = true;
  flush_ = false;
  dropped.swap(queue_);
  if (cancelled_) return Next::kNothing;
  cancelled_ = true;
  return Next::kCancel;
}

void Stream::armLingerHeld() {
  written_before_ = written_;
  const Duration wait = connected_ ? kLinger : kLingerUnconnected;
  linger_.Set(&core_.queue(), deadlineAfter(wait), tagOf(linger_tag_));
}

void Stream::onLinger() {
  {
    const std::lock_guard lock(mutex_);
    const bool alone = pending_ == 1;
    if (!alone && !cancelled_ && written_ != written_before_) {
      ++pending_;
      armLingerHeld();
      return;
    }
    lingering_ = false;
    if (alone) return;
  }
  breakOff();
}

void Stream::completed(Op op, bool ok) {
  switch (op) {
    case Op::kRead:
      onRead(ok);
      break;
    case Op::kWrite:
      onWritten(ok);
      break;
    case Op::kLinger:
      onLinger();
      break;
    case Op::kHalfClose:
      if (!ok) breakOff();
      break;
    default:
      onEvent(op, ok);
  }
  end();
}

void Stream::end() {
  {
    const std::lock_guard lock(mutex_);
    --pending_;
    if (pending_ == 1 && lingering_) linger_.Cancel();
    if (pending_ > 0) return;
    over_ = true;
    closing_ = true;
  }
  finish();
}

void Stream::finish() {
  const std::shared_ptr<Stream> self = shared_from_this();
  const Status reason = settled_ ? reason_ : endReason();
  Queue dropped;
  {
    const std::lock_guard lock(mutex_);
    dropped.swap(queue_);
  }
  dropped.clear();
  releaseCall();
  if (const std::shared_ptr<Handler> handler = std::move(handler_)) handler->onClosed(reason);
  handler_ = nullptr;
  core_.forget(self);
}

}  // namespace reducer::transport::grpc_detail
