// Every transport as the suite takes it: two ends that can reach each other.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "transport/sim/sim.h"
#include "transport/tcp/factory.h"
#include "transport/transport.h"
#ifdef REDUCER_HAS_GRPC
#include "transport/hosts/factory.h"
#endif

namespace reducer::testing {

/// Two processes that can reach each other; the first listens at 127.0.0.1.
struct Carrier {
  std::unique_ptr<transport::SimNetwork> network;  // of the simulated ones
  std::unique_ptr<transport::Transport> server;
  std::unique_ptr<transport::Transport> client;
};

inline Carrier simCarrier() {
  transport::SimOptions options;
  options.threads = 2;
  options.piece_bytes_max = 3000;
  Carrier carrier;
  carrier.network = std::make_unique<transport::SimNetwork>(options);
  carrier.server = carrier.network->addHost("127.0.0.1");
  carrier.client = carrier.network->addHost("client");
  return carrier;
}

template <int kThreads>
inline Carrier tcpCarrier() {
  transport::TcpOptions options;
  options.threads = kThreads;
  Carrier carrier;
  carrier.server = transport::makeTcpTransport(options);
  carrier.client = transport::makeTcpTransport(options);
  return carrier;
}

#ifdef REDUCER_HAS_GRPC
template <transport::Network kServer, transport::Network kClient>
inline Carrier hostsCarrier() {
  transport::HostsOptions options;
  options.grpc.threads = 2;
  Carrier carrier;
  options.network = kServer;
  carrier.server = transport::makeHostsTransport(options);
  options.network = kClient;
  carrier.client = transport::makeHostsTransport(options);
  return carrier;
}

/// A certificate for 127.0.0.1 that is its own authority, made once.
inline const transport::TlsFiles& tlsFiles() {
  static const transport::TlsFiles files = [] {
    const std::string begin = ::testing::TempDir() + "reducer-" + std::to_string(getpid());
    transport::TlsFiles made{begin + ".pem", begin + ".key", begin + ".pem"};
    const std::string command =
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=test "
        "-addext subjectAltName=IP:127.0.0.1 -keyout " +
        made.key + " -out " + made.cert + " 2>/dev/null";
    EXPECT_EQ(std::system(command.c_str()), 0);
    const Status status = transport::checkTls(made, transport::TlsRole::kBoth);
    EXPECT_TRUE(status.ok()) << status.message();
    return made;
  }();
  return files;
}

inline Carrier tlsCarrier() {
  transport::HostsOptions options;
  options.grpc.threads = 2;
  options.grpc.tls = tlsFiles();
  Carrier carrier;
  carrier.server = transport::makeHostsTransport(options);
  carrier.client = transport::makeHostsTransport(options);
  return carrier;
}
#endif

}  // namespace reducer::testing
