#include "collective/host_stage.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/reduce.h"

namespace reducer::collective {
namespace {

// How long the thread sleeps when there is nothing to be done: a look at whether the others live,
// while something is under way.
constexpr Duration kIdle = std::chrono::seconds(1);

}  // namespace

void HostBoard::tell(std::uint64_t failed, const Status& why) {
  Notice& notice = notices[failed % notices.size()];
  notice.number.store(0);
  notice.code = static_cast<std::uint32_t>(why.code());
  notice.nbytes = static_cast<std::uint32_t>(std::min(why.message().size(), notice.text.size()));
  std::memcpy(notice.text.data(), why.message().data(), notice.nbytes);
  notice.number.store(failed + 1);
}

std::optional<Status> HostBoard::told(std::uint64_t number) const {
  const Notice& notice = notices[number % notices.size()];
  if (notice.number.load() != number + 1) return std::nullopt;
  const std::string text(notice.text.data(),
                         std::min<std::size_t>(notice.nbytes, notice.text.size()));
  const auto code = static_cast<Code>(notice.code);
  if (notice.number.load() != number + 1 || code == Code::kOk) return std::nullopt;
  return Status(code, text);
}

/// What the thread works with; it keeps this alive.
class HostStage::Inner final : public local::Watch, public std::enable_shared_from_this<Inner> {
 public:
  explicit Inner(Config config) : config_(std::move(config)) {}

  void start(const std::shared_ptr<TwoLevel>& operation) {
    operation->staged([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->ringOwn();
    });
    {
      const std::lock_guard lock(mutex_);
      if (ended_) return;  // the group is broken, or closed: the operation fails or has failed
      new_.push_back(operation);
    }
    ringOwn();
  }

  void failed(std::uint64_t number, const Status& why) {
    {
      const std::lock_guard lock(mutex_);
      if (!memory_) return;  // who has not met this rank learns it from the reducers
      memory_->board(config_.place).tell(number, why);
    }
    memory_->ringAll();
  }

  std::string waitsFor(const TwoLevel& operation) {
    const std::uint64_t index = operation.segmentsSummed();
    if (index == operation.segments()) return "";
    const SegmentKey key = keyOf(operation.info().seq, index);
    std::string missing;
    const std::lock_guard lock(mutex_);
    // Who has not brought its own part waits for something else first.
    if (memory_ && own().find(key, HostBoard::kBrought) == nullptr) return "";
    for (std::size_t place = 0; place < config_.ranks.size(); ++place) {
      if (place == config_.place) continue;
      if (memory_ && memory_->board(place).find(key, HostBoard::kBrought) != nullptr) continue;
      missing += (missing.empty() ? "" : ", ") + std::string("rank ") +
                 std::to_string(config_.ranks[place]);
    }
    return missing.empty() ? "" : missing + " on this host did not bring their part";
  }

  void stop() {
    stopping_ = true;
    ringOwn();
  }

  void run() {
    if (meet()) {
      while (!stopping_) {
        const std::uint32_t seen = own().bell.load();
        takeNew();
        if (step()) continue;
        const TimePoint before = Clock::now();
        own().sleep(seen, live_.empty() ? kIdle : local::kSlice);
        if (!live_.empty() && Clock::now() - before >= local::kSlice) lookAround();
      }
      own().left = 1;
      memory_->ringAll();
    }
    std::deque<std::shared_ptr<TwoLevel>> rest;
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      rest.swap(new_);
    }
    live_.clear();
  }

  // local::Watch, while the ranks meet: what fails meanwhile is let go.
  Status look(TimePoint /*now*/, bool /*slept*/) override {
    std::vector<std::shared_ptr<TwoLevel>> over;  // ends outside of the lock
    const std::lock_guard lock(mutex_);
    std::erase_if(new_, [&](std::shared_ptr<TwoLevel>& operation) {
      if (!operation->finished()) return false;
      over.push_back(std::move(operation));
      return true;
    });
    return stopping_ ? Status(Code::kAborted, "the group was closed") : Status();
  }
  TimePoint deadline() const override { return TimePoint::max(); }

