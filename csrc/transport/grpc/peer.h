// Who is at the other end of a call, which gRPC names in its own way.
#pragma once

#include <grpcpp/server_context.h>

#include <string>

namespace reducer::transport::grpc_detail {

/// "ipv6:%5B::1%5D:7000", as gRPC calls a peer, as "[::1]:7000".
std::string addressOf(const std::string& grpc_peer);

/// The caller of a service that GrpcOptions::configure_server added, as "host:port".
std::string callerOf(const grpc::ServerContext& context);

}  // namespace reducer::transport::grpc_detail
