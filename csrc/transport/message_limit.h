// What is said of a message that is longer than Connection::admit() allows, or its absence.
#pragma once

#include <cstddef>
#include <string>

#include "common/limits.h"

namespace reducer::transport {

inline std::string tooLong(std::size_t nbytes, std::size_t limit) {
  const std::string message = "a message of " + std::to_string(nbytes) + " bytes";
  return limit == kMaxStrangerBytes
             ? message + " before it has said who it is; until then the limit is " +
                   std::to_string(limit)
             : message + "; with the window that it announced the limit is " +
                   std::to_string(limit);
}

}  // namespace reducer::transport
