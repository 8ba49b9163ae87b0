#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <memory>

#include "runtime/runtime.h"
#include "transport/address.h"

namespace reducer::runtime {
namespace {

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressList lookUp(const std::string& host, const char* service, int flags, int* error) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  *error = getaddrinfo(host.c_str(), service, &hints, &found);
  return {*error == 0 ? found : nullptr, freeaddrinfo};
}

std::string numeric(const sockaddr* address, socklen_t size) {
  std::array<char, NI_MAXHOST> text{};
  if (getnameinfo(address, size, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST) != 0)
    return {};
  return text.data();
}

/// The local address that packets to `peer` leave from: a datagram socket is connected, nothing is
/// sent.
std::string routeTo(const addrinfo& peer) {
  const int fd = socket(peer.ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return {};
  std::string local;
  sockaddr_storage name{};
  socklen_t size = sizeof name;
  if (connect(fd, peer.ai_addr, peer.ai_addrlen) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size) == 0) {
    local = numeric(reinterpret_cast<const sockaddr*>(&name), size);
  }
  close(fd);
  return local;
}

}  // namespace

std::string hostLabel() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return std::string(name.data()) + ":" + std::to_string(getpid());
}

std::string hostIdentity() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  struct stat network {};
  if (boot.empty() || stat("/proc/self/ns/net", &network) != 0) {
    // Nothing to tell hosts apart by: this process shares with nobody.
    return hostLabel();
  }
  return boot + "/net:" + std::to_string(network.st_ino) + "/uid:" + std::to_string(geteuid());
}

Result<std::string> chooseBindHost(const std::string& name_or_address,
                                   const std::string& peer_host) {
  ifaddrs* raw = nullptr;
  if (getifaddrs(&raw) != 0)
    return Status(Code::kInternal, "the host's interfaces cannot be listed");
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> interfaces(raw, freeifaddrs);
  std::string known;
  std::string v6;
  for (const ifaddrs* one = raw; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr) continue;
    const int family = one->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const std::string address =
        numeric(one->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
    if (!name_or_address.empty()) {
      if (address == name_or_address) return address;
      if (name_or_address == one->ifa_name) {
        if (family == AF_INET) return address;
        if (v6.empty() && address.find('%') == std::string::npos) v6 = address;
      }
    }
    if (family == AF_INET)
      known += (known.empty() ? "" : ", ") + std::string(one->ifa_name) + " (" + address + ")";
  }
  if (!v6.empty()) return v6;
  if (!name_or_address.empty()) {
    return Status(Code::kInvalidArgument,
                  "'" + name_or_address +
                      "' is no interface of this host and no address of one; there are " + known);
  }
  int error = 0;
  const AddressList peers = lookUp(peer_host, "9", 0, &error);
  if (error != 0) {
    return Status(Code::kInvalidArgument,
                  "'" + peer_host + "' cannot be resolved (" + gai_strerror(error) +
                      "), so the interface towards it is unknown; set REDUCER_INTERFACE to one "
                      "of " +
                      known);
  }
  for (const addrinfo* peer = peers.get(); peer != nullptr; peer = peer->ai_next) {
    if (const std::string local = routeTo(*peer); !local.empty()) return local;
  }
  return Status(Code::kUnavailable, "there is no route to '" + peer_host +
                                        "'; set REDUCER_INTERFACE to one of " + known);
}

Result<std::vector<std::string>> resolveServers(const std::vector<std::string>& servers) {
  std::vector<std::string> resolved;
  for (const std::string& server : servers) {
    const auto address = transport::parseAddress(server);
    if (!address) return Status(Code::kInvalidArgument, "'" + server + "' is not host:port");
    std::string host = address->host;
    if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
    int error = 0;
    const AddressList found = lookUp(host, nullptr, 0, &error);
    if (error != 0) {
      return Status(Code::kInvalidArgument,
                    "the host of '" + server + "' cannot be resolved: " + gai_strerror(error));
    }
    std::vector<std::string> addresses;
    bool v4 = false;
    for (const addrinfo* one = found.get(); one != nullptr; one = one->ai_next)
      v4 |= one->ai_family == AF_INET;
    for (const addrinfo* one = found.get(); one != nullptr; one = one->ai_next) {
      // A host that has both kinds of address is still one reducer: the older kind is taken.
      if (v4 && one->ai_family != AF_INET) continue;
      std::string text = numeric(one->ai_addr, one->ai_addrlen);
      if (one->ai_family == AF_INET6) text = "[" + text + "]";
      text += ":" + std::to_string(address->port);
      if (std::find(addresses.begin(), addresses.end(), text) == addresses.end())
        addresses.push_back(text);
    }
    std::sort(addresses.begin(), addresses.end());  // a resolver may turn the order
    for (const std::string& text : addresses) {
      if (std::find(resolved.begin(), resolved.end(), text) != resolved.end()) {
        return Status(Code::kInvalidArgument,
                      "'" + server + "' is " + text + ", which stands there twice");
      }
      resolved.push_back(text);
    }
  }
  return resolved;
}

}  // namespace reducer::runtime
