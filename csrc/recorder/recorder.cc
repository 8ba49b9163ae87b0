#include "recorder/recorder.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <utility>

#include "common/hexadecimal.h"
#include "recorder/json.h"
#include "wire/lane.h"

namespace reducer::recorder {
namespace {

// Groups that have ended and may still have entries.
constexpr std::size_t kClosedKept = 64;

// Of a job's 16 bytes in a folder's name.
constexpr std::size_t kJobBytesShown = 4;

// What a dump is made for. (Aborts are the user's wish, and wrong arguments are told at once.)
bool isTrouble(Code code) {
  return code != Code::kOk && code != Code::kAborted && code != Code::kInvalidArgument;
}

std::string hostName() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "?";
}

/// Seconds since 1970 of what the steady clock has shown.
class WallClock {
 public:
  WallClock() : steady_(Clock::now()), wall_(std::chrono::system_clock::now()) {}
  double now() const { return seconds(wall_.time_since_epoch()); }
  double at(TimePoint time) const { return now() - seconds(steady_ - time); }

 private:
  template <class Any>
  static double seconds(Any duration) {
    return std::chrono::duration<double>(duration).count();
  }
  const TimePoint steady_;
  const std::chrono::system_clock::time_point wall_;
};

void writeTime(Json& json, const WallClock& clock, const char* name, TimePoint time) {
  if (time != TimePoint()) json.member(name, clock.at(time));
}

void writeLane(Json& json, const Entry& entry) {
  if (wire::isPairLane(entry.lane)) {
    json.member("kind", "send/recv");
    json.member("to", wire::receiverOf(entry.lane));
    json.member("tag", wire::tagOf(entry.lane));
    if (entry.any_source) return;
    json.member("from", wire::senderOf(entry.lane));
    json.member("seq", entry.seq);
  } else if (wire::isStepLane(entry.lane)) {
    json.member("kind", "second step");
    json.member("seq", wire::stepNumber(entry.lane));
  } else {
    json.member("kind", "collective");
    json.member("seq", entry.seq);
  }
}

void writeCall(Json& json, const wire::Call& call) {
  json.member("collective", nameOf(call.collective));
  if (call.op != ReduceOp::kNone) json.member("op", nameOf(call.op));
  json.member("dtype", nameOf(call.dtype));
  json.member("count", call.count);
  json.member("bytes", call.count * sizeOf(call.dtype));
  if (call.root != kAllRanks) json.member("root", call.root);
}

}  // namespace

std::string_view nameOf(State state) noexcept {
  switch (state) {
    case State::kQueued:
      return "queued";
    case State::kStarted:
      return "started";
    case State::kDone:
      return "done";
    case State::kFailed:
      return "failed";
    case State::kPassedOn:
      return "passed on";
  }
  return "?";
}

Recorder::Recorder(std::size_t entries)
    : size_(std::max<std::size_t>(1, entries)), slots_(std::make_unique<Slot[]>(size_)) {}

// ------------------------------------------------------------------ entries

template <class Change>
void Recorder::changeTexts(std::uint64_t number, const Change& change) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t oldest = next_.load(std::memory_order_relaxed);
  while (!texts_.empty() && texts_.begin()->first + size_ < oldest) texts_.erase(texts_.begin());
  if (number + size_ >= oldest) change(texts_[number]);
}

std::vector<Entry> Recorder::snapshot() const {
  std::vector<Entry> all;
  for (std::size_t i = 0; i < size_; ++i) {
    const SlotLock lock(slots_[i]);
    if (slots_[i].entry.number != 0) all.push_back(slots_[i].entry);
  }
  std::sort(all.begin(), all.end(),
            [](const Entry& a, const Entry& b) { return a.number < b.number; });
  return all;
}

void Record::tellStarted() {
  if (started_.exchange(true)) return;
  const TimePoint now = Clock::now();
  recorder_->change(number_, [now](Entry& entry) {
    if (entry.state == State::kQueued) entry.state = State::kStarted;
    if (entry.started == TimePoint()) entry.started = now;
  });
}

void Record::tellAnswered() {
  if (answered_.exchange(true)) return;
  const TimePoint now = Clock::now();
  recorder_->change(number_, [now](Entry& entry) { entry.answered = now; });
}

void Record::tellEnded(const Status& status) {
  const TimePoint now = Clock::now();
  recorder_->change(number_, [&](Entry& entry) {
    entry.state = status.ok() ? State::kDone : State::kFailed;
    entry.code = status.code();
    entry.ended = now;
  });
  if (status.ok()) return;
  recorder_->changeTexts(number_, [&](auto& texts) { texts.error = status.message(); });
  recorder_->trouble(group_, status);
}

void Record::passedOn() {
  if (recorder_ == nullptr) return;
  const TimePoint now = Clock::now();
  recorder_->change(number_, [now](Entry& entry) {
    entry.state = State::kPassedOn;
    entry.ended = now;
  });
}

void Record::waitedFor(std::vector<std::string> names) {
  if (recorder_ == nullptr || names.empty()) return;
  recorder_->changeTexts(number_, [&](auto& texts) { texts.waits_for = std::move(names); });
}

