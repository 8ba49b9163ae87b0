// "host:port", taken apart.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>

namespace reducer::transport {

struct Address {
  std::string host;
  std::uint16_t port = 0;
};

/// None if `text` is not "host:port" with a port from 0 to 65535.
inline std::optional<Address> parseAddress(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return std::nullopt;
  Address address{text.substr(0, colon), 0};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data() + colon + 1, end, address.port);
  if (error != std::errc() || stop != end) return std::nullopt;
  return address;
}

// An address that was found by a name keeps it: a certificate is the name's, and the name may have
// another address one day. "reducer-1/10.0.0.4:7000".

/// Without the name: "10.0.0.4:7000".
inline std::string dialledOf(const std::string& address) {
  const std::size_t slash = address.find('/');
  return slash == std::string::npos ? address : address.substr(slash + 1);
}

/// To be looked up anew where there is a name, "reducer-1/reducer-1:7000"; else the address.
inline std::string namedOf(const std::string& address) {
  const std::size_t slash = address.find('/');
  if (slash == std::string::npos) return address;
  const std::string name = address.substr(0, slash);
  return name + "/" + name + address.substr(address.rfind(':'));
}

/// What the peer's certificate has to be for: the name, or else the host ("10.0.0.4", "[::1]").
inline std::string peerName(const std::string& address) {
  return address.substr(0, std::min(address.find('/'), address.rfind(':')));
}

}  // namespace reducer::transport
