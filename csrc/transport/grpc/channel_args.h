// Settings of gRPC that matter here, each with its reason.
#pragma once

#include <grpcpp/server_builder.h>
#include <grpcpp/support/channel_arguments.h>

namespace reducer::transport::grpc_detail {

grpc::ChannelArguments clientArguments();
void setServerArguments(grpc::ServerBuilder& builder);

/// gRPC logs connection failures and the like, which we report ourselves: only its errors, unless GRPC_VERBOSITY says otherwise.
void quietGrpcLog();

}  // namespace reducer::transport::grpc_detail
