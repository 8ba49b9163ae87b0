// TLS for what crosses hosts: the files, what may be wrong with them, and what they make of gRPC.
#pragma once

#include <memory>
#include <string>

#include "common/clock.h"
#include "common/status.h"
#include "transport/net/socket.h"

namespace grpc {
class ChannelCredentials;
class ServerCredentials;
}  // namespace grpc

namespace reducer::transport {

/// Paths of PEM files; empty: none. Nobody but OpenSSL and gRPC looks into the key's.
struct TlsFiles {
  std::string cert;  ///< what this end shows, with what leads to an authority
  std::string key;   ///< of cert; without a passphrase
  std::string ca;    ///< the authorities that the other end's certificate has to come from
  bool on() const { return !cert.empty() || !key.empty() || !ca.empty(); }
  bool operator==(const TlsFiles&) const = default;
};

/// Who shows what: a server its certificate, a client wants to check the server's.
enum class TlsRole { kServer, kClient, kBoth };

/// kInvalidArgument names the file, what is wrong with it (missing, no PEM, expired, another's key)
/// and what to do. Ok if there are no files.
Status checkTls(const TlsFiles& files, TlsRole role);

namespace grpc_detail {

/// Files that are renewed are read again within a second.
std::shared_ptr<grpc::ServerCredentials> serverCredentials(const TlsFiles& files);
std::shared_ptr<grpc::ChannelCredentials> channelCredentials(const TlsFiles& files);

/// Shakes hands on a connected socket as gRPC does, and says in words what is wrong; Ok if nothing
/// is. gRPC itself does not tell an expired certificate from an unknown authority. Returns within
/// `timeout` (kTimeout).
Status tryHandshake(net::Fd fd, const std::string& address, const TlsFiles& files,
                    Duration timeout);

/// What a connection of its own finds out when gRPC could not connect: TLS that is wrong, or here
/// or there only. Ok: nothing. Takes up to some seconds.
Status explain(const std::string& address, const TlsFiles& files);

}  // namespace grpc_detail
}  // namespace reducer::transport
