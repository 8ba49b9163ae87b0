// A group whose ranks share a host: collectives through shared memory.
#pragma once

#include <memory>

#include "collective/group.h"
#include "common/status.h"

namespace reducer::collective {

class GroupState;

/// True if the collectives of such a group go through shared memory; an error if they should
/// (algorithm `local`) and cannot.
Result<bool> sharesMemory(const GroupConfig& config);

/// Collectives go through a local::Team, in the order of their calls. All else (send and recv, the
/// second steps of collectives) goes through `network`, a group of the same ranks, and so do the
/// collectives if the ranks find at the first one that they cannot share memory; unless the carrier
/// kShm demands it: then that is an error.
///
/// A synchronous call (CallOptions::blocking) runs on the caller's thread if nothing else is under
/// way; other calls run on the group's own thread, which starts with the first of them.
///
/// Thread safety, lifetime, errors: as Group's. `state` is that of `network`.
std::shared_ptr<Group> makeLocalGroup(std::shared_ptr<Group> network,
                                      const std::shared_ptr<GroupState>& state);

}  // namespace reducer::collective
