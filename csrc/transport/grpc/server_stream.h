// The accepting end of a stream.
#pragma once

#include <grpcpp/server_context.h>

#include <memory>

#include "common/limits.h"
#include "transport/grpc/core.h"
#include "transport/grpc/stream.h"

namespace reducer::transport::grpc_detail {

/// Initial metadata by which a worker knows that a reducer has accepted: gRPC reports a failed
/// call's missing metadata as an empty set.
inline constexpr char kAcceptedKey[] = "reducer-accepted";

class ServerStream final : public Stream {
 public:
  explicit ServerStream(Core& core) : Stream(core), call_(std::make_shared<Call>()) {}
  /// Waits for a worker to open a stream, and becomes its other end.
  void request();
  const ListenerState* listener() const override { return listener_.load(); }
  void admit(std::size_t message_bytes) override;

 private:
  struct Call {
    grpc::ServerContext context;
    grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer> io{&context};
  };

  void startRead(grpc::ByteBuffer* message, void* tag) override { call_->io.Read(message, tag); }
  void startWrite(const grpc::ByteBuffer& message, grpc::WriteOptions options, void* tag) override;
  void startHalfClose(void* tag) override;
  void cancel() override;
  void releaseCall() override;
  void onEvent(Op op, bool ok) override;
  void onReadEnd() override { closeAfterQueue(); }
  bool hasPeer() const override { return true; }
  std::size_t messageMax() const override { return message_max_; }
  Status endReason() override;
  void accept();
  /// There is no place for it among the guests.
  void sendAway();

  std::shared_ptr<Call> call_;
  bool started_ = false;
  std::shared_ptr<ListenerState> origin_;
  std::atomic<const ListenerState*> listener_{nullptr};
  std::shared_ptr<net::Guest> guest_;
  std::atomic<std::size_t> message_max_{kMaxStrangerBytes};
  Tag start_tag_{*this, Op::kStart};
  Tag metadata_tag_{*this, Op::kMetadata};
  Tag done_tag_{*this, Op::kDone};
};

}  // namespace reducer::transport::grpc_detail
