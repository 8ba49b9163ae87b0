// A job of any size on the simulated network: all-reduces of the same engine and exchange code that
// real jobs run, timed by a model of NICs and processors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "collective/settings.h"
#include "common/clock.h"
#include "common/status.h"
#include "transport/sim/sim.h"

namespace reducer::simulate {

struct SimulationOptions {
  std::int32_t workers = 8;
  std::int32_t reducers = 0;
  collective::Settings settings;
  transport::NicModel nic;              ///< of every host
  double reducer_bytes_per_second = 0;  ///< of the reducers' NICs; 0: as the workers'
  transport::ProcessorModel processor;
  Duration latency = std::chrono::microseconds(20);  ///< of a packet, one way
  Duration jitter = Duration::zero();                ///< at most so much more
  std::uint64_t seed = 1;
  /// Every rank has tensors of its own, and results are compared with the sum in rank order. Else
  /// all share one input and one output, so that size and number of ranks cost no memory.
  bool check = false;
};

/// Where most goes through: a host's NIC (the fuller direction) or processor.
struct Busiest {
  double share = 0;  ///< of the time
  bool reducer = false;
  bool receiving = false;  ///< of a NIC
};

/// All-reduces in a row of one size, each rank starting its next when it has its last: times as
/// the emulated cluster measures them, and what the hosts did meanwhile.
struct Measurement {
  std::vector<double> seconds;  ///< each from when all had the previous result, of virtual time
  Busiest nic;
  Busiest processor;
  double nic_bytes = 0;             ///< for one all-reduce, through the busiest direction of a NIC
  double frames_per_second = 0;     ///< to and from the busiest owner
  double frames = 0;                ///< the same, for one all-reduce
  double all_frames = 0;            ///< of one all-reduce, at all hosts: each is sent and received
  double all_bytes = 0;             ///< theirs
  std::uint64_t held_bytes = 0;     ///< most that an owner held for other workers, since the start
  std::uint64_t waiting_bytes = 0;  ///< most that waited before a NIC, since the start
  std::uint64_t outstanding_bytes = 0;  ///< most that a worker had in flight, since the start
  std::uint64_t wrong = 0;              ///< ranks whose result was not the sum, or compared unequal
};

/// What does not change with the tensor's size.
struct Shape {
  collective::Algorithm algorithm{};
  std::uint64_t window_bytes = 0;    ///< of a worker, over all owners
  std::uint64_t promised_bytes = 0;  ///< the most that an owner has promised to hold
  std::size_t worker_connections = 0;
  std::size_t reducer_connections = 0;
};

/// Not thread safe. Deterministic: the same options and sizes give the same times.
class Simulation {
 public:
  /// Called every few milliseconds of real time; false: stop.
  using Progress = std::function<bool()>;

  /// All hosts, connected. kInvalidArgument says which option is wrong; kAborted: stopped.
  static Result<std::unique_ptr<Simulation>> create(SimulationOptions options,
                                                    const Progress& progress);
  virtual ~Simulation() = default;

  /// `iterations` all-reduces of float32 of `nbytes` each, after one that is not timed.
  virtual Result<Measurement> measure(std::size_t nbytes, int iterations,
                                      const Progress& progress) = 0;
  virtual Shape shape() const = 0;
};

}  // namespace reducer::simulate
