// One collective call of this rank, cut into pieces.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "collective/group.h"
#include "collective/pace.h"
#include "collective/shard_map.h"
#include "common/clock.h"
#include "recorder/recorder.h"
#include "wire/frame.h"

namespace reducer::collective {

/// The number of its operation, then its place in it.
constexpr int kPlaceBits = 28;
constexpr std::uint64_t pieceKey(std::uint64_t seq, std::uint64_t place) {
  return seq << kPlaceBits | place;
}

/// One chunk on its way: what is sent, and where the answer goes.
struct Piece {
  wire::Frame frame;
  Payload payload;
  std::byte* out = nullptr;    ///< null: this rank does not pull
  std::uint32_t transfer = 0;  ///< of its operation, as is the round
  std::uint64_t round = 0;
};

struct Cursor;

/// An operation lives as long as anything of it is under way: pieces to be sent, answers that are
/// awaited, payloads whose bytes have not left. Its end is its destruction: then `done` is called
/// with Ok, unless it failed before.
class Operation : public std::enable_shared_from_this<Operation> {
 public:
  struct Info {
    wire::Call call;
    std::uint64_t lane = 0;
    std::uint64_t seq = 0;
    TimePoint started;
    CallOptions options;
    Done done;
    // For the flight recorder.
    recorder::Recorder* recorder = nullptr;
    std::uint32_t group = 0;
    std::string_view way;
    bool two_levels = false;
  };

  explicit Operation(Info info)
      : info_(std::move(info)),
        record_(info_.recorder, false, [this](recorder::Entry& entry) { describe(entry); }) {}
  virtual ~Operation() {
    if (finished_.exchange(true)) return;
    record_.ended(Status());
    info_.done(Status());
  }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  /// The piece at a cursor's place. Called once for each.
  virtual Piece piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) = 0;

  /// False: the piece cannot be made yet. Those behind it in the lane wait with it, so that every
  /// link sends the pieces of a lane in one order; who makes it ready pumps the link.
  virtual bool ready(const Cursor& /*cursor*/) const { return true; }

  /// Of the piece at a cursor's place. Links send pieces in this order, which all ranks share.
  virtual std::uint64_t key(const Cursor& /*cursor*/) const { return pieceKey(info_.seq, 0); }

  /// The answer for a piece. Its payload has the piece's length if the piece pulls, else none.
  virtual void accept(const Piece& piece, const Payload& result) {
    if (piece.out != nullptr) result.copyTo(piece.out);
  }

  /// Ends the operation with an error, once; later answers are ignored. True if it was not ended
  /// before.
  bool fail(const Status& status) {
    if (finished_.exchange(true)) return false;
    record_.ended(status);
    info_.done(status);
    return true;
  }
  bool finished() const { return finished_; }
  const Info& info() const { return info_; }
  recorder::Record& record() { return record_; }

 protected:
  /// A frame with all that the pieces of this operation have in common.
  wire::Frame frame() const;

 private:
  void describe(recorder::Entry& entry) const;

  Info info_;
  std::atomic<bool> finished_{false};
  recorder::Record record_;
};

/// Part of a collective's bytes, with one set of pushers and of pullers.
struct Transfer {
  Plan plan;
  const ShardMap* map = nullptr;  ///< whose windows bound it; null: the links' own do
  std::shared_ptr<Depth> depth;   ///< rounds under way; null: all
  std::uint64_t lane = 0;
  std::uint32_t first_chunk = 0;
  Rank pusher = kAllRanks;
  Rank puller = kAllRanks;
  const std::byte* in = nullptr;  ///< null: this rank does not push
  std::byte* out = nullptr;       ///< null: this rank does not pull
};

/// What an operation needs of its group. Thread safety: every method, from any thread.
class Links {
 public:
  virtual ~Links() = default;
  /// Sends to these owners what has become ready, in turns.
  virtual void pump(const std::vector<OwnerIndex>& owners) = 0;
  virtual TimePoint now() const = 0;
};

/// The sharded exchange: every collective but the ring is a list of transfers.
class Exchange final : public Operation {
 public:
  Exchange(Info info, std::vector<Transfer> transfers, std::weak_ptr<Links> links);
  Piece piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) override;
  bool ready(const Cursor& cursor) const override;
  std::uint64_t key(const Cursor& cursor) const override;
  void accept(const Piece& piece, const Payload& result) override;
  const std::vector<Transfer>& transfers() const { return transfers_; }

 private:
  const std::vector<Transfer> transfers_;
  const std::weak_ptr<Links> links_;
  std::vector<std::unique_ptr<Pace>> paces_;  // by transfer; null: all of it at once
};

/// Pieces of one operation that one owner has still to get: rounds [round, end) at a position of a
/// plan.
struct Cursor {
  std::shared_ptr<Operation> operation;
  std::uint32_t transfer = 0;
  std::uint32_t position = 0;
  std::uint64_t round = 0;
  std::uint64_t end = 0;
  std::size_t window_bytes = 0;  ///< most bytes in flight in its lane when it goes; 0: the link's
  /// Not all rounds, but these, rising: `round` and `end` count them.
  std::shared_ptr<const std::vector<std::uint64_t>> picked = nullptr;
  bool moved = false;  ///< from an owner that was lost
  bool owed = false;   ///< it was begun before the loss

  std::uint64_t at() const { return picked ? (*picked)[round] : round; }
};

}  // namespace reducer::collective