 private:
  /// An operation under way on this rank: how many of its segments have come how far, in order.
  struct Live {
    std::shared_ptr<TwoLevel> operation;
    std::uint64_t brought = 0;
    std::uint64_t answered = 0;
    std::uint64_t copied = 0;
    SegmentKey key(std::uint64_t segment) const { return keyOf(operation->info().seq, segment); }
  };
  struct Area {
    SegmentKey key = 0;
    std::weak_ptr<TwoLevel> user;
    bool over = true;  // copied, and so answered: its bytes have left
  };

  HostBoard& own() const { return memory_->board(config_.place); }
  void ringOwn() {
    std::shared_ptr<HostMemory> memory;
    {
      const std::lock_guard lock(mutex_);
      memory = memory_;
    }
    if (memory) memory->board(config_.place).ring();
  }

  bool meet() {
    local::Rendezvous::Config meeting;
    meeting.name = config_.meeting;
    meeting.place = config_.place;
    meeting.size = static_cast<std::uint32_t>(config_.ranks.size());
    meeting.nbytes = HostMemory::nbytes(config_.ranks.size(), config_.segment_bytes);
    local::Rendezvous rendezvous(meeting);
    if (!rendezvous.run(*this).ok()) return false;
    std::shared_ptr<local::Segment> segment = rendezvous.take();
    if (!segment) {
      config_.lost(
          Status(rendezvous.refusal().code(),
                 "the ranks of this host cannot share memory: " + rendezvous.refusal().message() +
                     "; set REDUCER_TRANSPORT=grpc on all ranks to do without"));
      return false;
    }
    segment_ = segment;
    const std::lock_guard lock(mutex_);
    memory_ = std::make_shared<HostMemory>(segment->data(), segment, config_.ranks.size(),
                                           config_.segment_bytes);
    return true;
  }

  void takeNew() {
    std::deque<std::shared_ptr<TwoLevel>> taken;
    {
      const std::lock_guard lock(mutex_);
      taken.swap(new_);
    }
    for (auto& operation : taken) live_.push_back(Live{std::move(operation)});
  }

  /// Does what can be done now. True if that was anything.
  bool step() {
    bool worked = dropFinished();
    bool oldest = true;  // of those that have not brought all: areas are taken in order
    for (Live& live : live_) {
      worked |= learnFailure(live);
      if (live.operation->finished()) continue;
      if (oldest) worked |= bring(live);
      oldest &= live.brought == live.operation->segments();
      worked |= sum(live);
      worked |= publishAnswered(live);
      worked |= copyOut(live);
    }
    return worked;
  }

  /// Lets go of what has failed, or is all copied; others may then use their areas again.
  bool dropFinished() {
    std::vector<Live> over;  // may call `done`
    std::erase_if(live_, [&](Live& live) {
      const bool complete = live.copied == live.operation->segments();
      if (!complete && !live.operation->finished()) return false;
      over.push_back(std::move(live));
      return true;
    });
    for (const Live& live : over) {
      last_ = std::max(last_, keyOf(live.operation->info().seq + 1, 0));
    }
    const SegmentKey done = live_.empty() ? last_ : live_.front().key(live_.front().copied);
    const SegmentKey before = own().done.load();
    if (done > before) {
      own().done.store(done);
      if (wasLast(before)) memory_->ringAll();
    }
    return !over.empty();
  }

  /// None of the others had still to come as far as this one had: an area may be free now.
  bool wasLast(SegmentKey before) const {
    for (std::size_t place = 0; place < memory_->ranks(); ++place) {
      if (place != config_.place && memory_->board(place).done.load() < before) return false;
    }
    return true;
  }

  bool learnFailure(Live& live) {
    for (std::size_t place = 0; place < memory_->ranks(); ++place) {
      if (place == config_.place) continue;
      if (const auto why = memory_->board(place).told(live.operation->info().seq)) {
        config_.fail(live.operation, *why);
        return true;
      }
    }
    return false;
  }

  /// An area that nobody reads any more, and whose bytes have left; areas are used in turn.
  bool free(const Area& area) const {
    if (!area.over && !area.user.expired()) return false;
    for (std::size_t place = 0; place < memory_->ranks(); ++place) {
      if (place != config_.place && memory_->board(place).done.load() <= area.key) return false;
    }
    return true;
  }

