// What a call pays for its entry in the flight recorder.
#include <benchmark/benchmark.h>

#include "recorder/recorder.h"

namespace reducer::recorder {
namespace {

/// As a call through shared memory: the time at which it was made is known already.
void recordedCall(benchmark::State& state) {
  Recorder recorder(1000);
  GroupInfo info;
  info.job = "0123456789abcdef";
  const std::uint32_t group = recorder.add(info);
  Recorder* const used = state.range(0) != 0 ? &recorder : nullptr;
  const TimePoint now = Clock::now();
  std::uint64_t seq = 0;
  for (auto _ : state) {
    Record record(used, true, [&](Entry& entry) {
      entry.group = group;
      entry.seq = seq++;
      entry.algorithm = "local";
      entry.queued = now;
      entry.started = now;
      entry.state = State::kStarted;
    });
    record.ended(Status());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(recordedCall)->ArgName("recorder")->Arg(0)->Arg(1);

void clockAlone(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(Clock::now());
}
BENCHMARK(clockAlone);

}  // namespace
}  // namespace reducer::recorder

BENCHMARK_MAIN();
