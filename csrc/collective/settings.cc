#include "collective/settings.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <limits>
#include <utility>

namespace reducer::collective {
namespace {

constexpr std::array<std::pair<std::string_view, Algorithm>, 5> kAlgorithms{{
    {"auto", Algorithm::kAuto},
    {"direct", Algorithm::kDirect},
    {"server", Algorithm::kServer},
    {"mixed", Algorithm::kMixed},
    {"ring", Algorithm::kRing},
}};

constexpr std::array<std::pair<std::string_view, Carrier>, 4> kCarriers{{
    {"auto", Carrier::kAuto},
    {"grpc", Carrier::kGrpc},
    {"tcp", Carrier::kTcp},
    {"shm", Carrier::kShm},
}};

constexpr std::array<std::pair<std::string_view, std::uint64_t>, 15> kUnits{{
    {"", 1},
    {"b", 1},
    {"k", 1ull << 10},
    {"kib", 1ull << 10},
    {"kb", 1'000},
    {"m", 1ull << 20},
    {"mib", 1ull << 20},
    {"mb", 1'000'000},
    {"g", 1ull << 30},
    {"gib", 1ull << 30},
    {"gb", 1'000'000'000},
    {"t", 1ull << 40},
    {"tib", 1ull << 40},
    {"tb", 1'000'000'000'000},
    {"byte", 1},
}};

std::string_view trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())))
    text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())))
    text.remove_suffix(1);
  return text;
}

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return out;
}

Status wrong(std::string text) { return Status(Code::kInvalidArgument, std::move(text)); }

template <class Names, class Value>
std::string_view nameIn(const Names& names, Value wanted) noexcept {
  for (const auto& [name, value] : names) {
    if (value == wanted) return name;
  }
  return "?";
}

/// `what`: "algorithm".
template <class Names>
auto valueIn(const Names& names, std::string_view text, const char* what)
    -> Result<std::decay_t<decltype(names[0].second)>> {
  const std::string wanted = lower(trim(text));
  std::string known;
  for (const auto& [name, value] : names) {
    if (name == wanted) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  return wrong("'" + std::string(text) + "' is no " + what + "; there are " + known);
}

Status checkAddress(std::string_view item) {
  const std::string quoted = "'" + std::string(item) + "'";
  if (item.find_first_of(" \t/@;") != std::string_view::npos) {
    return wrong(quoted + " has a character that no address has; write host:port,host:port");
  }
  const std::size_t colon = item.rfind(':');
  if (colon == std::string_view::npos || item.back() == ']') {
    return wrong(quoted + " has no port; write host:port");
  }
  std::string_view host = item.substr(0, colon);
  const std::string_view port = item.substr(colon + 1);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (!bracketed && host.find(':') != std::string_view::npos) {
    return wrong(quoted + " is not host:port; put an IPv6 address in brackets, as in [::1]:7000");
  }
  if (host.empty()) return wrong(quoted + " has no host; write host:port");
  unsigned value = 0;
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), value);
  if (error != std::errc() || end != port.data() + port.size() || value == 0 || value > 65535) {
    return wrong(quoted + " has the port '" + std::string(port) +
                 "', which is not a number from 1 to 65535");
  }
  return {};
}

}  // namespace

std::string_view nameOf(Algorithm algorithm) noexcept { return nameIn(kAlgorithms, algorithm); }

Result<Algorithm> parseAlgorithm(std::string_view text) {
  return valueIn(kAlgorithms, text, "algorithm");
}

std::string_view nameOf(Carrier carrier) noexcept { return nameIn(kCarriers, carrier); }

Result<Carrier> parseCarrier(std::string_view text) {
  return valueIn(kCarriers, text, "transport");
}

Result<std::size_t> parseSize(std::string_view text) {
  const std::string item = lower(trim(text));
  double value = 0;
  const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), value);
  const std::string_view unit = trim(std::string_view(end, item.data() + item.size()));
  const auto found = std::find_if(kUnits.begin(), kUnits.end(),
                                  [&](const auto& known) { return known.first == unit; });
  if (error != std::errc() || found == kUnits.end() || !(value >= 0)) {
    return wrong("'" + std::string(text) +
                 "' is no size; write bytes or a unit, as in 65536, 64KiB, 4MiB, 1GB");
  }
  const double bytes = value * static_cast<double>(found->second);
  if (bytes > 9.0e15) return wrong("'" + std::string(text) + "' is too large a size");
  return static_cast<std::size_t>(bytes);
}

Result<std::vector<std::string>> parseServers(std::string_view text) {
  std::vector<std::string> servers;
  if (trim(text).empty()) return servers;
  while (true) {
    const std::size_t comma = text.find(',');
    const std::string_view item = trim(text.substr(0, comma));
    if (item.empty()) {
      return wrong("item " + std::to_string(servers.size() + 1) +
                   " is empty; write host:port,host:port without a comma at the end");
    }
    if (Status status = checkAddress(item); !status.ok()) return status;
    if (std::find(servers.begin(), servers.end(), item) != servers.end()) {
      return wrong("'" + std::string(item) + "' stands there twice");
    }
    servers.emplace_back(item);
    if (comma == std::string_view::npos) return servers;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace reducer::collective
