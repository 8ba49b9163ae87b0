// The transport between processes that speak the same: frames as they are, on TCP sockets of our
// own.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "transport/net/guests.h"
#include "transport/net/socket.h"
#include "transport/transport.h"

namespace reducer::transport {

struct TcpOptions {
  int threads = 1;                          ///< that move frames and run handlers
  std::string congestion_control = "auto";  ///< as GrpcOptions::congestion_control
};

/// In a child that is forked from this process the transport does nothing and must not be used; its
/// destructor there leaves everything alone.
class TcpTransport : public Transport {
 public:
  /// Gets accepted connections that begin as HTTP/2 does, with all their bytes.
  using Http2 = std::function<void(net::Fd fd, const net::SocketAddress& peer,
                                   std::shared_ptr<net::Guest> guest)>;
  /// Connects in another way, to an address where somebody answers but not in tcp. `why`: in words.
  using Fallback = std::function<std::shared_ptr<Connection>(
      std::shared_ptr<Handler> handler, Duration timeout, const std::string& why)>;

  /// As listen(); without `http2` such connections are closed, as are all others that do not speak
  /// tcp.
  virtual Result<std::unique_ptr<Listener>> listenBeside(const std::string& address,
                                                         Acceptor acceptor, Http2 http2) = 0;
  /// As connect(); without `fallback` it keeps trying, until its timeout.
  virtual std::shared_ptr<Connection> connectOr(const std::string& address,
                                                std::shared_ptr<Handler> handler, Duration timeout,
                                                Fallback fallback) = 0;
};

std::unique_ptr<TcpTransport> makeTcpTransport(const TcpOptions& options);

}  // namespace reducer::transport
