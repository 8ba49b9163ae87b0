// Measures a group's ways to go, by using them.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "collective/group.h"
#include "transport/transport.h"

namespace reducer::collective {

/// What is measured where, for a group of this shape.
struct ProbePlan {
  std::vector<Algorithm> ways;  ///< that the group can go (CallOptions::algorithm)
  std::uint32_t hosts = 1;
  std::uint32_t servers = 0;
  std::chrono::milliseconds budget{900};  ///< a size that would exceed it is left out
  std::chrono::milliseconds timeout{10'000};
  /// What a thread that waits for a call does meanwhile, where that is what users' threads do.
  std::shared_ptr<transport::Helper> helper;
};

/// All-reduces of a few sizes, each way in turn, timed on every rank; the slowest rank's times are
/// agreed through the group itself, and so all ranks return the same. All ranks must call it at the
/// same place in their order of calls. Blocks the calling thread. On an error (of an all-reduce)
/// the other ranks have it, too.
Result<std::vector<Sample>> probe(Group& group, const ProbePlan& plan);

}  // namespace reducer::collective
