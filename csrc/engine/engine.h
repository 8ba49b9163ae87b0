// The state machine of a reducer: what came in, what goes out. No threads, no sockets, no clock of
// its own.
//
// A slot is one chunk of one operation. Every rank that takes part in it (as pusher, puller or
// both) sends one kPush frame and gets one answer: kResult, or kError for the whole operation. When
// all pushers are there the slot's contributions leave the engine as Ready, in rank order; settle()
// sums them outside of any lock.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/memory.h"
#include "common/payload.h"
#include "common/placement.h"
#include "common/status.h"
#include "common/types.h"
#include "engine/describe.h"
#include "wire/frame.h"

namespace reducer::engine {

/// A connected worker, as the engine sees it: somebody to answer. The engine only keeps and returns
/// it.
class Peer {
 public:
  virtual ~Peer() = default;
  /// The worker that this reducer lives in. It is answered last, so that a worker whose operation
  /// is done owes nobody anything and may end.
  bool in_process = false;
};
using PeerRef = std::shared_ptr<Peer>;

/// One answer. `nbytes` is the chunk's length, which leaves the worker's window with it.
struct Outgoing {
  PeerRef to;
  wire::Frame frame;
  Payload payload;
  bool wants_result = false;  ///< in Ready: settle() puts the result here
};

/// A slot whose contributions are all there.
struct Ready {
  wire::Call call;
  std::size_t nbytes = 0;
  bool checksum = false;
  std::vector<Payload> contributions;  ///< in rank order; of a rail: in the order of the hosts
  /// Set where ranks of one host are to be summed before the hosts are.
  std::shared_ptr<const Placement> by_host;
  Rank world_size = 0;                     ///< what kAvg divides by
  std::shared_ptr<MemoryAccount> account;  ///< which the result is on
  std::vector<Outgoing> replies;
};

/// What the caller must do after an event, outside of the engine's lock.
struct Actions {
  std::vector<Outgoing> sends;
  std::vector<Ready> ready;
};

/// Memory for results, used again and again. Thread safe. A buffer returns to its pool when its
/// last Payload is gone.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  static std::shared_ptr<BufferPool> create();
  /// At least `nbytes`, 64-byte aligned, uninitialised.
  std::shared_ptr<std::byte> get(std::size_t nbytes);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Sums the contributions in the order of the group's placement, and completes the replies.
std::vector<Outgoing> settle(Ready ready, BufferPool& pool);

/// The sum of all ranks' `inputs` (in rank order) in the order of the placement, as Placement says
/// it, in `out`: inputs[0].nbytes() bytes that overlap no input. kAvg divides once, at the end.
void sumByHost(const Placement& placement, DataType dtype, ReduceOp op,
               std::span<const Payload> inputs, std::byte* out);

struct EngineCounters {
  std::uint64_t slots_open = 0;
  std::uint64_t slots_done = 0;
  std::uint64_t slots_failed = 0;
};

/// One shard: some of the slots of every group. Not thread safe: the owner serialises the calls.
///
/// What was answered by a reducer that is lost comes again (docs/protocol.md): a result, which
/// answers everybody who still asks for it, or a part of a rank that needs no answer any more.
///
/// A non-ok Status from a method means that the peer broke the protocol: its connection is to be
/// closed with that message; the other ranks are not harmed (until they wait for that one).
class Engine {
 public:
  /// `judges`: what waits for a rank whose connection broke fails. (A standalone reducer does not
  /// know whether that rank or its own connection is lost.)
  explicit Engine(bool judges = true) : judges_(judges) {}

  /// `peer` is rank hello.rank of the group hello.job from now on. The caller has checked the
  /// hello. What a group's slots take up is on its `account`, of the first that joins; null: nobody
  /// counts. (Payloads are the caller's to charge.)
  void join(const PeerRef& peer, const wire::Hello& hello,
            const std::shared_ptr<MemoryAccount>& account, Actions& actions);

  /// `peer` is gone. `why` is ok if it left in good order. Fails the slots that still wait for it.
  void leave(const PeerRef& peer, const Status& why, Actions& actions);

  /// kResourceExhausted: the group's account has no room for the slot. A payload's owner is kept as
  /// long as the push is, also where there are no bytes.
  Status onPush(const PeerRef& peer, const wire::Frame& frame, Payload payload, TimePoint now,
                Actions& actions);

  /// The peer has sent all that it had to move here in an epoch.
  Status onSettled(const PeerRef& peer, const wire::Frame& frame, Actions& actions);

  /// The peer gives up an operation: what it has here is dropped, the others get `frame`'s code and
  /// text.
  Status onCancel(const PeerRef& peer, const wire::Frame& frame, Actions& actions);

  /// Fails what has waited too long, and tells those who have waited a third of that who is
  /// missing.
  void tick(TimePoint now, Actions& actions);

  /// The last collective of which a push of that rank came here.
  Joined joined(const std::string& job, Rank rank) const;

  const EngineCounters& counters() const { return counters_; }

