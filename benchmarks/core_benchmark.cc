// The core's own C++ interface, without Python and torch, timed as `reducer bench` times
// everybody's (reducer/_bench/rank.py): all-reduce of float32, sum, in place, call after call on as
// many buffers as fit 32 MiB, without a barrier between them, after one that is not timed; ranks
// are processes of this machine.
//
//   core-benchmark RANKS TRANSPORT BYTES ITERATIONS
//
// Prints how many results were wrong, then the ns of each iteration's slowest rank.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <string>
#include <vector>

#include "collective/group.h"
#include "runtime/runtime.h"

namespace {

using namespace reducer;  // NOLINT(google-build-using-namespace): a program

constexpr int kIterationsMost = 20'000;
constexpr int kRanksMost = 64;
constexpr std::size_t kPoolBytes = std::size_t{32} << 20;
constexpr auto kStartMost = std::chrono::seconds(60);

/// What the processes share with their parent.
struct Board {
  std::atomic<int> ready;
  std::atomic<int> wrong;
  char addresses[kRanksMost][64];
  std::int64_t times[kRanksMost][kIterationsMost];
};

struct Plan {
  int ranks = 0;
  collective::Carrier carrier = collective::Carrier::kAuto;
  std::size_t count = 1;
  int iterations = 1;
};

void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "core-benchmark: %s\n", status.message().c_str());
  std::exit(1);
}

/// Depends on the position, so that a chunk in a wrong place is seen; sums of it are exact.
float valueAt(std::size_t i, float first, float step) {
  return first + step * static_cast<float>(i % 1001);
}

void fill(float* data, std::size_t count, float first) {
  for (std::size_t i = 0; i < count; ++i) data[i] = valueAt(i, first, 1);
}

bool isSum(const float* data, std::size_t count, int ranks) {
  const auto n = static_cast<float>(ranks);
  for (std::size_t i = 0; i < count; ++i) {
    if (data[i] != valueAt(i, n * (n + 1) / 2, n)) return false;
  }
  return true;
}

void sum(collective::Group& group, float* data, std::size_t count) {
  std::promise<Status> ended;
  collective::CallOptions options;
  options.timeout = std::chrono::seconds(60);
  options.blocking = true;
  group.allReduce(data, data, count, DataType::kFloat32, ReduceOp::kSum, std::move(options),
                  [&](const Status& status) { ended.set_value(status); });
  check(ended.get_future().get());
}

collective::GroupConfig configOf(const Plan& plan, Board& board, int rank,
                                 const std::string& address) {
  std::snprintf(board.addresses[rank], sizeof board.addresses[rank], "%s", address.c_str());
  board.ready.fetch_add(1);
  const auto deadline = Clock::now() + kStartMost;
  while (board.ready < plan.ranks) {
    if (Clock::now() > deadline) check({Code::kTimeout, "not every rank started within 60 s"});
    usleep(1000);
  }
  collective::GroupConfig config;
  config.job = collective::derivedJob("core benchmark", std::to_string(getppid()));
  config.name = "benchmark";
  config.rank = rank;
  config.world_size = plan.ranks;
  config.host = runtime::hostLabel();
  config.settings.carrier = plan.carrier;
  for (int r = 0; r < plan.ranks; ++r) {
    config.workers.emplace_back(board.addresses[r]);
    config.places.push_back(runtime::hostIdentity());
  }
  return config;
}

void measure(collective::Group& group, const Plan& plan, std::int64_t* times, Board& board) {
  const std::size_t fitting = std::max<std::size_t>(1, kPoolBytes / (plan.count * sizeof(float)));
  const int slots = static_cast<int>(std::min<std::size_t>(fitting, plan.iterations));
  std::vector<float> data(slots * plan.count);
  const auto mine = static_cast<float>(group.rank() + 1);
  float aligner = 0;
  fill(data.data(), plan.count, mine);
  sum(group, data.data(), plan.count);
  for (int done = 0; done < plan.iterations; done += slots) {
    const int used = std::min(slots, plan.iterations - done);
    for (int slot = 0; slot < used; ++slot) fill(data.data() + slot * plan.count, plan.count, mine);
    sum(group, &aligner, 1);
    for (int slot = 0; slot < used; ++slot) {
      const auto begun = Clock::now();
      sum(group, data.data() + slot * plan.count, plan.count);
      times[done + slot] = std::chrono::nanoseconds(Clock::now() - begun).count();
    }
    for (int slot = 0; slot < used; ++slot) {
      const bool right = isSum(data.data() + slot * plan.count, plan.count, plan.ranks);
      if (!right) board.wrong.fetch_add(1);
    }
  }
}

int run(const Plan& plan, Board& board, int rank, pid_t parent) {
  // Whoever times this program kills it at a deadline: its ranks must not stay.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) return 1;
  runtime::RuntimeOptions options;
  options.carrier = plan.carrier;
  auto runtime = runtime::Runtime::acquire(options);
  check(runtime.status());
  auto group = collective::Group::create(configOf(plan, board, rank, runtime.value()->address()),
                                         runtime.value()->transport(), runtime.value()->server());
  check(group.status());
  measure(*group.value(), plan, board.times[rank], board);
  group.value()->close();
  group.value()->waitClosed(std::chrono::seconds(5));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Plan plan;
  if (argc == 5) {
    plan.ranks = std::atoi(argv[1]);
    plan.count = std::max<std::size_t>(1, std::strtoull(argv[3], nullptr, 10) / sizeof(float));
    plan.iterations = std::atoi(argv[4]);
  }
  const auto carrier = collective::parseCarrier(argc == 5 ? argv[2] : "");
  if (plan.ranks < 1 || plan.ranks > kRanksMost || plan.iterations < 1 ||
      plan.iterations > kIterationsMost || !carrier.ok()) {
    std::fprintf(stderr,
                 "usage: core-benchmark RANKS TRANSPORT BYTES ITERATIONS\n"
                 "       (at most %d ranks and %d iterations)\n",
                 kRanksMost, kIterationsMost);
    return 2;
  }
  plan.carrier = Result(carrier).value();
  void* const memory =
      mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  Board& board = *new (memory) Board;
  std::vector<pid_t> children;
  const pid_t parent = getpid();
  for (int rank = 0; rank < plan.ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) _exit(run(plan, board, rank, parent));
    children.push_back(child);
  }
  int failed = 0;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    failed += WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
  }
  if (failed > 0) return 1;
  std::printf("%d\n", board.wrong.load());
  for (int i = 0; i < plan.iterations; ++i) {
    std::int64_t slowest = 0;
    for (int r = 0; r < plan.ranks; ++r) slowest = std::max(slowest, board.times[r][i]);
    std::printf("%lld\n", static_cast<long long>(slowest));
  }
  return 0;
}
