// The transport between hosts: gRPC's asynchronous C++ API, raw slices, no protobuf copy of a
// payload.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "transport/grpc/tls.h"
#include "transport/net/guests.h"
#include "transport/net/socket.h"
#include "transport/transport.h"

namespace grpc {
class ServerBuilder;
class ServerCompletionQueue;
}  // namespace grpc

namespace reducer::transport {

struct GrpcOptions {
  int threads = 1;  ///< threads that move frames and run handlers
  /// Called once, on the builder of the server that all listeners share, before it starts: adds
  /// services (a standalone reducer's control plane). Only services without threads of their own
  /// belong here: those of gRPC's synchronous and callback kinds poll the same sockets and take
  /// events from the transport's threads.
  std::function<void(grpc::ServerBuilder&)> configure_server;
  /// Called once the server has started, with the queue that the transport's threads serve:
  /// asynchronous services make their first request here. A tag on this queue must point to a
  /// GrpcTag.
  std::function<void(grpc::ServerCompletionQueue&)> serve;
  /// The kernel's congestion control for every connection: "auto" is reno where the kernel permits
  /// it (short bursts both ways stall less with it: docs/performance.md), "system" is the host's
  /// own, everything else a name ("bbr", "cubic"). A name that the kernel does not have makes
  /// listen() and connects fail with a message that lists those it has.
  std::string congestion_control = "auto";
  /// With any of them every connection is TLS, both ways, and all else is refused. To be checked
  /// (checkTls) before the transport is made. gRPC's TLS knows an accepted connection by its peer's
  /// address only: one listener for each transport.
  TlsFiles tls;
};

/// What a completion queue hands back. Lives at least until complete() was called.
class GrpcTag {
 public:
  virtual ~GrpcTag() = default;
  /// From a transport thread; `ok` as gRPC defines it for the operation.
  virtual void complete(bool ok) = 0;
};

/// A listener for connections that another transport has accepted, where both share a port.
class GrpcReception : public Listener {
 public:
  /// A connected socket, of which nothing has been read.
  virtual void take(net::Fd fd, const net::SocketAddress& peer,
                    std::shared_ptr<net::Guest> guest) = 0;
};

class GrpcTransport : public Transport {
 public:
  virtual std::unique_ptr<GrpcReception> receive(const std::string& address, Acceptor acceptor) = 0;
};

/// Needs POSIX sockets. In a child that is forked from this process the transport does nothing and
/// must not be used; its destructor there leaves everything alone.
std::unique_ptr<GrpcTransport> makeGrpcTransport(const GrpcOptions& options);

}  // namespace reducer::transport
