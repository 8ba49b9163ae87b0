// One connection: a stream of Data.Exchange, seen from either end.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/byte_buffer.h>

#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "common/clock.h"
#include "common/status.h"
#include "transport/grpc/factory.h"
#include "transport/net/fork.h"
#include "transport/transport.h"

namespace reducer::transport::grpc_detail {

class Core;
struct ListenerState;

/// Thread safety: every public method, from any thread.
///
/// At most one read and one write are outstanding at gRPC. Every operation outstanding is counted
/// in pending_; while it is not 0 the core keeps the stream. When it falls to 0 the stream is over:
/// onClosed, and the core lets go. Nothing of gRPC (but the linger alarm), no handler and no
/// payload's release is called with mutex_ held: each may lead back here.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(Core& core) : core_(core), generation_(net::forkGeneration()) {}
  virtual ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void send(const wire::Frame& frame, const Payload& payload);
  void close(const Status& reason, bool flush);
  /// close() without flush, also for a stream that is closing already but waits for its peer.
  void abort(const Status& reason);

  /// As Connection::admit().
  virtual void admit(std::size_t message_bytes) { (void)message_bytes; }

  const std::string& peer() const { return peer_; }
  /// The listener that accepted it, or null.
  virtual const ListenerState* listener() const { return nullptr; }

 protected:
  enum class Op { kStart, kMetadata, kRead, kWrite, kHalfClose, kFinish, kDone, kLinger, kPosted };
  struct Tag final : GrpcTag {
    Tag(Stream& s, Op o) : stream(s), op(o) {}
    void complete(bool ok) override { stream.completed(op, ok); }
    Stream& stream;
    const Op op;
  };

  // What the two ends do differently. Without lock.
  virtual void startRead(grpc::ByteBuffer* message, void* tag) = 0;
  virtual void startWrite(const grpc::ByteBuffer& message, grpc::WriteOptions options,
                          void* tag) = 0;
  /// Everything was sent: tell the other end.
  virtual void startHalfClose(void* tag) = 0;
  virtual void cancel() = 0;
  virtual void
  releaseCall() = 0;  ///< the stream is over: gRPC's objects go, even if users hold the connection
  virtual void onEvent(Op op, bool ok) = 0;  ///< those that are not handled here
  virtual void onReadEnd() = 0;              ///< nothing more will come
  /// There is somebody who can be told of a close. With mutex_ held.
  virtual bool hasPeer() const { return connected_; }
  /// Its messages have to be small.
  virtual std::size_t messageMax() const { return SIZE_MAX; }
  /// For onClosed, if it was not closed from here.
  virtual Status endReason() = 0;

  void completed(Op op, bool ok);
  /// An operation is about to start.
  void begin() {
    const std::lock_guard lock(mutex_);
    ++pending_;
  }
  void end();
  void read();
  /// The stream may be written to from now on.
  void openForWriting();
  /// Nothing goes in or out any more but what is queued; then the half close.
  void closeAfterQueue();
  /// Cancels the call, for a reason that the call itself will tell.
  void breakOff();

  Core& core_;  // gone before the stream may be, but not before it is over
  std::mutex mutex_;
  std::string peer_;  // set before the stream is used
  std::shared_ptr<Handler>
      handler_;  // touched by one thread at a time: set before the first read, gone after the last
  int pending_ = 0;
  bool connected_ = false;    // may write
  bool closing_ = false;      // no frame goes in or out any more, but what is queued if flush_
  bool settled_ = false;      // reason_ is: it was closed from here
  bool half_closed_ = false;  // or about to be, by whoever set it
  bool cancelled_ = false;    // likewise
  bool over_ = false;
  Status reason_;

 private:
  using Queue = std::deque<grpc::ByteBuffer>;

  /// The process was forked since: nothing may be done.
  bool orphaned() const { return net::forkGeneration() != generation_; }
  void onRead(bool ok);
  void onWritten(bool ok);
  void onLinger();
  void refuse(const Status& why);
  /// What to do once the lock is released.
  enum class Next { kNothing, kWrite, kWriteMore, kHalfClose, kCancel };
  Next nextHeld(grpc::ByteBuffer& message);
  Next closeHeld(grpc::ByteBuffer& message);
  Next cancelHeld(Queue& dropped);
  void proceed(Next next, const grpc::ByteBuffer& message);
  void armLingerHeld();
  void finish();

  const std::uint64_t generation_;
  Queue queue_;
  bool writing_ = false;
  bool flush_ = false;
  bool lingering_ = false;
  std::uint64_t written_ = 0;  // messages; shows the linger timer that there is progress
  std::uint64_t written_before_ = 0;
  grpc::ByteBuffer incoming_;
  grpc::Alarm linger_;
  Tag read_tag_{*this, Op::kRead};
  Tag write_tag_{*this, Op::kWrite};
  Tag linger_tag_{*this, Op::kLinger};

 protected:
  Tag half_close_tag_{*this, Op::kHalfClose};
};

/// What users hold: the stream closes when the last reference is dropped.
class StreamConnection final : public Connection {
 public:
  explicit StreamConnection(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
  ~StreamConnection() override { stream_->close(Status(), /*flush=*/true); }
  void send(const wire::Frame& frame, Payload payload) override { stream_->send(frame, payload); }
  void close(const Status& reason, bool flush) override { stream_->close(reason, flush); }
  std::string peer() const override { return stream_->peer(); }
  void admit(std::size_t message_bytes) override { stream_->admit(message_bytes); }

 private:
  const std::shared_ptr<Stream> stream_;
};

}  // namespace reducer::transport::grpc_detail