  bool bring(Live& live) {
    TwoLevel& operation = *live.operation;
    if (live.brought == operation.segments()) return false;
    if (live.brought - live.copied == kSegmentsInFlight) return false;
    Area& area = areas_[next_area_];
    if (used_[next_area_] && !free(area)) return false;
    const std::size_t index = std::exchange(next_area_, (next_area_ + 1) % kSegmentsInFlight);
    used_[index] = true;
    area = Area{live.key(live.brought), live.operation, false};
    HostBoard::Entry& entry = own().entries[index];
    entry.stage.store(HostBoard::kNothing);
    entry.key.store(area.key + 1);
    entry.fingerprint.store(operation.fingerprint());
    for (std::size_t i = 0; i < operation.strips().size(); ++i) {
      const Strip& strip = operation.strips()[i];
      const Span slice = operation.slice(live.brought, i);
      const bool others_need = strip.source == kAllRanks ? placeOf(strip.share) != config_.place
                                                         : strip.source == ownRank();
      if (!others_need || slice.length == 0) continue;
      std::memcpy(memory_->area(config_.place, index) + operation.areaOffset(i),
                  strip.in + slice.offset, slice.length);
    }
    entry.stage.store(HostBoard::kBrought);
    if (memory_->all(area.key, HostBoard::kBrought)) memory_->ringAll();
    ++live.brought;
    return true;
  }

  Rank ownRank() const { return config_.ranks[config_.place]; }
  std::size_t placeOf(Rank share) const {
    return static_cast<std::size_t>(share) % config_.ranks.size();
  }
  /// Of a rank of this host; else their number.
  std::size_t placeOfRank(Rank rank) const {
    return static_cast<std::size_t>(std::find(config_.ranks.begin(), config_.ranks.end(), rank) -
                                    config_.ranks.begin());
  }
  std::byte* areaOf(std::size_t place, const HostBoard::Entry* entry) const {
    return memory_->area(place,
                         static_cast<std::size_t>(entry - memory_->board(place).entries.data()));
  }

  bool sum(Live& live) {
    TwoLevel& operation = *live.operation;
    const std::uint64_t index = operation.segmentsSummed();
    if (index == live.brought) return false;
    std::vector<std::byte*> areas(memory_->ranks());
    for (std::size_t place = 0; place < memory_->ranks(); ++place) {
      const HostBoard::Entry* entry =
          memory_->board(place).find(live.key(index), HostBoard::kBrought);
      if (entry == nullptr) return false;
      if (entry->fingerprint.load() != operation.fingerprint()) return differs(live, place);
      areas[place] = areaOf(place, entry);
    }
    for (std::size_t i = 0; i < operation.strips().size(); ++i) {
      if (placeOf(operation.strips()[i].share) == config_.place) gather(operation, index, i, areas);
    }
    std::byte* const area = areas[config_.place];
    operation.summed(index, area, memory_->owner());
    config_.pump(operation.owners());
    return true;
  }

  /// Brings this host's part of a strip that this rank carries into its area: the sum of its ranks,
  /// or the bytes of the one whose they are, if that is one of them.
  void gather(const TwoLevel& operation, std::uint64_t index, std::size_t strip_index,
              const std::vector<std::byte*>& areas) {
    const Strip& strip = operation.strips()[strip_index];
    const Span slice = operation.slice(index, strip_index);
    const std::uint64_t offset = operation.areaOffset(strip_index);
    if (slice.length == 0) return;
    if (strip.source != kAllRanks) {
      const std::size_t source = placeOfRank(strip.source);
      if (source == areas.size() || source == config_.place) return;
      std::memcpy(areas[config_.place] + offset, areas[source] + offset, slice.length);
      return;
    }
    inputs_.clear();
    for (std::size_t place = 0; place < areas.size(); ++place) {
      const std::byte* const from =
          place == config_.place ? strip.in + slice.offset : areas[place] + offset;
      inputs_.emplace_back(Bytes(from, slice.length), nullptr);
    }
    const wire::Call& call = operation.info().call;
    kernels::reduce(call.dtype, partially(call.op, call.dtype), inputs_,
                    areas[config_.place] + offset, slice.length / sizeOf(call.dtype));
  }

