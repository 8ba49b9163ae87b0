// The transport between hosts: gRPC's asynchronous C++ API, raw slices, no protobuf copy of a
// payload.
#pragma once

#include <functional>
#include <memory>

#include "transport/transport.h"

namespace grpc {
class ServerBuilder;
}

namespace reducer::transport {

struct GrpcOptions {
  int threads = 1;  ///< completion queues, one thread each
  /// Called on each listener's builder before it starts, to add services (a standalone reducer's
  /// control plane).
  std::function<void(grpc::ServerBuilder&)> configure_server;
};

std::unique_ptr<Transport> makeGrpcTransport(const GrpcOptions& options);

}  // namespace reducer::transport
