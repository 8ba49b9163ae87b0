#include "collective/probe.h"

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

namespace reducer::collective {
namespace {

/// All-reduces of one size: in every block `first` that do not count and `counted` that do.
struct Size {
  std::size_t nbytes;
  int blocks;
  int first;
  int counted;
  int turns() const { return blocks * (first + counted); }
};

// One that shows latency, three around the sizes where the ways part, two that show bandwidth: the
// first of them for networks on which the other would take too long.
constexpr Size kSizes[] = {{1 << 10, 3, 1, 20},  {16 << 10, 2, 1, 8}, {64 << 10, 2, 1, 8},
                           {256 << 10, 1, 1, 4}, {1 << 20, 1, 0, 2},  {4 << 20, 1, 0, 2}};

/// The end of one operation, waited for by the thread that started it.
class Ending {
 public:
  explicit Ending(std::shared_ptr<transport::Helper> helper)
      : helper_(std::move(helper)), state_(std::make_shared<State>()) {}

  Done callback() {
    return [state = state_, helper = helper_](const Status& status) {
      {
        const std::lock_guard lock(state->mutex);
        state->status = status;
        state->changed.notify_all();
      }
      if (helper) helper->wake();
    };
  }
  Status wait() {
    if (helper_) {
      const auto ended = [state = state_] {
        const std::lock_guard lock(state->mutex);
        return state->status.has_value();
      };
      helper_->help(ended, TimePoint::max());
    }
    std::unique_lock lock(state_->mutex);
    // An operation always ends: at its own deadline, if nothing else ends it.
    state_->changed.wait(lock, [this] { return state_->status.has_value(); });
    return *state_->status;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::optional<Status> status;
  };
  const std::shared_ptr<transport::Helper> helper_;
  const std::shared_ptr<State> state_;
};

class Probe {
 public:
  Probe(Group& group, const ProbePlan& plan)
      : group_(group),
        plan_(plan),
        buffer_(std::make_shared<std::vector<float>>(kSizes[std::size(kSizes) - 1].nbytes /
                                                     sizeof(float))) {}

  Result<std::vector<Sample>> run() {
    std::vector<Sample> samples;
    std::int64_t spent = 0;
    std::int64_t last = 0;  // of one all-reduce in each way
    for (const Size& size : kSizes) {
      const std::int64_t turns = size.turns();
      const auto scale = static_cast<std::int64_t>(last == 0 ? 1 : size.nbytes / last_nbytes_);
      if (spent + last * scale * turns > std::chrono::nanoseconds(plan_.budget).count()) break;
      Result<std::vector<std::int64_t>> medians = measure(size);
      if (!medians.ok()) return medians.status();
      last = 0;
      for (std::size_t way = 0; way < plan_.ways.size(); ++way) {
        Sample sample;
        sample.algorithm = plan_.ways[way];
        sample.ranks = static_cast<std::uint32_t>(group_.worldSize());
        sample.hosts = plan_.hosts;
        sample.servers = plan_.servers;
        sample.nbytes = size.nbytes;
        sample.nanoseconds = static_cast<std::uint64_t>(medians.value()[way]);
        samples.push_back(sample);
        last += medians.value()[way];
      }
      last_nbytes_ = size.nbytes;
      spent += last * turns;
    }
    return samples;
  }

 private:
  /// The median of each way, of the rank for which it is largest.
  Result<std::vector<std::int64_t>> measure(const Size& size) {
    std::vector<std::vector<std::int64_t>> times(plan_.ways.size());
    // In blocks, as in use, where a way follows upon itself, and several, since hosts are not as
    // busy at all times.
    for (int block = 0; block < size.blocks; ++block) {
      for (std::size_t way = 0; way < plan_.ways.size(); ++way) {
        for (int turn = 0; turn < size.first + size.counted; ++turn) {
          const auto begin = std::chrono::steady_clock::now();
          if (Status status = allReduce(size.nbytes / sizeof(float), plan_.ways[way]); !status.ok())
            return status;
          const auto took = std::chrono::steady_clock::now() - begin;
          if (turn >= size.first)
            times[way].push_back(
                std::chrono::duration_cast<std::chrono::nanoseconds>(took).count());
        }
      }
    }
    const auto medians = std::make_shared<std::vector<std::int64_t>>();
    for (std::vector<std::int64_t>& one : times) {
      const std::size_t middle = (one.size() - 1) / 2;  // of two the less disturbed one
      std::nth_element(one.begin(), one.begin() + static_cast<std::ptrdiff_t>(middle), one.end());
      medians->push_back(std::max<std::int64_t>(1, one[middle]));
    }
    Ending ending(plan_.helper);
    CallOptions options = optionsFor(medians);
    group_.allReduce(medians->data(), medians->data(), medians->size(), DataType::kInt64,
                     ReduceOp::kMax, options, ending.callback());
    if (Status status = ending.wait(); !status.ok()) return status;
    return *medians;
  }

  Status allReduce(std::size_t count, Algorithm way) {
    Ending ending(plan_.helper);
    CallOptions options = optionsFor(buffer_);
    options.algorithm = way;
    group_.allReduce(buffer_->data(), buffer_->data(), count, DataType::kFloat32, ReduceOp::kSum,
                     options, ending.callback());
    return ending.wait();
  }

  CallOptions optionsFor(std::shared_ptr<const void> memory) const {
    CallOptions options;
    options.timeout = plan_.timeout;
    options.keepalive = std::move(memory);
    return options;
  }

  Group& group_;
  const ProbePlan& plan_;
  const std::shared_ptr<std::vector<float>> buffer_;
  std::size_t last_nbytes_ = 1;
};

}  // namespace

Result<std::vector<Sample>> probe(Group& group, const ProbePlan& plan) {
  return Probe(group, plan).run();
}

}  // namespace reducer::collective
