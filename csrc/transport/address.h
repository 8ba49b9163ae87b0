// "host:port", taken apart.
#pragma once

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

}  // namespace reducer::transport