 private:
  struct Member {
    PeerRef peer;      // null: not connected (yet, or any more)
    std::string host;  // "hostname:pid", empty before it connected
    bool gone = false;
    std::string gone_text;
    bool left = false;  // gone, in good order
    /// Its latest word on what is answered there, and the epoch that it came with.
    std::uint64_t acked = 0;
    std::uint32_t acked_epoch = 0;
    std::uint32_t settled = 0;  // epoch
    Joined joined;
  };
  struct Arrival {
    Rank rank;
    PeerRef peer;
    wire::Call call;
    std::uint64_t length;  // what it counts against its window
    Payload empty;         // of a rank that pushes nothing: what its frame is charged by
  };
  struct Slot {
    Charge charge;
    wire::Frame head;                    // the first frame: what the others are compared with
    std::size_t participants = 0;        // ranks that take part
    std::vector<Payload> contributions;  // by rank; of a rail by host; or one of the one pusher
    std::vector<Arrival> arrivals;       // in order of arrival
    std::vector<char> arrived;           // by rank
    std::size_t parts = 0;               // of `arrived`
    /// A result that came again, for everybody who asks.
    bool handed_on = false;
    Payload handed;
    std::uint32_t again_epoch = 0;  // the latest in which something came again; 0: nothing did
    bool mismatch = false;
    TimePoint since;
    TimePoint deadline;
    TimePoint late_at;  // when those who are here are told who is not
  };
  using OperationId = std::pair<std::uint64_t, std::uint64_t>;  // lane, seq
  struct Failure {
    Code code;
    std::string text;
    Rank lost;                    // why, or kAllRanks
    std::vector<bool> cancelled;  // by rank
    std::size_t cancels = 0;
    Charge charge;
    std::list<OperationId>::iterator place;  // in Group::failed
  };
  /// The slots of an operation stand together.
  struct ByOperation {
    bool operator()(const wire::SlotId& a, const wire::SlotId& b) const noexcept;
  };
  using Slots = std::map<wire::SlotId, std::unique_ptr<Slot>, ByOperation>;
  struct Group {
    std::string name;
    std::shared_ptr<const Placement> placement;
    std::shared_ptr<MemoryAccount> account;
    std::vector<Member> members;
    std::size_t connected = 0;
    std::size_t gone = 0;  // members that are
    Slots slots;
    std::map<OperationId, Failure> failures;
    std::list<OperationId> failed;  // the same, in order
  };
  struct Place {
    Group* group;
    Rank rank;
  };

  static Status checkPush(const Group& group, Rank rank, const wire::Frame& frame,
                          const Payload& payload);
  static bool isAmong(const Group& group, Rank ranks, Rank rank);
  static bool takesPart(const Group& group, const Slot& slot, Rank rank);
  static std::size_t participantsOf(const Group& group, const wire::Frame& head);
  static std::string nameRank(const Group& group, Rank rank);
  static std::string nameOperation(const Group& group, const wire::Frame& head);
  static std::string describeMismatch(const Group& group, const Slot& slot);
  static std::string describeWait(const Group& group, const Slot& slot, TimePoint now);
  static void tellLate(const Group& group, const Slot& slot, TimePoint now, Actions& actions);
  static Failure* findFailure(Group& group, OperationId id);
  static void remember(Group& group, OperationId id, Failure failure);
  static void forget(Group& group, OperationId id);
  static void tellLeft(const PeerRef& peer, Rank left, Actions& actions);
  static void tellReceiver(const Group& group, const Slot& slot, Actions& actions);

  /// The frame's slot, made if there is none; null if there is no memory for it.
  Slot* slotFor(Group& group, const wire::Frame& frame, TimePoint now, bool* made);
  void drop(std::unique_ptr<Slot> slot);
  static std::size_t spareBytes(const Slot& slot);
  Status onAgain(Group& group, Rank rank, const wire::Frame& frame, Payload payload, TimePoint now,
                 Actions& actions);
  void handOn(const Group& group, Slot& slot, Actions& actions);
  void complete(Group& group, Slot& slot, Actions& actions);
  /// What all ranks acknowledge, as a result says it.
  static void acknowledge(const Group& group, wire::Frame& result);
  void arrive(Group& group, Slot& slot, const PeerRef& peer, Rank rank, const wire::Frame& frame,
              Payload payload, Actions& actions);
  void finish(const Group& group, Slot& slot, Actions& actions);
  /// Takes a rank's part in.
  static void hold(const Group& group, Slot& slot, Rank rank, Payload payload);
  static void answerAll(const Group& group, const Slot& slot, std::vector<Outgoing>& replies);
  static void answer(const Group& group, const Slot& slot, const Arrival& arrival,
                     const wire::Frame& result, std::vector<Outgoing>& replies);
  /// `lost`: the rank that died and is waited for, or kAllRanks.
  void fail(Group& group, const wire::Frame& head, Code code, const std::string& text,
            Actions& actions, Rank lost = kAllRanks);
  bool failIfHopeless(Group& group, Slot& slot, Actions& actions);
  /// Pieces of an owner that is lost may still come here from ranks that are there.
  static bool moving(const Group& group);
  void failHopeless(Group& group, Actions& actions);

  const bool judges_;
  std::unordered_map<std::string, std::unique_ptr<Group>> groups_;  // by job
  std::unordered_map<const Peer*, std::pair<std::string, Place>> places_;
  std::vector<std::unique_ptr<Slot>> spare_;
  std::size_t spare_bytes_ = 0;
  EngineCounters counters_;
};

}  // namespace reducer::engine
