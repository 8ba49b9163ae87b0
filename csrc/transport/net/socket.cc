#include "transport/net/socket.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <memory>

#include "transport/address.h"
#include "transport/net/fork.h"

namespace reducer::transport::net {
namespace {

constexpr int kBacklog = 1024;

// A host that lost its power or its network says no goodbye; the kernel finds out. Idle connections
// are probed, and data that nobody acknowledges fails the connection (without this, after a quarter
// of an hour).
constexpr int kProbeAfterSeconds = 15;
constexpr int kProbeEverySeconds = 5;
constexpr int kProbes = 3;
constexpr unsigned kSilenceMilliseconds = 30'000;

template <class T>
void set(int fd, int level, int option, T value) {
  // None of these is needed for right results, so an old kernel's refusal is no error.
  (void)setsockopt(fd, level, option, &value, sizeof value);
}

Status setCongestionControl(int fd, const std::string& name) {
  if (name == "system") return {};
  const bool any = name == "auto";
  const std::string wanted = any ? "reno" : name;
  if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, wanted.data(),
                 static_cast<socklen_t>(wanted.size())) == 0 ||
      any) {
    return {};
  }
  const int error = errno;
  std::string available;
  std::ifstream file("/proc/sys/net/ipv4/tcp_available_congestion_control");
  std::getline(file, available);
  return Status(Code::kUnavailable, "the congestion control '" + name + "' cannot be used: " +
                                        errorText(error) + " (this kernel has: " + available + ")");
}

/// On a listening socket these are inherited by what it accepts.
Status prepare(int fd, const std::string& congestion_control) {
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, kProbeAfterSeconds);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, kProbeEverySeconds);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, kProbes);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kSilenceMilliseconds);
  if (Status status = setCongestionControl(fd, congestion_control); !status.ok()) return status;
  closeInChildren(fd);
  return {};
}

Result<Fd> makeSocket(const SocketAddress& address, const std::string& congestion_control) {
  Fd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
  if (!fd) return Status(Code::kUnavailable, "no socket: " + errorText(errno));
  if (Status status = prepare(fd.get(), congestion_control); !status.ok()) return status;
  return fd;
}

/// "::ffff:10.0.0.4", which a socket for both kinds of address calls it, as 10.0.0.4.
SocketAddress withoutMapping(const SocketAddress& address) {
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address.storage);
  if (address.storage.ss_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) return address;
  SocketAddress plain;
  auto& v4 = reinterpret_cast<sockaddr_in&>(plain.storage);
  v4.sin_family = AF_INET;
  v4.sin_port = v6.sin6_port;
  std::memcpy(&v4.sin_addr, v6.sin6_addr.s6_addr + 12, sizeof v4.sin_addr);
  plain.nbytes = sizeof v4;
  return plain;
}

}  // namespace

std::string errorText(int error) {
  std::string text = std::strerror(error);
  if (text.size() > 1 && std::islower(static_cast<unsigned char>(text[1]))) {
    text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  }
  return text;
}

void Fd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

std::string toString(const SocketAddress& any) {
  const SocketAddress address = withoutMapping(any);
  char host[INET6_ADDRSTRLEN] = "?";
  if (address.storage.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address.storage);
    inet_ntop(AF_INET6, &v6.sin6_addr, host, sizeof host);
    return "[" + std::string(host) + "]:" + std::to_string(ntohs(v6.sin6_port));
  }
  const auto& v4 = reinterpret_cast<const sockaddr_in&>(address.storage);
  inet_ntop(AF_INET, &v4.sin_addr, host, sizeof host);
  return std::string(host) + ":" + std::to_string(ntohs(v4.sin_port));
}

