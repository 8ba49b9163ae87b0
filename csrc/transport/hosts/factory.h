// What carries frames between processes: tcp where both ends have it, else gRPC; both on one port.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "transport/grpc/factory.h"
#include "transport/transport.h"

namespace reducer::transport {

enum class Network {
  kAuto,  ///< connects by tcp, or by gRPC where the other end does not speak tcp; accepts both
  kGrpc,  ///< gRPC only
  kTcp,   ///< connects by tcp only; accepts both
};

struct HostsOptions {
  Network network = Network::kAuto;
  /// With TLS kAuto is kGrpc, and kTcp must not be asked for.
  /// Of gRPC, and for both: threads (each transport has as many) and congestion_control. gRPC is
  /// started when it is needed first, or at once if it has services of its own.
  GrpcOptions grpc;
  /// Told, in words, of a connection that goes by gRPC because the other end does not speak tcp.
  std::function<void(const std::string&)> inform;
};

/// Needs POSIX sockets. In a child that is forked from this process the transport does nothing and
/// must not be used; its destructor there leaves everything alone.
std::unique_ptr<Transport> makeHostsTransport(HostsOptions options);

}  // namespace reducer::transport