void Record::late(const std::string& text) {
  if (recorder_ == nullptr) return;
  recorder_->changeTexts(number_, [&](auto& texts) { texts.late = text; });
}

// ------------------------------------------------------------------ groups

std::uint32_t Recorder::add(GroupInfo info) {
  std::uint32_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    const bool first = std::none_of(groups_.begin(), groups_.end(),
                                    [](const auto& group) { return group.second.open; });
    if (first) home_ = {hexadecimal(info.job.substr(0, kJobBytesShown)), info.rank};
    id = next_group_++;
    groups_[id].info = std::move(info);
  }
  groupsChanged();
  return id;
}

void Recorder::setSource(std::uint32_t group, std::weak_ptr<Source> source) {
  const std::lock_guard lock(mutex_);
  groups_.at(group).source = std::move(source);
}

void Recorder::remove(std::uint32_t group) {
  {
    const std::lock_guard lock(mutex_);
    groups_.at(group).open = false;
    groups_.at(group).source.reset();
    closed_.push_back(group);
    if (closed_.size() > kClosedKept) {
      groups_.erase(closed_.front());
      closed_.pop_front();
    }
  }
  groupsChanged();
}

void Recorder::groupsChanged() {
  const std::lock_guard lock(listener_mutex_);
  if (on_groups_) on_groups_();
}

void Recorder::tellGroups(Json& json) {
  const std::lock_guard lock(mutex_);
  json.member("job", home_.job);
  json.member("rank", home_.rank);
  json.beginList("groups");
  for (const auto& [id, group] : groups_) {
    if (!group.open) continue;
    json.beginObject();
    json.member("job", hexadecimal(group.info.job));
    json.member("name", group.info.name);
    json.endObject();
  }
  json.endList();
}

Recorder::Home Recorder::home() {
  const std::lock_guard lock(mutex_);
  return home_;
}

void Recorder::trouble(std::uint32_t group, const Status& why) {
  if (!isTrouble(why.code())) return;
  std::string name;
  {
    const std::lock_guard lock(mutex_);
    const auto found = groups_.find(group);
    if (found != groups_.end()) name = found->second.info.name;
  }
  const std::lock_guard lock(listener_mutex_);
  if (on_trouble_) on_trouble_("an error in group '" + name + "'");
}

void Recorder::listen(std::function<void(const std::string&)> trouble,
                      std::function<void()> groups) {
  const std::lock_guard lock(listener_mutex_);
  on_trouble_ = std::move(trouble);
  on_groups_ = std::move(groups);
}

// ------------------------------------------------------------------ dump

std::string Recorder::dump(const std::string& reason) {
  const WallClock clock;
  const Home here = home();
  const std::vector<Entry> entries = snapshot();
  std::map<std::uint32_t, Group> groups;
  std::map<std::uint64_t, Texts> texts;
  {
    const std::lock_guard lock(mutex_);
    groups = groups_;
    texts = texts_;
  }
  Json json;
  json.beginObject();
  json.member("format", 1);
  json.member("reason", reason);
  json.member("time", clock.now());
  json.member("host", hostName());
  json.member("pid", getpid());
  json.member("job", here.job);
  json.member("rank", here.rank);
  json.member("entries", size_);
  json.member("recorded", next_.load() - 1);

  json.beginList("groups");
  for (const auto& [id, group] : groups) {
    const auto source = group.source.lock();
    json.beginObject();
    json.member("id", id);
    json.member("job", hexadecimal(group.info.job));
    json.member("name", group.info.name);
    json.member("rank", group.info.rank);
    json.member("world_size", group.info.world_size);
    json.beginList("hosts");
    for (const std::string& host : group.info.hosts) json.item(host);
    json.endList();
    json.member("open", group.open);
    if (source) json.member("called", source->called());
    json.endObject();
  }
  json.endList();

  json.beginList("calls");
  for (const Entry& entry : entries) {
    json.beginObject();
    json.member("number", entry.number);
    json.member("group", entry.group);
    writeLane(json, entry);
    writeCall(json, entry.call);
    json.member("algorithm", entry.algorithm);
    json.member("two_levels", entry.two_levels);
    json.member("state", nameOf(entry.state));
    if (entry.code != Code::kOk) json.member("code", nameOf(entry.code));
    writeTime(json, clock, "queued", entry.queued);
    writeTime(json, clock, "started", entry.started);
    writeTime(json, clock, "answered", entry.answered);
    writeTime(json, clock, "ended", entry.ended);
    const auto own = texts.find(entry.number);
    std::vector<std::string> waits_for;
    if (own != texts.end()) {
      if (!own->second.error.empty()) json.member("error", own->second.error);
      if (!own->second.late.empty()) json.member("late", own->second.late);
      waits_for = own->second.waits_for;
    }
    const auto group = groups.find(entry.group);
    const bool under_way = entry.state == State::kQueued || entry.state == State::kStarted;
    if (under_way && group != groups.end()) {
      if (const auto source = group->second.source.lock()) {
        waits_for = source->waitsFor(entry.lane, entry.seq);
      }
    }
    json.beginList("waits_for");
    for (const std::string& name : waits_for) json.item(name);
    json.endList();
    json.endObject();
  }
  json.endList();
  json.endObject();
  return json.text();
}

}  // namespace reducer::recorder
