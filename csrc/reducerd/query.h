// Asking another reducer: reducer-server --stats HOST:PORT.
#pragma once

#include <string>

#include "common/status.h"

namespace reducer::reducerd {

/// The reply of reducer.v1.Control/Stats as one line of JSON with the proto's field names.
/// kUnavailable after 5 s.
Result<std::string> queryStats(const std::string& address);

}  // namespace reducer::reducerd
