// Why a stream ended, across gRPC.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>

#include <string>

#include "common/status.h"

namespace reducer::transport::grpc_detail {

/// For a server's Finish. The exact code travels as trailing metadata: gRPC's own codes are others,
/// and without it nobody could tell what the reducer said from what gRPC says when a connection
/// breaks.
grpc::Status toGrpc(const Status& reason, grpc::ServerContext& context);

/// Its message, as far as people should read it: it comes from the other end.
std::string textOf(const grpc::Status& status);

/// What the client's handler is told. `peer` is named where the text is gRPC's.
Status fromGrpc(const grpc::Status& status, const grpc::ClientContext& context,
                const std::string& peer);

/// True if the status was made by toGrpc at the other end.
bool isFromReducer(const grpc::ClientContext& context);

}  // namespace reducer::transport::grpc_detail
