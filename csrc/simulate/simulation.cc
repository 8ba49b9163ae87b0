#include "simulate/simulation.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "collective/group.h"
#include "common/limits.h"
#include "server/server.h"

namespace reducer::simulate {
namespace {

constexpr std::uint16_t kPort = 7000;
// Of virtual time, for all that one call of measure() does.
constexpr Duration kLimit = std::chrono::hours(24);
// Events between two calls of the progress callback.
constexpr std::uint64_t kEventsPerProgress = 1 << 14;

std::string hostName(bool reducer, std::int32_t index) {
  return (reducer ? "r" : "w") + std::to_string(index);
}

Status invalid(const std::string& text) { return Status(Code::kInvalidArgument, text); }

Status validate(const SimulationOptions& options) {
  if (options.workers < 1 || options.workers > kMaxWorldSize) {
    return invalid("a group has 1 to " + std::to_string(kMaxWorldSize) + " workers, not " +
                   std::to_string(options.workers));
  }
  if (options.reducers < 0 || options.reducers > kMaxWorldSize) {
    return invalid("there are 0 to " + std::to_string(kMaxWorldSize) + " reducers, not " +
                   std::to_string(options.reducers));
  }
  if (!(options.nic.bytes_per_second > 0) || options.reducer_bytes_per_second < 0) {
    return invalid("a NIC's bandwidth must be above 0");
  }
  if (options.latency < Duration::zero() || options.jitter < Duration::zero()) {
    return invalid("latency and jitter must not be negative");
  }
  const transport::ProcessorModel& processor = options.processor;
  if (processor.cores < 0 || processor.ns_per_byte < 0 || processor.per_frame < Duration::zero()) {
    return invalid("a processor's cores and costs must not be negative");
  }
  return {};
}

transport::SimOptions network(const SimulationOptions& options) {
  transport::SimOptions sim;
  sim.seed = options.seed;
  sim.latency_min = options.latency;
  sim.latency_max = options.latency + options.jitter;
  sim.copies = options.check;
  sim.nic = options.nic;
  sim.processor = options.processor;
  return sim;
}

/// A host with its process. Workers have a group, too.
struct Node {
  std::string name;
  bool reducer = false;
  std::unique_ptr<transport::Transport> transport;
  std::unique_ptr<server::ReducerServer> server;
  std::shared_ptr<collective::Group> group;
  transport::SimHostCounters before;
};

class Job final : public Simulation {
 public:
  explicit Job(SimulationOptions options)
      : options_(std::move(options)), network_(network(options_)) {}
  ~Job() override;

  Status start(const Progress& progress);
  Result<Measurement> measure(std::size_t nbytes, int iterations,
                              const Progress& progress) override;
  Shape shape() const override;

 private:
  struct Run {
    std::size_t count = 0;
    int left = 0;                     // operations, the one that is not timed included
    std::vector<int> done;            // by rank
    std::vector<std::int32_t> ended;  // ranks, by operation
    std::vector<TimePoint> ends;      // of the last rank, by operation
    Status status;
    std::vector<std::vector<float>> inputs;  // one for each rank, or one for all
    std::vector<std::vector<float>> outputs;
  };

  Status addNode(bool reducer, std::int32_t index);
  Status makeGroups();
  void fill(Run& run) const;
  void next(Run& run, Rank rank);
  void ended(Run& run, Rank rank, const Status& status);
  Status runUntil(const std::function<bool()>& done, const Progress& progress);
  Measurement evaluate(Run& run);
  void compareHosts(const Run& run, double elapsed, Measurement& measurement);
  std::uint64_t countWrong(Run& run) const;

