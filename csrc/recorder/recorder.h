// The flight recorder: the last calls of this process, of all its groups, and how far they came.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "common/types.h"
#include "wire/frame.h"

namespace reducer::recorder {

enum class State : std::uint8_t {
  kQueued,   ///< called; nothing of it has left this rank
  kStarted,  ///< on its way
  kDone,
  kFailed,
  kPassedOn,  ///< from shared memory to the network, where it has another entry
};
std::string_view nameOf(State state) noexcept;

/// One call. A time that has not come is TimePoint().
struct Entry {
  std::uint64_t number = 0;  ///< of all calls that were recorded
  std::uint32_t group = 0;   ///< as Recorder::add() gave it
  bool two_levels = false;
  bool any_source = false;  ///< a receive that does not know its sender yet: of the lane only
                            ///< receiver and tag count
  State state = State::kQueued;
  Code code = Code::kOk;
  std::uint64_t lane = 0;  ///< wire/lane.h
  std::uint64_t seq = 0;   ///< in its lane
  wire::Call call;
  std::string_view algorithm;  ///< of static storage
  TimePoint queued;
  TimePoint started;
  TimePoint answered;  ///< the first answer; over the network only
  TimePoint ended;
};

struct GroupInfo {
  std::string job;   ///< 16 bytes
  std::string name;  ///< readable
  Rank rank = 0;
  std::int32_t world_size = 1;
  std::vector<std::string> hosts;  ///< "hostname:pid" of all ranks, if they are known
};

/// What a group knows beside its entries. Called without locks of the recorder, from any thread.
class Source {
 public:
  virtual ~Source() = default;
  /// Collectives that this rank has called.
  virtual std::uint64_t called() = 0;
  /// Whom a call that is under way waits for, a text each; empty: not known.
  virtual std::vector<std::string> waitsFor(std::uint64_t lane, std::uint64_t seq) = 0;
};

class Json;
class Record;

/// Keeps the last `entries` calls in memory: 128 bytes each, taken at once, and the texts of those
/// that failed. Each entry has a lock of its own, which nobody but a dump ever waits for.
///
/// Thread safety: every method, from any thread. Lifetime: beyond all groups and Records of it.
class Recorder {
 public:
  explicit Recorder(std::size_t entries);
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  /// A group's place in entries. It stays known for a while after remove().
  std::uint32_t add(GroupInfo info);
  void setSource(std::uint32_t group, std::weak_ptr<Source> source);
  void remove(std::uint32_t group);

  /// Something went wrong in a group: whoever listens makes a dump. Errors of calls say so
  /// themselves.
  void trouble(std::uint32_t group, const Status& why);
  /// `trouble` is called with a text for people, `groups` when one was added or removed; they must
  /// not block. No call is under way when this returns.
  void listen(std::function<void(const std::string& why)> trouble, std::function<void()> groups);

  /// Everything, as JSON: docs/flight-recorder.md. `reason`: why it was asked for.
  std::string dump(const std::string& reason);

  /// Where the dumps of this process belong: the job (hexadecimal, shortened) of the first group
  /// that was made while no other was open, and this rank in it. Empty: there was none.
  struct Home {
    std::string job;
    Rank rank = 0;
  };
  Home home();
  /// The same and the groups that are open, as members of an object.
  void tellGroups(Json& json);

  std::size_t entries() const { return size_; }

 private:
  friend class Record;
  struct alignas(64) Slot {
    std::atomic<bool> locked{false};
    Entry entry;
  };
  static_assert(sizeof(Slot) == 128);
  /// Held for some stores, or the copy of an entry.
  class SlotLock {
   public:
    explicit SlotLock(Slot& slot) : slot_(slot) {
      while (slot_.locked.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
    }
    ~SlotLock() { slot_.locked.store(false, std::memory_order_release); }
    SlotLock(const SlotLock&) = delete;
    SlotLock& operator=(const SlotLock&) = delete;

   private:
    Slot& slot_;
  };
  struct Group {
    GroupInfo info;
    std::weak_ptr<Source> source;
    bool open = true;
  };
  struct Texts {
    std::string error;
    std::string late;
    std::vector<std::string> waits_for;
  };

  Slot& slotOf(std::uint64_t number) const { return slots_[number % size_]; }
  /// Takes a slot for a new entry, which `fill` makes in place. Its number.
  template <class Fill>
  std::uint64_t begin(const Fill& fill, std::uint32_t& group) {
    const std::uint64_t number = next_.fetch_add(1, std::memory_order_relaxed);
    Slot& slot = slotOf(number);
    const SlotLock lock(slot);
    // Another thread may have come round the ring meanwhile: what is lost then is this one.
    if (slot.entry.number > number) return number;
    slot.entry = Entry();
    slot.entry.number = number;
    fill(slot.entry);
    group = slot.entry.group;
    return number;
  }
  template <class Change>
  void change(std::uint64_t number, const Change& change) {
    Slot& slot = slotOf(number);
    const SlotLock lock(slot);
    if (slot.entry.number == number) change(slot.entry);
  }
  void groupsChanged();
  template <class Change>
  void changeTexts(std::uint64_t number, const Change& change);
  std::vector<Entry> snapshot() const;

  const std::size_t size_;
  const std::unique_ptr<Slot[]> slots_;
  std::atomic<std::uint64_t> next_{1};  // numbers begin with 1: a slot with 0 is empty

  std::mutex mutex_;
  std::map<std::uint32_t, Group> groups_;
  std::deque<std::uint32_t> closed_;  // of them, the oldest first
  std::uint32_t next_group_ = 0;
  Home home_;
  std::map<std::uint64_t, Texts> texts_;  // by number of the entry
  std::mutex listener_mutex_;
  std::function<void(const std::string&)> on_trouble_;
  std::function<void()> on_groups_;
};

/// A call under way, which tells the recorder how far it is. One that was made without a recorder
/// does nothing. Thread safety: every method, from any thread; not copied.
class Record {
 public:
  /// `fill(entry)` says what it is, within a lock; it is not called without a recorder. `started`:
  /// so is the entry.
  template <class Fill>
  Record(Recorder* recorder, bool started, const Fill& fill)
      : recorder_(recorder), started_(started) {
    if (recorder_ != nullptr) number_ = recorder_->begin(fill, group_);
  }
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;
  Record(Record&&) = delete;
  Record& operator=(Record&&) = delete;

  explicit operator bool() const { return recorder_ != nullptr; }

  /// Cheap from the second time on.
  void started() {
    if (recorder_ != nullptr && !started_.load(std::memory_order_relaxed)) tellStarted();
  }
  void answered() {
    if (recorder_ != nullptr && !answered_.load(std::memory_order_relaxed)) tellAnswered();
  }
  /// Once.
  void ended(const Status& status) {
    if (recorder_ != nullptr) tellEnded(status);
  }
  void passedOn();
  /// Whom it waited for when it failed; before ended().
  void waitedFor(std::vector<std::string> names);
  /// Who is late, as a reducer says.
  void late(const std::string& text);

 private:
  void tellStarted();
  void tellAnswered();
  void tellEnded(const Status& status);

  Recorder* const recorder_;
  std::uint32_t group_ = 0;
  std::uint64_t number_ = 0;
  std::atomic<bool> started_;
  std::atomic<bool> answered_{false};
};

}  // namespace reducer::recorder
