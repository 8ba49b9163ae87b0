// One bidirectional stream of frames over gRPC, either end of it.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "reducer.grpc.pb.h"
#include "transport/transport.h"

namespace reducer::transport {

/// What a completion queue returns. Tags are members of the object whose operation they stand for.
class Tag {
 public:
  virtual ~Tag() = default;
  virtual void proceed(bool ok) = 0;
};

/// Both ends have the same life: start, read and write at once, finish. One read and one write are
/// outstanding at a time (gRPC allows no more); what waits to be written is queued here.
///
/// Lifetime: while any operation is outstanding the stream holds itself. The user holds a
/// Connection (below), whose end closes the stream. Thread safety: every public method, from any
/// thread.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  /// `gone` is called when nothing is outstanding any more, as the very last thing.
  explicit Stream(std::function<void(Stream*)> gone);
  virtual ~Stream();

  /// The handler must be set before anything is started.
  void setHandler(std::shared_ptr<Handler> handler);
  void send(const wire::Frame& frame, const Payload& payload);
  void close(const Status& reason, bool flush);
  virtual std::string peer() const = 0;

 protected:
  enum class Operation { kStart, kRead, kWrite, kHalfClose, kFinish, kDone };

  struct OperationTag final : Tag {
    void proceed(bool ok) override { stream->onOperation(operation, ok); }
    Stream* stream = nullptr;
    Operation operation = Operation::kStart;
  };

  virtual void startRead(grpc::ByteBuffer* buffer, void* tag) = 0;
  virtual void startWrite(const grpc::ByteBuffer& buffer, void* tag) = 0;
  /// After a flush: the client says that it sends no more, the server ends the call with `reason`.
  virtual void startFlushed(const Status& reason) = 0;
  /// Nothing more can be read: the client asks for the call's status, the server ends the call if
  /// it has not.
  virtual void startFinish(const Status& reason) = 0;
  virtual void cancel() = 0;
  /// Why the stream ended, once it is finished.
  virtual Status endReason() = 0;

  /// Counts an operation as outstanding and gives its tag. Called with the lock held.
  void* begin(Operation operation);
  void onOperation(Operation operation, bool ok);
  virtual void onStarted(bool ok);
  void onRead(bool ok);
  void onWritten(bool ok);
  void onHalfClosed();
  /// Nothing more will be read. Called with the lock held.
  virtual void onReadEnd() = 0;
  /// The stream has ended: gRPC's objects go, and with them what they still hold of cancelled
  /// writes. Called with the lock held.
  virtual void release() {}
  /// Called with the lock held.
  void writeNext();
  void readNext();
  void finishOnce();

  std::mutex mutex_;
  bool started_ = false;
  bool flush_requested_ = false;
  bool flushed_ = false;
  bool finishing_ = false;
  bool closed_locally_ = false;
  Status local_reason_;

 private:
  bool deliver(grpc::ByteBuffer buffer);
  void end();

  const std::function<void(Stream*)> gone_;
  std::shared_ptr<Handler> handler_;
  OperationTag tags_[6];
  std::shared_ptr<Stream> self_;  // while operations are outstanding
  int outstanding_ = 0;
  bool writing_ = false;
  bool reading_done_ = false;
  std::deque<grpc::ByteBuffer> queue_;
  grpc::ByteBuffer incoming_;
};

/// The end that connects.
class ClientStream final : public Stream {
 public:
  ClientStream(std::string address, std::function<void(Stream*)> gone)
      : Stream(std::move(gone)), address_(std::move(address)) {}

  /// Connects; gives up after `timeout`.
  void start(std::shared_ptr<grpc::Channel> channel, grpc::CompletionQueue* queue,
             Duration timeout);
  std::string peer() const override { return address_; }

 private:
  struct DeadlineTag final : Tag {
    void proceed(bool ok) override { stream->onDeadline(ok); }
    ClientStream* stream = nullptr;
  };

  void startRead(grpc::ByteBuffer* buffer, void* tag) override { call_->Read(buffer, tag); }
  void startWrite(const grpc::ByteBuffer& buffer, void* tag) override { call_->Write(buffer, tag); }
  void startFlushed(const Status& reason) override;
  void startFinish(const Status& reason) override;
  void cancel() override {
    if (context_) context_->TryCancel();
  }
  Status endReason() override;
  void onReadEnd() override;
  void release() override;
  void onStarted(bool ok) override;
  void onDeadline(bool expired);

  const std::string address_;
  Duration timeout_{};
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<grpc::GenericStub> stub_;
  std::unique_ptr<grpc::ClientContext> context_ = std::make_unique<grpc::ClientContext>();
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  grpc::Alarm deadline_;
  DeadlineTag deadline_tag_;
  bool timed_out_ = false;
  grpc::Status status_;
};

using DataService = v1::Data::WithRawMethod_Exchange<v1::Data::Service>;

/// The end that was connected to.
class ServerStream final : public Stream {
 public:
  explicit ServerStream(std::function<void(Stream*)> gone)
      : Stream(std::move(gone)), call_(&context_) {}

  grpc::ServerContext& context() { return context_; }
  grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>& call() { return call_; }
  /// The tag that says when the call is over, to be given to gRPC before the call is accepted.
  void* prepare();
  /// Begins to read; the call was accepted.
  void start();
  /// The call never came (shutdown): forgets it.
  void abandon();
  std::string peer() const override;

 private:
  void startRead(grpc::ByteBuffer* buffer, void* tag) override { call_.Read(buffer, tag); }
  void startWrite(const grpc::ByteBuffer& buffer, void* tag) override { call_.Write(buffer, tag); }
  void startFlushed(const Status& reason) override;
  void startFinish(const Status& reason) override;
  void cancel() override { context_.TryCancel(); }
  Status endReason() override;
  void onReadEnd() override;

  grpc::ServerContext context_;
  grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer> call_;
};

/// What users hold: the stream, closed when they let go of it.
class GrpcConnection final : public Connection {
 public:
  explicit GrpcConnection(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
  ~GrpcConnection() override { stream_->close(Status(), /*flush=*/false); }
  void send(const wire::Frame& frame, Payload payload) override { stream_->send(frame, payload); }
  void close(const Status& reason, bool flush) override { stream_->close(reason, flush); }
  std::string peer() const override { return stream_->peer(); }

 private:
  const std::shared_ptr<Stream> stream_;
};

}  // namespace reducer::transport
