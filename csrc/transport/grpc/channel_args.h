// Settings of gRPC that matter here, each with its reason.
#pragma once

#include <grpcpp/server_builder.h>
#include <grpcpp/support/channel_arguments.h>

namespace reducer::transport::grpc_detail {

grpc::ChannelArguments clientArguments();
void setServerArguments(grpc::ServerBuilder& builder);

/// Settings of the whole process: what gRPC logs, how its locks behave.
void prepareProcess();

}  // namespace reducer::transport::grpc_detail
