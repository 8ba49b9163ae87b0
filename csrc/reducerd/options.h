// The command line of reducer-server.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>

#include "common/status.h"
#include "transport/hosts/factory.h"

namespace reducer::reducerd {

struct Options {
  std::string listen = "0.0.0.0:7000";
  int threads = 1;
  std::size_t memory_limit_bytes = 0;
  std::chrono::seconds grace{30};
  std::string congestion_control = "auto";
  transport::Network network = transport::Network::kAuto;  ///< what workers may connect by
  transport::TlsFiles tls;                                 ///< also from REDUCER_TLS_*
  std::string token_file;                                  ///< also from REDUCER_TOKEN_FILE
  std::string admin_token_file;                            ///< also from REDUCER_ADMIN_TOKEN_FILE
  std::string stats_of;                                    ///< not empty: ask this reducer and end
  bool help = false;
  bool version = false;
};

/// kInvalidArgument says which option is wrong and what it takes.
Result<Options> parseOptions(int argc, char** argv);
std::string helpText();

/// "4.0 GiB".
std::string readableSize(std::size_t nbytes);

}  // namespace reducer::reducerd
