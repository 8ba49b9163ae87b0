// The way of processors that have no instruction for CRC32C, for the tests: everybody else calls
// wire::crc32c.
#pragma once

#include <cstdint>

#include "common/payload.h"

namespace reducer::wire::internal {

std::uint32_t crc32cByTable(const Payload& payload);

}  // namespace reducer::wire::internal
