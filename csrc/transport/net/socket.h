// TCP sockets as the transports want them.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <string>
#include <utility>
#include <vector>

#include "common/status.h"

namespace reducer::transport::net {

/// A file descriptor with an owner.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Fd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t nbytes = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

/// "connection refused": errno in words that stand in the middle of a sentence.
std::string errorText(int error);

/// "10.0.0.4:7000" or "[fe80::1]:7000"; an IPv4 address as such, also where a socket for both kinds
/// has it.
std::string toString(const SocketAddress& any);

/// The addresses behind "host:port" or "[v6]:port". A name is looked up, which may take as long as
/// the system's resolver does. kInvalidArgument or kUnavailable with a text that has no address in
/// it.
Result<std::vector<SocketAddress>> resolve(const std::string& address);

/// A bound, listening socket that does not block. kUnavailable.
Result<Fd> listenAt(const SocketAddress& address, const std::string& congestion_control);

/// A socket that listens at "host:port", and the same address with the real port. kUnavailable with
/// the whole sentence.
Result<std::pair<Fd, std::string>> openListener(const std::string& address,
                                                const std::string& congestion_control);

/// Starts connecting: the socket becomes writable when that is decided (see connectError).
/// kUnavailable.
Result<Fd> startConnect(const SocketAddress& address, const std::string& congestion_control);

/// Empty if the connect that has just been decided succeeded, else why not.
std::string connectError(int fd);

/// An accepted connection and its peer, or an empty Fd if none waits.
std::pair<Fd, SocketAddress> acceptFrom(int listening);

/// The socket counts as readable once this many bytes wait (or it has ended).
void wakeAt(int fd, int nbytes);

/// gRPC makes TLS connections itself: its sockets that are connected to "host:port" get what those
/// made here have.
void careForSocketsTo(const std::string& address, const std::string& congestion_control);

bool isLoopback(const SocketAddress& address);

/// The address that the socket is bound to.
SocketAddress localAddress(int fd);

}  // namespace reducer::transport::net
