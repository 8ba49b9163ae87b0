// The connecting end of a stream.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <string>

#include "transport/grpc/core.h"
#include "transport/grpc/stream.h"
#include "transport/net/dialer.h"

namespace reducer::transport::grpc_detail {

/// Tries until a reducer accepts: a TCP connection, a call on it, the reducer's initial metadata.
/// Frames wait until then, so an attempt that fails has lost none. Dialing counts as one pending
/// operation; whoever makes the dialer forget this stream ends it.
class ClientStream final : public Stream, public net::Caller {
 public:
  ClientStream(Core& core, std::string address, std::shared_ptr<Handler> handler, Duration timeout);
  void dial();

 private:
  struct Attempt {
    Attempt(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue& queue);
    grpc::ClientContext context;
    grpc::GenericStub stub;
    std::unique_ptr<grpc::GenericClientAsyncReaderWriter> io;
    grpc::Status status;
  };

  void onSocket(Fd fd) override;
  void onTlsWanted() override {}  // only who greets is told
  void onExpired(const std::string& last_error) override;

  void startRead(grpc::ByteBuffer* message, void* tag) override {
    attempt_->io->Read(message, tag);
  }
  void startWrite(const grpc::ByteBuffer& message, grpc::WriteOptions options, void* tag) override;
  void startHalfClose(void* tag) override;
  void cancel() override;
  void releaseCall() override;
  void onEvent(Op op, bool ok) override;
  void onReadEnd() override;
  Status endReason() override;
  void onMetadata(bool ok);
  void onAttemptFailed();
  /// Ends the dialing, for good.
  void giveUp(const Status& failure);
  std::shared_ptr<Attempt> attempt();
  void finishAttempt();

  const std::string address_;
  const Duration timeout_;
  std::shared_ptr<Attempt> attempt_;
  int attempt_ops_ =
      0;  // until the attempt has succeeded; when it has failed, none may be left before the next
  bool established_ = false;
  Status failure_;
  Tag start_tag_{*this, Op::kStart};
  Tag metadata_tag_{*this, Op::kMetadata};
  Tag finish_tag_{*this, Op::kFinish};
};

}  // namespace reducer::transport::grpc_detail
