#include "collective/settings.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <limits>
#include <utility>

#include "common/limits.h"

namespace reducer::collective {
namespace {

constexpr std::array<std::pair<std::string_view, Algorithm>, 6> kAlgorithms{{
    {"auto", Algorithm::kAuto},
    {"direct", Algorithm::kDirect},
    {"server", Algorithm::kServer},
    {"mixed", Algorithm::kMixed},
    {"ring", Algorithm::kRing},
    {"local", Algorithm::kLocal},
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

constexpr std::array<std::pair<std::string_view, std::uint64_t>, 5> kBitUnits{{
    {"bit", 1},
    {"kbit", 1'000},
    {"mbit", 1'000'000},
    {"gbit", 1'000'000'000},
    {"tbit", 1'000'000'000'000},
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

/// A number and its unit; less than 0: it is none.
template <class Units>
double measure(std::string_view text, const Units& units) {
  const std::string item = lower(trim(text));
  double value = 0;
  const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), value);
  const std::string_view unit = trim(std::string_view(end, item.data() + item.size()));
  const auto found = std::find_if(units.begin(), units.end(),
                                  [&](const auto& known) { return known.first == unit; });
  if (error != std::errc() || found == units.end() || !(value >= 0)) return -1;
  return value * static_cast<double>(found->second);
}

/// "direct" or "mixed/128KiB/8MiB" into a range.
Status readChoice(std::string_view text, SizeRange& range) {
  const std::size_t first = text.find('/');
  const std::size_t second = first == std::string_view::npos ? first : text.find('/', first + 1);
  Result<Algorithm> algorithm = parseAlgorithm(text.substr(0, first));
  if (!algorithm.ok()) return algorithm.status();
  range.algorithm = algorithm.value();
  if (first != std::string_view::npos) {
    Result<std::size_t> chunk = parseSize(text.substr(first + 1, second - first - 1));
    if (!chunk.ok()) return chunk.status();
    range.chunk_bytes = chunk.value();
    if (range.chunk_bytes != 0 &&
        (range.chunk_bytes < kMinChunkBytes || range.chunk_bytes > kMaxChunkBytes)) {
      return wrong("its chunk of " + sizeText(range.chunk_bytes) + " is outside of 4KiB to 16MiB");
    }
  }
  if (second != std::string_view::npos) {
    Result<std::size_t> window = parseSize(text.substr(second + 1));
    if (!window.ok()) return window.status();
    range.window_bytes = window.value();
  }
  return {};
}

Status readRange(std::string_view item, SizeRange& range) {
  const std::size_t colon = item.find(':');
  if (colon == std::string_view::npos) {
    return wrong("it has no algorithm; write a range and one, as in 0-64KiB:direct");
  }
  const std::string_view sizes = item.substr(0, colon);
  const std::size_t dash = sizes.find('-');
  if (dash == std::string_view::npos) {
    return wrong("'" + std::string(sizes) + "' is no range; write 0-64KiB, or 64KiB- without end");
  }
  Result<std::size_t> begin = parseSize(sizes.substr(0, dash));
  if (!begin.ok()) return begin.status();
  range.begin = begin.value();
  const std::string_view end_text = trim(sizes.substr(dash + 1));
  if (!end_text.empty()) {
    Result<std::size_t> end = parseSize(end_text);
    if (!end.ok()) return end.status();
    range.end = end.value();
    if (range.end <= range.begin) return wrong("it ends before it begins");
  }
  return readChoice(item.substr(colon + 1), range);
}

std::string quoted(const SizeRange& range) { return "'" + textOf({range}) + "'"; }

/// Every size is in one range.
Status checkCover(const std::vector<SizeRange>& ranges) {
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const SizeRange& range = ranges[i];
    if (range.begin < at) {
      return wrong(quoted(ranges[i - 1]) + " and " + quoted(range) +
                   " overlap; an end is the first size that is not in a range");
    }
    if (range.begin > at) {
      return wrong("no algorithm is given for " + sizeText(at) + "-" + sizeText(range.begin) +
                   ", before " + quoted(range));
    }
    at = range.end;
  }
  if (at == SizeRange::kNoEnd) return {};
  return wrong("no algorithm is given from " + sizeText(at) + " on; end with a range like " +
               sizeText(at) + "-:direct");
}

}  // namespace

std::string sizeText(std::uint64_t nbytes) {
  constexpr std::array<std::string_view, 5> kNames{"", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (unit + 1 < kNames.size() && nbytes != 0 && nbytes % 1024 == 0) {
    nbytes /= 1024;
    ++unit;
  }
  return std::to_string(nbytes) + std::string(kNames[unit]);
}

std::string textOf(const std::vector<SizeRange>& ranges) {
  std::string text;
  for (const SizeRange& range : ranges) {
    const bool every_size = range.begin == 0 && range.end == SizeRange::kNoEnd;
    if (!text.empty()) text += ",";
    if (!every_size || range.chunk_bytes != 0 || range.window_bytes != 0) {
      text += sizeText(range.begin) + "-";
      if (range.end != SizeRange::kNoEnd) text += sizeText(range.end);
      text += ":";
    }
    text += nameOf(range.algorithm);
    if (range.chunk_bytes != 0 || range.window_bytes != 0) {
      text += "/" + sizeText(range.chunk_bytes);
    }
    if (range.window_bytes != 0) text += "/" + sizeText(range.window_bytes);
  }
  return text;
}

Result<std::vector<SizeRange>> parseRanges(std::string_view text) {
  std::vector<SizeRange> ranges(1);
  if (text.find_first_of(":,") == std::string_view::npos) {
    Result<Algorithm> algorithm = parseAlgorithm(text);
    if (!algorithm.ok()) return algorithm.status();
    ranges[0].algorithm = algorithm.value();
    return ranges;
  }
  ranges.clear();
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string_view item = trim(text.substr(at, comma - at));
    if (item.empty()) {
      return wrong("item " + std::to_string(ranges.size() + 1) +
                   " is empty; write 0-64KiB:direct,64KiB-:mixed without a comma at the end");
    }
    SizeRange range;
    if (const Status status = readRange(item, range); !status.ok()) {
      return wrong("in '" + std::string(item) + "': " + status.message());
    }
    ranges.push_back(range);
    at = comma + 1;
  }
  std::stable_sort(ranges.begin(), ranges.end(),
                   [](const SizeRange& a, const SizeRange& b) { return a.begin < b.begin; });
  if (Status status = checkCover(ranges); !status.ok()) return status;
  return ranges;
}

std::string_view nameOf(Algorithm algorithm) noexcept { return nameIn(kAlgorithms, algorithm); }

Result<Algorithm> parseAlgorithm(std::string_view text) {
  return valueIn(kAlgorithms, text, "algorithm");
}

std::string_view nameOf(Carrier carrier) noexcept { return nameIn(kCarriers, carrier); }

Result<Carrier> parseCarrier(std::string_view text) {
  return valueIn(kCarriers, text, "transport");
}

void Settings::choose(std::vector<SizeRange> by_size) {
  const bool one =
      by_size.size() == 1 && by_size[0] == SizeRange{.algorithm = by_size[0].algorithm};
  algorithm = one ? by_size[0].algorithm : Algorithm::kAuto;
  ranges = one ? std::vector<SizeRange>{} : std::move(by_size);
}

std::string Settings::algorithmText() const {
  return ranges.empty() ? std::string(nameOf(algorithm)) : textOf(ranges);
}

Result<std::uint64_t> parseBandwidth(std::string_view text) {
  const double bits = measure(text, kBitUnits);
  if (bits >= 1 && bits <= 9.0e15) return static_cast<std::uint64_t>(bits);
  return wrong("'" + std::string(text) +
               "' is no bandwidth; write it as in 10gbit, 2.5gbit or 800mbit");
}

Result<std::size_t> parseSize(std::string_view text) {
  const double bytes = measure(text, kUnits);
  if (bytes < 0) {
    return wrong("'" + std::string(text) +
                 "' is no size; write bytes or a unit, as in 65536, 64KiB, 4MiB, 1GB");
  }
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
