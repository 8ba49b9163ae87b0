// What a user may set, each read from text with an error that names the setting.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace reducer::collective {

enum class Algorithm { kAuto, kDirect, kServer, kMixed, kRing, kLocal };

std::string_view nameOf(Algorithm algorithm) noexcept;
Result<Algorithm> parseAlgorithm(std::string_view text);

/// What bytes may travel by. kAuto: shared memory within a host, between processes the faster of
/// TCP and gRPC that both ends have. kGrpc: gRPC for everything. kTcp: TCP between processes, no
/// shared memory. kShm: as kAuto, but ranks of one host that cannot share memory are an error.
enum class Carrier { kAuto, kGrpc, kTcp, kShm };

std::string_view nameOf(Carrier carrier) noexcept;
Result<Carrier> parseCarrier(std::string_view text);

/// "4MiB", "64KiB", "1GB", "4096" -> bytes (KiB = 1024, KB = 1000; case does not matter).
Result<std::size_t> parseSize(std::string_view text);

/// "10gbit", "2.5gbit", "800mbit", "1000000bit" -> bits per second (k = 1000; case does not
/// matter).
Result<std::uint64_t> parseBandwidth(std::string_view text);

/// "host:port,host:port" or "[v6]:port" -> the list. Empty text: an empty list. Refuses empty
/// items, missing or impossible ports and repeated addresses, and says which item is wrong.
Result<std::vector<std::string>> parseServers(std::string_view text);

/// How the calls of [begin, end) bytes go.
struct SizeRange {
  std::uint64_t begin = 0;
  std::uint64_t end = kNoEnd;
  Algorithm algorithm = Algorithm::kAuto;
  std::size_t chunk_bytes = 0;   ///< 0: as the settings say
  std::size_t window_bytes = 0;  ///< 0: as the settings say

  static constexpr std::uint64_t kNoEnd = UINT64_MAX;
  bool operator==(const SizeRange&) const = default;
};

/// "mixed", or "0-64KiB:direct,64KiB-:mixed", each algorithm with its largest chunk and its window
/// if they are not to be those of the settings: "64KiB-:mixed/128KiB/8MiB". The ranges come in
/// order and are every size there is; an error names the item that is wrong, or what lies between.
Result<std::vector<SizeRange>> parseRanges(std::string_view text);
/// The shortest text that parseRanges() reads as these ranges.
std::string textOf(const std::vector<SizeRange>& ranges);

/// The smallest unit without a fraction: "64KiB", "100".
std::string sizeText(std::uint64_t nbytes);

/// A measured all-reduce: the median time of the slowest rank.
struct Sample {
  Algorithm algorithm = Algorithm::kDirect;
  std::size_t chunk_bytes = 0;   ///< 0: chosen by the library
  std::size_t window_bytes = 0;  ///< 0: chosen by the library
  std::uint32_t ranks = 1;
  std::uint32_t hosts = 1;    ///< that the ranks were on
  std::uint32_t servers = 0;  ///< standalone reducers
  std::uint64_t nbytes = 0;
  std::uint64_t nanoseconds = 1;

  bool isOf(std::size_t ranks_there, std::size_t hosts_there, std::size_t servers_there) const {
    return ranks == ranks_there && hosts == hosts_there && servers == servers_there;
  }
  double seconds() const { return 1e-9 * static_cast<double>(nanoseconds); }
  bool operator==(const Sample&) const = default;
};

struct Settings {
  Algorithm algorithm = Algorithm::kAuto;
  /// The algorithm by the bytes of a call, in order and without gaps; empty: `algorithm`, always.
  std::vector<SizeRange> ranges;
  /// What `auto` goes by: equal on all ranks. Empty: `mixed` with servers, else `direct`.
  std::vector<Sample> samples;
  /// The samples come later, by Group::adopt(): the group is made for all that `auto` may choose.
  bool measures = false;
  Carrier carrier = Carrier::kAuto;
  std::size_t chunk_bytes = 0;  ///< largest chunk; 0: chosen from the number of owners
  std::size_t window_bytes =
      0;  ///< most chunk bytes outstanding per worker, over all owners; 0: default
  std::chrono::milliseconds connect_timeout{60'000};
  bool checksum = false;  ///< CRC32C of every payload
  /// A silence of another process that is taken for its loss; 0: none is.
  std::chrono::milliseconds heartbeat{10'000};
  /// The group goes on without a standalone reducer that is lost. Equal on all ranks.
  bool failover = true;
  bool warns = true;  ///< on stderr, of what the user should know and no error says

  /// Takes what parseRanges() read.
  void choose(std::vector<SizeRange> by_size);
  /// What parseRanges() reads as this choice.
  std::string algorithmText() const;
};

}  // namespace reducer::collective