  const SimulationOptions options_;
  transport::SimNetwork network_;
  std::vector<Node> nodes_;  // workers by rank, then reducers
};

Job::~Job() {
  for (Node& node : nodes_) {
    if (node.group) node.group->close();
  }
  for (Node& node : nodes_) node.group.reset();
  for (Node& node : nodes_) node.server.reset();
}

Status Job::addNode(bool reducer, std::int32_t index) {
  Node node;
  node.name = hostName(reducer, index);
  node.reducer = reducer;
  node.transport = network_.addHost(node.name, reducer ? options_.reducer_bytes_per_second : 0);
  server::ServerOptions server;
  server.host = node.name;
  server.standalone = reducer;
  // Nothing is refused: what an owner would have to promise is a result.
  server.memory_limit_bytes = std::size_t{1} << 60;
  server.shards = 1;  // one thread runs all
  node.server = std::make_unique<server::ReducerServer>(*node.transport, std::move(server));
  Status status = node.server->listen(node.name + ":" + std::to_string(kPort));
  nodes_.push_back(std::move(node));
  return status;
}

Status Job::start(const Progress& progress) {
  nodes_.reserve(static_cast<std::size_t>(options_.workers) + options_.reducers);
  for (std::int32_t r = 0; r < options_.workers; ++r) {
    if (Status status = addNode(false, r); !status.ok()) return status;
  }
  for (std::int32_t k = 0; k < options_.reducers; ++k) {
    if (Status status = addNode(true, k); !status.ok()) return status;
  }
  if (Status status = makeGroups(); !status.ok()) return status;
  std::int32_t joined = 0;
  Status failed;
  for (std::int32_t r = 0; r < options_.workers; ++r) {
    nodes_[r].group->barrier({}, [&](const Status& status) {
      ++joined;
      if (!status.ok()) failed = status;
    });
  }
  Status status = runUntil([&] { return joined == options_.workers; }, progress);
  return status.ok() ? failed : status;
}

Status Job::makeGroups() {
  collective::GroupConfig config;
  config.job = "a simulated job.";
  config.name = "simulation";
  config.world_size = options_.workers;
  config.settings = options_.settings;
  for (const Node& node : nodes_) {
    (node.reducer ? config.servers : config.workers).push_back(node.server->address());
  }
  if (options_.reducer_bytes_per_second > 0) {
    const auto bits = [](double bytes) { return static_cast<std::uint64_t>(8 * bytes); };
    config.worker_bandwidths.assign(config.workers.size(), bits(options_.nic.bytes_per_second));
    config.server_bandwidths.assign(config.servers.size(), bits(options_.reducer_bytes_per_second));
  }
  for (std::int32_t r = 0; r < options_.workers; ++r) {
    config.rank = r;
    config.host = nodes_[r].name;
    auto group = collective::Group::create(config, *nodes_[r].transport, *nodes_[r].server);
    if (!group.ok()) return group.status();
    nodes_[r].group = std::move(group).value();
  }
  return {};
}

Status Job::runUntil(const std::function<bool()>& done, const Progress& progress) {
  std::uint64_t events = 0;
  bool stopped = false;
  const bool finished = network_.runUntil(
      [&] {
        if (progress && ++events % kEventsPerProgress == 0) stopped = !progress();
        return stopped || done();
      },
      kLimit);
  if (stopped) return Status(Code::kAborted, "the simulation was stopped");
  if (!finished) return Status(Code::kInternal, "the simulated job stands still");
  return {};
}

// ------------------------------------------------------------------ one size

void Job::fill(Run& run) const {
  const std::size_t tensors = options_.check ? options_.workers : 1;
  run.inputs.resize(tensors);
  run.outputs.resize(tensors);
  for (std::size_t r = 0; r < tensors; ++r) {
    run.inputs[r].resize(run.count);
    run.outputs[r].resize(run.count);
    // Thirds, so that the order of additions shows.
    for (std::size_t i = 0; i < run.count; ++i) {
      run.inputs[r][i] = static_cast<float>((i * 31 + r * 17) % 1009) / 3.0F;
    }
  }
}

void Job::next(Run& run, Rank rank) {
  const std::size_t tensor = options_.check ? rank : 0;
  nodes_[rank].group->allReduce(
      run.inputs[tensor].data(), run.outputs[tensor].data(), run.count, DataType::kFloat32,
      ReduceOp::kSum, {}, [this, &run, rank](const Status& status) { ended(run, rank, status); });
}

void Job::ended(Run& run, Rank rank, const Status& status) {
  if (!status.ok() && run.status.ok()) run.status = status;
  const auto operation = static_cast<std::size_t>(run.done[rank]++);
  if (++run.ended[operation] == options_.workers) {
    run.ends[operation] = network_.now();
    --run.left;
    if (operation == 0) {
      for (Node& node : nodes_) node.before = network_.counters(node.name);
    }
  }
  // Not from within the end of the last one.
  if (static_cast<std::size_t>(run.done[rank]) < run.ends.size() && run.status.ok()) {
    nodes_[rank].transport->post([this, &run, rank] { next(run, rank); });
  }
}

Result<Measurement> Job::measure(std::size_t nbytes, int iterations, const Progress& progress) {
  if (iterations < 1) return invalid("at least one iteration is needed");
  Run run;
  run.count = nbytes / sizeof(float);
  run.left = iterations + 1;
  run.done.assign(options_.workers, 0);
  run.ended.assign(iterations + 1, 0);
  run.ends.resize(iterations + 1);
  fill(run);
  for (Rank rank = 0; rank < options_.workers; ++rank) next(run, rank);
  Status status = runUntil([&] { return run.left == 0 || !run.status.ok(); }, progress);
  if (status.ok()) status = run.status;
  if (!status.ok()) {
    // What still runs refers to `run`: end it here.
    for (Node& node : nodes_) {
      if (node.group) node.group->abort("the simulation has failed");
    }
    return status;
  }
  return evaluate(run);
}

Measurement Job::evaluate(Run& run) {
  Measurement measurement;
  for (std::size_t i = 1; i < run.ends.size(); ++i) {
    measurement.seconds.push_back(
        std::chrono::duration<double>(run.ends[i] - run.ends[i - 1]).count());
  }
  const double elapsed = std::chrono::duration<double>(run.ends.back() - run.ends.front()).count();
  compareHosts(run, elapsed, measurement);
  for (const Node& node : nodes_) {
    if (!node.group) continue;
    measurement.outstanding_bytes =
        std::max(measurement.outstanding_bytes, node.group->counters().outstanding_bytes_max);
  }
  if (options_.check) measurement.wrong = countWrong(run);
  return measurement;
}

void Job::compareHosts(const Run& run, double elapsed, Measurement& measurement) {
  const auto seconds = [](Duration duration) {
    return std::chrono::duration<double>(duration).count();
  };
  const auto operations = static_cast<double>(run.ends.size() - 1);
  const int cores = std::max(1, options_.processor.cores);
  double working = 0;
  for (const Node& node : nodes_) {
    const transport::SimHostCounters& before = node.before;
    const transport::SimHostCounters after = network_.counters(node.name);
    const std::pair<Duration, std::uint64_t> sides[2] = {
        {after.sending - before.sending, after.sent_bytes - before.sent_bytes},
        {after.receiving - before.receiving, after.received_bytes - before.received_bytes}};
    for (const bool receiving : {false, true}) {
      const auto& [time, nbytes] = sides[receiving];
      const double share = seconds(time) / elapsed;
      if (share > measurement.nic.share) measurement.nic = {share, node.reducer, receiving};
      measurement.nic_bytes =
          std::max(measurement.nic_bytes, static_cast<double>(nbytes) / operations);
    }
    const double work = seconds(after.working - before.working);
    working += work;
    if (const double share = work / elapsed / cores; share > measurement.processor.share) {
      measurement.processor = {share, node.reducer, false};
    }
    const auto frames = static_cast<double>(after.sent_frames - before.sent_frames +
                                            after.received_frames - before.received_frames);
    measurement.frames = std::max(measurement.frames, frames / operations);
    measurement.all_frames += frames / operations;
    measurement.all_bytes += static_cast<double>(sides[0].second + sides[1].second) / operations;
    measurement.waiting_bytes = std::max(measurement.waiting_bytes, after.waiting_bytes_max);
    measurement.held_bytes = std::max(measurement.held_bytes, node.server->stats().held_bytes_max);
  }
  if (options_.processor.shared) measurement.processor.share = working / elapsed / cores;
  measurement.frames_per_second = measurement.frames * operations / elapsed;
}

std::uint64_t Job::countWrong(Run& run) const {
  std::vector<float> sum = run.inputs[0];
  for (std::size_t r = 1; r < run.inputs.size(); ++r) {
    for (std::size_t i = 0; i < run.count; ++i) sum[i] += run.inputs[r][i];
  }
  const bool ring = nodes_[0].group->algorithm() == collective::Algorithm::kRing;
  std::uint64_t wrong = 0;
  for (const std::vector<float>& output : run.outputs) {
    bool same = true;
    for (std::size_t i = 0; i < run.count && same; ++i) {
      // A ring adds in another order: of n values of one size the sums differ by n roundings.
      const float error = sum[i] > output[i] ? sum[i] - output[i] : output[i] - sum[i];
      same = ring ? error <= sum[i] * 1e-7F * static_cast<float>(options_.workers)
                  : std::memcmp(&sum[i], &output[i], sizeof(float)) == 0;
    }
    wrong += same ? 0 : 1;
  }
  return wrong;
}

Shape Job::shape() const {
  Shape shape;
  shape.algorithm = nodes_[0].group->algorithm();
  shape.window_bytes = nodes_[0].group->counters().window_bytes;
  for (const Node& node : nodes_) {
    const std::size_t connections = network_.counters(node.name).connections;
    std::size_t& most = node.reducer ? shape.reducer_connections : shape.worker_connections;
    most = std::max(most, connections);
    shape.promised_bytes = std::max(shape.promised_bytes, node.server->stats().reserved_bytes);
  }
  return shape;
}

}  // namespace

Result<std::unique_ptr<Simulation>> Simulation::create(SimulationOptions options,
                                                       const Progress& progress) {
  if (Status status = validate(options); !status.ok()) return status;
  auto job = std::make_unique<Job>(std::move(options));
  if (Status status = job->start(progress); !status.ok()) return status;
  return std::unique_ptr<Simulation>(std::move(job));
}

}  // namespace reducer::simulate
