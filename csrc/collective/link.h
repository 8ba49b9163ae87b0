// This rank's connection to one owner: what waits to be pushed, and what is under way.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>

#include "collective/operation.h"
#include "common/status.h"
#include "transport/pulse.h"
#include "transport/transport.h"
#include "wire/frame.h"

namespace reducer::collective {

/// What a link tells its group. Called without locks held.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  /// The owner failed the operation. `lost`: since this rank died, or kAllRanks.
  virtual void onOperationError(const wire::SlotId& slot, const Status& status, Rank lost) = 0;
  /// Who is missing from an operation for long, as its owner says: `frame.text`.
  virtual void onLate(const wire::Frame& frame) = 0;
  /// The owner is gone. Ok: it left in good order.
  virtual void onLinkDown(OwnerIndex owner, const Status& reason) = 0;
  /// A send to this rank waits in its own reducer, and came before any receive.
  virtual void onArrived(const wire::SlotId& slot) = 0;
  /// A rank has left the group in good order; its reducer may go on.
  virtual void onLeft(Rank rank) = 0;
  /// Which owners are lost, or come back, as rank 0's reducer says: kEpoch, kBack, kHold.
  virtual void onNews(const wire::Frame& frame) = 0;
  /// The owner has taken this rank in.
  virtual void onWelcome(OwnerIndex owner) = 0;
  /// A link's closed() has turned true, whoever closed it.
  virtual void onLinkClosed() = 0;
};

/// Thread safety: every method, from any thread.
class Link final : public std::enable_shared_from_this<Link> {
 public:
  struct Config {
    OwnerIndex owner = 0;
    std::string name;              ///< "rank 3 at 10.0.0.4:7000", for messages
    std::size_t window_bytes = 0;  ///< of collectives; send and recv have as much per pair and tag
    bool in_process = false;       ///< pulling costs nothing there: only pushes count
    bool checksum = false;
    Duration connect_timeout{};
    bool failover = false;  ///< pieces may move to or from this owner
    bool losable = false;   ///< a standalone reducer: what it answers is kept until all have it
    wire::Hello hello;
    /// Starts the connection; called at first use, and when an owner comes back.
    /// `by_name`: where its address was found by a name, that is looked up anew.
    std::function<std::shared_ptr<transport::Connection>(std::shared_ptr<transport::Handler>,
                                                         Duration timeout, bool by_name)>
        connect;
  };

  Link(Config config, std::weak_ptr<LinkEvents> events);

  /// Connects and says hello, if that has not been done.
  void open();
  /// Forgets an owner that was left (takeAway()), or that is gone, with its connection: nothing
  /// that still comes by it counts. connect() with the number that this returns opens it anew.
  std::uint64_t rearm();
  /// Nothing happens if the link was rearmed or left since.
  void connect(std::uint64_t generation, bool by_name = false);

  /// To be called several times in a heartbeat. Says that this end lives, and ends the connection
  /// if the other has been silent for too long.
  void beat(TimePoint now);

  /// Queues what an operation has for this owner; pump() sends. All at once: where owners were lost
  /// there is more than one, and a piece that is sent between two of them would overtake those of
  /// the second that stand before it. kUnavailable if the owner is gone.
  Status enqueue(std::span<std::pair<OwnerIndex, Cursor>> cursors);

  // -- when an owner is lost (docs/protocol.md)

  /// A piece that this owner has answered, and that somebody may lack.
  struct Kept {
    std::uint64_t key = 0;
    wire::Frame frame;  // as it was pushed
    Payload payload;    // the answer; of a piece that is not pulled here, what was pushed
  };
  struct Taken {
    std::vector<Cursor> unanswered;
    std::vector<Kept> kept;
    std::shared_ptr<void> rest;   ///< to be let go without locks held
    std::function<void()> leave;  ///< to be called without locks held: the connection's end
  };
  /// Leaves a lost owner, and gives what it had and what waited for it.
  Taken takeAway();
  /// What moves here; pump() sends it.
  struct Heritage {
    std::vector<Cursor> unanswered;
    std::vector<Kept> kept;
  };
  /// Enters an epoch with it: what this link acknowledges there takes account of all that has
  /// moved, and the owner is told when it has been sent. kUnavailable if the owner is gone, too.
  Status inherit(Heritage heritage, std::uint32_t epoch);
  /// A frame beside all pieces; pump() sends it. False: the owner is gone.
  bool tell(wire::Frame frame);
  /// Sends what the window lets through, at most `pieces_max` pieces. True if there was anything
  /// sent.
  bool pump(std::size_t pieces_max);

  /// Drops all pieces of an operation and queues a word to the owner; pump() sends it. What is
  /// under way keeps its place in the window until the owner has answered: it counts the bytes,
  /// too.
  void cancel(const Operation& operation, const Status& why);

  /// Pieces of the operation that wait here, to be sent or to be answered.
  std::size_t waiting(const Operation& operation);

