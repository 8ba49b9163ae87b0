// What a user may set, each read from text with an error that names the setting.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace reducer::collective {

enum class Algorithm { kAuto, kDirect, kServer, kMixed, kRing };

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

/// "host:port,host:port" or "[v6]:port" -> the list. Empty text: an empty list. Refuses empty
/// items, missing or impossible ports and repeated addresses, and says which item is wrong.
Result<std::vector<std::string>> parseServers(std::string_view text);

struct Settings {
  Algorithm algorithm = Algorithm::kAuto;
  Carrier carrier = Carrier::kAuto;
  std::size_t chunk_bytes = 0;  ///< largest chunk; 0: chosen from the number of owners
  std::size_t window_bytes =
      0;  ///< most chunk bytes outstanding per worker, over all owners; 0: default
  std::chrono::milliseconds connect_timeout{60'000};
  bool checksum = false;  ///< CRC32C of every payload
};

}  // namespace reducer::collective
