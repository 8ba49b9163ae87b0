// The local half of two-level operations: the thread that brings this rank's parts into shared
// memory, sums what it carries, and copies the results out.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "collective/host_board.h"
#include "collective/two_level.h"
#include "local/rendezvous.h"
#include "local/segment.h"

namespace reducer::collective {

/// Operations are taken up in the order of their numbers, and go on whenever there is something to
/// do for them: no step waits for another operation, but for memory, which the older one gets
/// first. An area is used again when all ranks of the host have gone beyond what it held, and its
/// bytes have left: an operation that failed on one rank cannot be seen with another's bytes.
///
/// Thread safety: start() in the order of numbers; all else from any thread. Lifetime: the
/// callbacks may run until stop() returns.
class HostStage {
 public:
  struct Config {
    std::string meeting;  ///< equal on all ranks of the host, on no others
    std::uint32_t place = 0;
    std::vector<Rank> ranks;  ///< of the host, by place
    std::size_t segment_bytes = 0;
    /// The operation cannot go on.
    std::function<void(const std::shared_ptr<Operation>&, const Status&)> fail;
    /// The group cannot go on.
    std::function<void(const Status&)> lost;
    /// Nor without that rank.
    std::function<void(Rank)> died;
    /// What was summed may go out.
    std::function<void(const std::vector<OwnerIndex>&)> pump;
  };

  /// Starts the thread, which first meets the other ranks of the host: they may come late.
  explicit HostStage(Config config);
  /// stop() must have been called.
  ~HostStage() = default;
  HostStage(const HostStage&) = delete;
  HostStage& operator=(const HostStage&) = delete;

  void start(const std::shared_ptr<TwoLevel>& operation);
  /// The operation with that number has failed on this rank: the others of the host are told.
  void failed(std::uint64_t number, const Status& why);
  /// "rank 3 has not brought its part", or empty if the host's ranks are all there.
  std::string waitsFor(const TwoLevel& operation) const;

  /// Ends the thread: joins it, or, called on it, lets it go. Idempotent.
  void stop();

 private:
  class Inner;
  const std::shared_ptr<Inner> inner_;
  std::mutex mutex_;
  std::thread thread_;
};

}  // namespace reducer::collective