  bool connected();       ///< the owner has said welcome
  bool wasConnected();    ///< the same, even if it is gone since or opened anew
  std::string reached();  ///< the reducer that said welcome, "host:pid"
  bool isDown();          ///< it is gone, and this link did not leave it

  /// Says goodbye and closes. `closed()` turns true some time later.
  void close();
  bool closed();

  const std::string& name() const { return config_.name; }
  /// What is said of an owner that said goodbye.
  std::string hasLeft() const {
    return config_.name + " has left the group; make a new group, without it or when it is back";
  }
  std::size_t windowBytes() const { return config_.window_bytes; }
  std::size_t outstandingBytesMax();
  std::uint64_t pushedBytes();
  std::uint64_t pulledBytes();

  /// Of the owner's return: where this link's epochs begin.
  void enterEpoch(std::uint32_t epoch);

 private:
  class Ear;

  /// False for one of an earlier connection.
  bool isCurrent(std::uint64_t generation) const { return generation == generation_; }
  void onFrame(wire::Frame frame, Payload payload);
  void onClosed(std::uint64_t generation, const Status& reason);
  struct SlotHash {
    std::size_t operator()(const wire::SlotId& id) const noexcept {
      return (id.lane * 31 + id.seq) * 1'000'003 + id.chunk;
    }
  };
  struct Awaited {
    std::shared_ptr<Operation> operation;  // null: cancelled
    Piece piece;                           // its payload moved on
    std::size_t cost = 0;
    std::uint64_t key = 0;
    Cursor origin;    // the piece's place; without its operation
    Payload payload;  // where it is to be kept and is not pulled
    Payload sent;     // with checksums: to be sent again if it comes damaged
  };
  struct Queue {  // of one lane
    std::deque<Cursor> cursors;
    std::size_t outstanding_bytes = 0;
    std::size_t outstanding = 0;
    std::map<std::uint64_t, std::size_t> in_flight;  // cost by key, where pieces may move
    std::size_t moved = 0;                           // cursors that are
    std::size_t owed = 0;                            // of those what was begun before the loss
  };

  /// The next cursor of a queue that is not empty.
  std::deque<Cursor>::iterator next(Queue& queue);
  void drop(Queue& queue, std::deque<Cursor>::iterator cursor);
  /// Bytes that are in flight and stand before a piece.
  std::size_t inFlightBefore(const Queue& queue, std::uint64_t key) const;
  /// Everything with a smaller key is answered.
  std::uint64_t acked();
  bool mayGo(const Queue& queue, std::uint64_t key, bool moves) const;
  void keep(Awaited& awaited, const Payload& answer);
  void prune(const wire::Frame& result);
  bool nextPiece(Awaited& awaited, Payload& payload);
  /// Takes an answered piece out, with its place in the window. Called with the lock held.
  bool takeAnswered(const wire::SlotId& slot, Awaited& awaited);
  /// What is wrong with an answer; Ok if nothing is.
  Status check(const Piece& piece, const wire::Frame& result, const Payload& payload) const;
  void forgetIfEmpty(std::uint64_t lane);
  void onResult(const wire::Frame& frame, const Payload& payload);
  /// A result that came damaged is asked for again. False: it has come so too often.
  bool askAgain(const wire::SlotId& slot);
  void onResend(const wire::SlotId& slot);
  /// Asks for a result once more, or says that a push will not come again. With the lock held.
  void queueResend(const wire::SlotId& slot);
  void onError(const wire::Frame& frame);
  std::size_t costOf(const Piece& piece) const;

  const Config config_;
  const std::weak_ptr<LinkEvents> events_;
  std::mutex mutex_;
  std::shared_ptr<transport::Connection> connection_;
  bool opened_ = false;
  std::atomic<std::uint64_t> generation_{0};  // of the connection
  bool welcome_ = false;
  bool ever_welcome_ = false;
  std::string reached_;
  bool closing_ = false;
  transport::Pulse pulse_;
  TimePoint waiting_since_;  // for the welcome
  bool closed_ = false;
  Status down_;                            // why it is closed
  Status fatal_;                           // the owner's last words
  std::map<std::uint64_t, Queue> queues_;  // by operation lane
  std::unordered_map<wire::SlotId, Awaited, SlotHash> awaited_;
  // Go before pieces; a list, which costs nothing while empty.
  std::list<std::pair<wire::Frame, Payload>> told_;
  int damaged_in_row_ = 0;  // results
  std::uint32_t epoch_ = 0;
  bool settles_ = false;           // the owner is still to be told
  std::uint64_t sent_beyond_ = 0;  // a key beyond all that were sent
  std::deque<Kept> kept_;
  bool pumping_ = false;
  bool pump_again_ = false;
  std::size_t outstanding_bytes_ = 0;
  std::size_t outstanding_bytes_max_ = 0;
  std::uint64_t pushed_bytes_ = 0;
  std::uint64_t pulled_bytes_ = 0;
};

}  // namespace reducer::collective
