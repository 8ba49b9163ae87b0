// Asking another reducer: reducer-server --stats HOST:PORT.
#pragma once

#include <string>

#include "common/status.h"
#include "reducerd/options.h"

namespace reducer::reducerd {

/// The reply of reducer.v1.Control/Stats at `options.stats_of`, asked with its TLS files and token,
/// as one line of JSON with the proto's field names. kUnavailable after 5 s.
Result<std::string> queryStats(const Options& options);

}  // namespace reducer::reducerd
