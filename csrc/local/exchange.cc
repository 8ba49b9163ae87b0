#include "local/exchange.h"

#include <algorithm>

#include "common/check.h"

namespace reducer::local {
namespace {

// One hop is the fewest steps, but everybody sums everything: beyond this size sharing the sums
// takes less time.
constexpr std::size_t kSlotBytes = std::size_t{64} << 10;

// A rank's stages, its input and its output of a round should all fit into its core's second-level
// cache, usually 1 MiB.
constexpr std::size_t kStageBytes = std::size_t{256} << 10;

std::size_t lines(std::size_t nbytes) { return (nbytes + kLine - 1) / kLine * kLine; }

// Wider than a number: 0 is that of none.
std::uint64_t tagOf(std::uint32_t number) { return std::uint64_t{number} + 1; }

}  // namespace

Exchange::Layout Exchange::Layout::of(std::size_t ranks, std::size_t stage_bytes) {
  const std::size_t stage = stage_bytes == 0 ? kStageBytes : stage_bytes;
  Layout layout;
  // At least a line for each rank.
  layout.stage_bytes = std::max(lines(stage), ranks * kLine);
  layout.slot_bytes = std::max({std::min(kSlotBytes, layout.stage_bytes), kLine, 16 * ranks});
  return layout;
}

std::size_t Exchange::Layout::areaBytes() const {
  return 2 * (kRecordBytes + lines(slot_bytes)) + 2 * stage_bytes;
}

Exchange::Record& Exchange::record(std::uint32_t place, std::uint32_t number) const {
  return *reinterpret_cast<Record*>(team_.area(place) +
                                    number % 2 * (kRecordBytes + lines(layout_.slot_bytes)));
}

std::byte* Exchange::slot(std::uint32_t place, std::uint32_t number) const {
  return reinterpret_cast<std::byte*>(&record(place, number)) + kRecordBytes;
}

std::byte* Exchange::stage(std::uint32_t place, std::uint64_t round) const {
  return team_.area(place) + 2 * (kRecordBytes + lines(layout_.slot_bytes)) +
         round % 2 * layout_.stage_bytes;
}

// The memory of a slot is that of the operation before the last. Its readers have come to the last
// operation since; or it was given up, which they notice when they have read.
void Exchange::show(std::uint32_t number, const CallWords& call, const Job& job) {
  Record& own = record(team_.place(), number);
  own.tag.store(0, std::memory_order_relaxed);
  // Who reads anything of what follows finds the tag, and the gate's number, changed.
  std::atomic_thread_fence(std::memory_order_release);
  for (std::size_t i = 0; i < call.size(); ++i) {
    own.call[i].store(call[i], std::memory_order_relaxed);
  }
  const bool fits = job.published() <= job.hopBytesMax(layout_.slot_bytes);
  own.fits.store(fits ? 1 : 0, std::memory_order_relaxed);
  std::byte* const memory = slot(team_.place(), number);
  if (fits) {
    job.publish(memory);
  } else {
    REDUCER_CHECK(job.prefix() <= layout_.slot_bytes);
    job.publishPrefix(memory);
  }
  own.tag.store(tagOf(number), std::memory_order_release);
}

std::optional<CallWords> Exchange::callOf(std::uint32_t place, std::uint32_t number) const {
  const Record& theirs = record(place, number);
  if (theirs.tag.load(std::memory_order_acquire) != tagOf(number)) return std::nullopt;
  CallWords call;
  for (std::size_t i = 0; i < call.size(); ++i) {
    call[i] = theirs.call[i].load(std::memory_order_relaxed);
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  if (theirs.tag.load(std::memory_order_relaxed) != tagOf(number)) return std::nullopt;
  return call;
}

std::optional<Exchange::Last> Exchange::lastOf(std::uint32_t place) const {
  std::optional<Last> last;
  for (const std::uint32_t parity : {0u, 1u}) {
    const std::uint64_t tag = record(place, parity).tag.load(std::memory_order_acquire);
    if (tag == 0) continue;
    const auto number = static_cast<std::uint32_t>(tag - 1);
    const auto call = callOf(place, number);
    if (call && (!last || static_cast<std::int32_t>(number - last->number) > 0)) {
      last = Last{number, *call};
    }
  }
  return last;
}

// Only where the next operation was given up without this rank can somebody have gone on to the one
// after it, whose records and slots are these; that rank may not have shown it yet.
bool Exchange::stale(std::uint32_t number) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  if (static_cast<std::int32_t>(team_.gate().number() - number) <= 1) return false;
  for (std::uint32_t place = 0; place < team_.size(); ++place) {
    if (record(place, number).tag.load(std::memory_order_relaxed) != tagOf(number)) return true;
  }
  return false;
}

Status Exchange::endedWith(std::uint32_t number) const {
  Status status = team_.givenUp(number);
  if (!status.ok()) return status;
  return Status(Code::kTimeout,
                "another rank gave this operation up so long ago that its reason is "
                "not known any more");
}

/// Ok: all ranks have arrived, and no rank can give up without the others.
Status Exchange::meet(std::uint32_t number, Watch& watch) {
  Gate::Turn turn = team_.arrive(number);
  if (turn == Gate::Turn::kWaiting) {
    if (Status status = team_.gate().wait(number, team_.waiter(), watch); !status.ok()) {
      team_.giveUpMeeting(number, status);
    }
    turn = team_.gate().turnOf(number);
  }
  return turn == Gate::Turn::kComplete ? Status() : endedWith(number);
}

Status Exchange::run(std::uint32_t number, const CallWords& call, Job& job, Watch& watch) {
  const std::uint32_t n = team_.size();
  if (slots_[0].empty()) {
    for (std::uint32_t parity = 0; parity < 2; ++parity) {
      for (std::uint32_t place = 0; place < n; ++place) {
        slots_[parity].push_back(slot(place, parity));
        stages_[parity].push_back(stage(place, parity));
      }
    }
  }
  show(number, call, job);
  if (Status status = meet(number, watch); !status.ok()) return status;

  bool fits = true;
  bool equal = true;
  for (std::uint32_t place = 0; place < n; ++place) {
    const Record& theirs = record(place, number);
    fits &= theirs.fits.load(std::memory_order_relaxed) != 0;
    for (std::size_t i = 0; i < call.size(); ++i) {
      equal &= theirs.call[i].load(std::memory_order_relaxed) == call[i];
    }
  }
  const Views slots = slots_[number % 2];
  equal = equal && job.agrees(slots);
  // Before anything is made of what was read, and again behind the last that is.
  if (stale(number)) return endedWith(number + 1);
  if (!equal) return Status(Code::kMismatch, "");
  if (!fits) return runRounds(number, job, watch);
  job.collect(slots);
  return stale(number) ? endedWith(number + 1) : Status();
}

Status Exchange::round(std::uint32_t number, std::uint32_t arrivals, Watch& watch) {
  team_.rounds().arrive(arrivals);
  const Status status =
      team_.waiter().until([&] { return team_.rounds().reached(arrivals) || team_.broken(number); },
                           team_.rounds().value, team_.rounds().sleepers, watch);
  if (!status.ok()) {
    team_.giveUp(number, status);
    return status;
  }
  return team_.broken(number) && !team_.rounds().reached(arrivals) ? endedWith(number) : Status();
}

Status Exchange::runRounds(std::uint32_t number, Job& job, Watch& watch) {
  const std::uint64_t rounds = job.rounds(layout_.stage_bytes);
  const bool finishes = job.hasFinish();
  std::uint32_t arrivals = 0;
  const auto step = [&] { return round(number, arrivals += team_.size(), watch); };
  if (rounds > 0) job.fill(0, stage(team_.place(), 0));
  for (std::uint64_t r = 0; r < rounds; ++r) {
    // Behind this all have filled round r, and have used what they filled in the rounds before.
    if (Status status = step(); !status.ok()) return status;
    if (finishes && r > 0) job.finish(r - 1, stages_[(r - 1) % 2]);
    job.use(r, stages_[r % 2], stage(team_.place(), r));
    if (r + 1 < rounds) job.fill(r + 1, stage(team_.place(), r + 1));
  }
  if (!finishes || rounds == 0) return {};
  if (Status status = step(); !status.ok()) return status;
  job.finish(rounds - 1, stages_[(rounds - 1) % 2]);
  return {};
}

}  // namespace reducer::local
