// Faults that a build can have on purpose, so that the search for faults is tested, too:
// tests/soak/check.sh builds each of them and wants it found.
#pragma once

namespace reducer {

enum class Planted {
  kNone,
  kNoKeeping,    ///< workers keep nothing that they were answered
  kStaleAcks,    ///< what they keep is dropped by acknowledgements of older epochs
  kEarlyReturn,  ///< a reducer that is back takes part from the smallest held operation on
};

#ifndef REDUCER_PLANTED_FAULT
#define REDUCER_PLANTED_FAULT 0
#endif

constexpr bool planted(Planted fault) {
  return fault == static_cast<Planted>(REDUCER_PLANTED_FAULT);
}

}  // namespace reducer