  /// A rank of this host made another call. All say so at the coordinator; only where the calls are
  /// equal and the sizes are not does nobody else notice.
  bool differs(Live& live, std::size_t place) {
    if (!live.operation->compared()) return false;
    config_.fail(
        live.operation,
        Status(Code::kMismatch, "rank " + std::to_string(config_.ranks[place]) + " and rank " +
                                    std::to_string(config_.ranks[config_.place]) +
                                    " made the same call, but cut it into different parts"));
    return true;
  }

  bool publishAnswered(Live& live) {
    TwoLevel& operation = *live.operation;
    if (live.answered == operation.segmentsSummed() || !operation.answered(live.answered)) {
      return false;
    }
    const SegmentKey key = live.key(live.answered++);
    for (HostBoard::Entry& entry : own().entries) {
      if (entry.key.load() == key + 1) entry.stage.store(HostBoard::kAnswered);
    }
    if (memory_->all(key, HostBoard::kAnswered)) memory_->ringAll();
    return true;
  }

  bool copyOut(Live& live) {
    TwoLevel& operation = *live.operation;
    if (live.copied == live.answered) return false;
    const SegmentKey key = live.key(live.copied);
    if (!memory_->all(key, HostBoard::kAnswered)) return false;
    for (std::size_t i = 0; i < operation.strips().size(); ++i) {
      const Strip& strip = operation.strips()[i];
      const Span slice = operation.slice(live.copied, i);
      if (strip.out == nullptr || slice.length == 0) continue;
      const std::size_t place = placeOf(strip.share);
      const auto* entry = memory_->board(place).find(key, HostBoard::kAnswered);
      std::memcpy(strip.out + slice.offset, areaOf(place, entry) + operation.areaOffset(i),
                  slice.length);
    }
    for (Area& area : areas_) area.over |= area.key == key;
    ++live.copied;
    return true;
  }

  /// After a sleep without a sign: do those live whose parts are waited for?
  void lookAround() {
    for (std::size_t place = 0; place < memory_->ranks(); ++place) {
      if (place == config_.place) continue;
      const std::string rank = "rank " + std::to_string(config_.ranks[place]) + ", on this host,";
      const HostBoard& board = memory_->board(place);
      if (board.left.load() != 0) {
        for (const Live& live : std::vector<Live>(live_)) {
          if (board.done.load() >= keyOf(live.operation->info().seq + 1, 0)) continue;
          config_.fail(live.operation,
                       Status(Code::kUnavailable, rank + " has left the group; make a new group"));
        }
      } else if (!segment_->occupied(place)) {
        config_.died(config_.ranks[place]);
      }
    }
  }

  const Config config_;
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;
  std::deque<std::shared_ptr<TwoLevel>> new_;  // not seen by the thread yet
  bool ended_ = false;
  std::shared_ptr<HostMemory> memory_;  // once the ranks have met; constant then

  // The thread's own.
  std::shared_ptr<local::Segment> segment_;
  std::vector<Live> live_;  // in the order of numbers
  std::array<Area, kSegmentsInFlight> areas_;
  std::array<bool, kSegmentsInFlight> used_{};
  std::size_t next_area_ = 0;
  std::vector<Payload> inputs_;  // of gather()
  SegmentKey last_ = 0;          // beyond all operations that are over
};

HostStage::HostStage(Config config) : inner_(std::make_shared<Inner>(std::move(config))) {
  thread_ = std::thread([inner = inner_] { inner->run(); });
}

void HostStage::start(const std::shared_ptr<TwoLevel>& operation) { inner_->start(operation); }

void HostStage::failed(std::uint64_t number, const Status& why) { inner_->failed(number, why); }

std::string HostStage::waitsFor(const TwoLevel& operation) const {
  return inner_->waitsFor(operation);
}

void HostStage::stop() {
  inner_->stop();
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    thread = std::move(thread_);
  }
  if (!thread.joinable()) return;
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();  // a `done` closed the group: the thread ends when that returns
  } else {
    thread.join();
  }
}

}  // namespace reducer::collective