Result<std::vector<SocketAddress>> resolve(const std::string& address) {
  const auto parsed = parseAddress(dialledOf(address));
  if (!parsed) {
    return Status(Code::kInvalidArgument, "this is not host:port with a port from 0 to 65535");
  }
  std::string host = parsed->host;
  const std::string port = std::to_string(parsed->port);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  if (const int failed = getaddrinfo(host.c_str(), port.c_str(), &hints, &list); failed != 0) {
    return Status(Code::kUnavailable,
                  "the name '" + host + "' is not known: " + gai_strerror(failed));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(list, &freeaddrinfo);
  std::vector<SocketAddress> addresses;
  for (const addrinfo* one = list; one != nullptr; one = one->ai_next) {
    SocketAddress entry;
    std::memcpy(&entry.storage, one->ai_addr, one->ai_addrlen);
    entry.nbytes = one->ai_addrlen;
    addresses.push_back(entry);
  }
  return addresses;
}

Result<Fd> listenAt(const SocketAddress& address, const std::string& congestion_control) {
  auto made = makeSocket(address, congestion_control);
  if (!made.ok()) return made.status();
  Fd fd = std::move(made).value();
  set(fd.get(), SOL_SOCKET, SO_REUSEADDR,
      1);  // a server that is started again need not wait for old connections
  if (bind(fd.get(), address.get(), address.nbytes) != 0 || listen(fd.get(), kBacklog) != 0) {
    return Status(Code::kUnavailable,
                  errno == EADDRINUSE
                      ? "the port is in use by another process; choose another one, or 0 for any"
                      : errorText(errno));
  }
  return fd;
}

Result<std::pair<Fd, std::string>> openListener(const std::string& address,
                                                const std::string& congestion_control) {
  const auto failed = [&](const std::string& why) {
    return Status(Code::kUnavailable, "cannot listen on " + address + ": " + why);
  };
  auto resolved = resolve(address);
  if (!resolved.ok()) return failed(resolved.status().message());
  auto socket = listenAt(resolved.value().front(), congestion_control);
  if (!socket.ok()) return failed(socket.status().message());
  // The host as it was written, the port as it is.
  const std::string real = toString(localAddress(socket.value().get()));
  return std::pair(std::move(socket).value(),
                   address.substr(0, address.rfind(':')) + real.substr(real.rfind(':')));
}

Result<Fd> startConnect(const SocketAddress& address, const std::string& congestion_control) {
  auto made = makeSocket(address, congestion_control);
  if (!made.ok()) return made.status();
  Fd fd = std::move(made).value();
  if (connect(fd.get(), address.get(), address.nbytes) != 0 && errno != EINPROGRESS) {
    return Status(Code::kUnavailable, errorText(errno));
  }
  return fd;
}

std::string connectError(int fd) {
  int error = 0;
  socklen_t nbytes = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &nbytes) != 0) error = errno;
  if (error != 0) return errorText(error);
  // A connect to a free port of this host may pick that very port for itself and so reach itself.
  SocketAddress peer;
  peer.nbytes = sizeof peer.storage;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer.storage), &peer.nbytes) != 0)
    return errorText(errno);
  return toString(peer) == toString(localAddress(fd)) ? errorText(ECONNREFUSED) : std::string();
}

std::pair<Fd, SocketAddress> acceptFrom(int listening) {
  SocketAddress peer;
  peer.nbytes = sizeof peer.storage;
  Fd fd(accept4(listening, reinterpret_cast<sockaddr*>(&peer.storage), &peer.nbytes,
                SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd) closeInChildren(fd.get());
  return {std::move(fd), peer};
}

void wakeAt(int fd, int nbytes) { set(fd, SOL_SOCKET, SO_RCVLOWAT, nbytes); }

void careForSocketsTo(const std::string& address, const std::string& congestion_control) {
  auto wanted = resolve(address);
  if (!wanted.ok()) return;
  const auto close = [](DIR* folder) { closedir(folder); };
  const std::unique_ptr<DIR, decltype(close)> all(opendir("/proc/self/fd"), close);
  if (!all) return;
  while (const dirent* const entry = readdir(all.get())) {
    int fd = -1;
    const char* const end = entry->d_name + std::strlen(entry->d_name);
    if (std::from_chars(entry->d_name, end, fd).ptr != end) continue;
    SocketAddress peer;
    peer.nbytes = sizeof peer.storage;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer.storage), &peer.nbytes) != 0) continue;
    for (const SocketAddress& one : wanted.value()) {
      // One that cannot have the congestion control keeps that of the system.
      if (toString(one) == toString(peer)) (void)prepare(fd, congestion_control);
    }
  }
}

bool isLoopback(const SocketAddress& address) {
  if (address.storage.ss_family == AF_INET6) {
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(address.storage).sin6_addr);
  }
  const auto& v4 = reinterpret_cast<const sockaddr_in&>(address.storage);
  return ntohl(v4.sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
}

SocketAddress localAddress(int fd) {
  SocketAddress local;
  local.nbytes = sizeof local.storage;
  (void)getsockname(fd, reinterpret_cast<sockaddr*>(&local.storage), &local.nbytes);
  return local;
}

}  // namespace reducer::transport::net
