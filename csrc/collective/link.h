// This rank's connection to one owner: what waits to be pushed, and what is under way.
#pragma once

#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "collective/operation.h"
#include "common/status.h"
#include "transport/transport.h"
#include "wire/frame.h"

namespace reducer::collective {

/// What a link tells its group. Called without locks held.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  /// The owner failed the operation.
  virtual void onOperationError(const wire::SlotId& slot, const Status& status) = 0;
  /// The owner is gone. Ok: it left in good order.
  virtual void onLinkDown(OwnerIndex owner, const Status& reason) = 0;
  /// A send to this rank waits in its own reducer, and came before any receive.
  virtual void onArrived(const wire::SlotId& slot) = 0;
  /// A rank has left the group in good order; its reducer may go on.
  virtual void onLeft(Rank rank) = 0;
  /// A link's closed() has turned true, whoever closed it.
  virtual void onLinkClosed() = 0;
};

/// Thread safety: every method, from any thread.
class Link final : public transport::Handler, public std::enable_shared_from_this<Link> {
 public:
  struct Config {
    OwnerIndex owner = 0;
    std::string name;              ///< "rank 3 at 10.0.0.4:7000", for messages
    std::size_t window_bytes = 0;  ///< of collectives; send and recv have as much per pair and tag
    bool in_process = false;       ///< pulling costs nothing there: only pushes count
    bool checksum = false;
    wire::Hello hello;
    /// Starts the connection; called at first use.
    std::function<std::shared_ptr<transport::Connection>(std::shared_ptr<transport::Handler>)>
        connect;
  };

  Link(Config config, std::weak_ptr<LinkEvents> events);

  /// Connects and says hello, if that has not been done.
  void open();

  /// Queues; pump() sends. kUnavailable if the owner is gone.
  Status enqueue(Cursor cursor);
  /// Sends what the window lets through, at most `pieces_max` pieces. True if there was anything
  /// sent.
  bool pump(std::size_t pieces_max);

  /// Drops all pieces of an operation and queues a word to the owner; pump() sends it. What is
  /// under way keeps its place in the window until the owner has answered: it counts the bytes,
  /// too.
  void cancel(const Operation& operation, const Status& why);

  /// Pieces of the operation that wait here, to be sent or to be answered.
  std::size_t waiting(const Operation& operation);

  bool connected();  ///< the owner has said welcome

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

  void onFrame(wire::Frame frame, Payload payload) override;
  void onClosed(const Status& reason) override;

 private:
  struct SlotHash {
    std::size_t operator()(const wire::SlotId& id) const noexcept {
      return (id.lane * 31 + id.seq) * 1'000'003 + id.chunk;
    }
  };
  struct Awaited {
    std::shared_ptr<Operation> operation;  // null: cancelled
    Piece piece;                           // its payload moved on
    std::size_t cost = 0;
  };
  struct Queue {  // of one lane
    std::deque<Cursor> cursors;
    std::size_t outstanding_bytes = 0;
    std::size_t outstanding = 0;
  };

  bool nextPiece(Awaited& awaited, Payload& payload);
  /// Takes an answered piece out, with its place in the window. Called with the lock held.
  bool takeAnswered(const wire::SlotId& slot, Awaited& awaited);
  void forgetIfEmpty(std::uint64_t lane);
  void onResult(const wire::Frame& frame, const Payload& payload);
  void onError(const wire::Frame& frame);
  std::size_t costOf(const Piece& piece) const;

  const Config config_;
  const std::weak_ptr<LinkEvents> events_;
  std::mutex mutex_;
  std::shared_ptr<transport::Connection> connection_;
  bool opened_ = false;
  bool welcome_ = false;
  bool closing_ = false;
  bool closed_ = false;
  Status down_;                            // why it is closed
  Status fatal_;                           // the owner's last words
  std::map<std::uint64_t, Queue> queues_;  // by operation lane
  std::unordered_map<wire::SlotId, Awaited, SlotHash> awaited_;
  std::list<wire::Frame> cancels_;  // go before pieces; a list, which costs nothing while empty
  bool pumping_ = false;
  bool pump_again_ = false;
  std::size_t outstanding_bytes_ = 0;
  std::size_t outstanding_bytes_max_ = 0;
  std::uint64_t pushed_bytes_ = 0;
  std::uint64_t pulled_bytes_ = 0;
};

}  // namespace reducer::collective
