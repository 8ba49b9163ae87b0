#include "transport/grpc/peer.h"

#include <charconv>
#include <string_view>
#include <utility>

#include "transport/net/socket.h"

namespace reducer::transport::grpc_detail {

std::string addressOf(const std::string& grpc_peer) {
  std::string address = grpc_peer.substr(grpc_peer.find(':') + 1);
  for (const auto& [written, meant] : {std::pair("%5B", "["), std::pair("%5D", "]")}) {
    if (const auto at = address.find(written); at != std::string::npos) {
      address.replace(at, 3, meant);
    }
  }
  return address;
}

std::string callerOf(const grpc::ServerContext& context) {
  const std::string name = context.peer();
  constexpr std::string_view kSocket = "fd:";  // without TLS: one that was accepted here
  if (!name.starts_with(kSocket)) return addressOf(name);
  int fd = -1;
  std::from_chars(name.data() + kSocket.size(), name.data() + name.size(), fd);
  net::SocketAddress peer;
  peer.nbytes = sizeof peer.storage;
  const bool known = getpeername(fd, reinterpret_cast<sockaddr*>(&peer.storage), &peer.nbytes) == 0;
  return known ? net::toString(peer) : name;  // it has just broken
}

}  // namespace reducer::transport::grpc_detail
