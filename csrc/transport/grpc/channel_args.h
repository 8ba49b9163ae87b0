// The settings of gRPC's channels and servers, each with its reason.
#pragma once

#include <grpcpp/grpcpp.h>

namespace reducer::transport {

void configure(grpc::ChannelArguments& arguments);
void configure(grpc::ServerBuilder& builder);

}  // namespace reducer::transport
