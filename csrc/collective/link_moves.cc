// Link, where owners are lost and come back: docs/protocol.md.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "collective/link.h"
#include "common/check.h"
#include "common/limits.h"
#include "common/planted.h"
#include "wire/lane.h"

namespace reducer::collective {

void Link::keep(Awaited& awaited, const Payload& answer) {
  if (!config_.losable || !awaited.operation || planted(Planted::kNoKeeping) ||
      wire::operationLane(awaited.piece.frame.slot.lane) != wire::kCollectiveLane) {
    return;
  }
  Kept kept{awaited.key, awaited.piece.frame, answer};
  if (awaited.payload.nbytes() > 0) {
    // The user's memory, which is the user's again when the operation is done.
    const std::size_t nbytes = awaited.payload.nbytes();
    auto copy = std::make_shared<std::vector<std::byte>>(nbytes);
    awaited.payload.copyTo(copy->data());
    kept.payload = Payload(Bytes(copy->data(), nbytes), copy);
  }
  awaited.payload = {};
  kept_.push_back(std::move(kept));
}

void Link::prune(const wire::Frame& result) {
  if (result.epoch < epoch_ && !planted(Planted::kStaleAcks)) return;
  if (epoch_ == 0) {
    while (!kept_.empty() && kept_.front().key < result.acked) kept_.pop_front();
  } else {
    std::erase_if(kept_, [&](const Kept& kept) { return kept.key < result.acked; });
  }
}

Link::Taken Link::takeAway() {
  Taken taken;
  std::shared_ptr<transport::Connection> connection;
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    connection.swap(connection_);
    if (!opened_) closed_ = true;
    for (auto& [slot, awaited] : awaited_) {
      if (!awaited.operation || awaited.operation->finished()) continue;
      REDUCER_CHECK(awaited.origin.end > 0);  // nothing else is pushed to one that can be lost
      awaited.origin.operation = std::move(awaited.operation);
      taken.unanswered.push_back(std::move(awaited.origin));
    }
    for (auto& [lane, queue] : queues_) {
      for (Cursor& cursor : queue.cursors) taken.unanswered.push_back(std::move(cursor));
    }
    for (Kept& kept : kept_) taken.kept.push_back(std::move(kept));
    taken.rest = std::make_shared<std::pair<decltype(awaited_), decltype(told_)>>(
        std::move(awaited_), std::move(told_));
    awaited_.clear();
    queues_.clear();
    kept_.clear();
    told_.clear();
    outstanding_bytes_ = 0;
    settles_ = false;
  }
  // What is still to be sent there is of no use.
  taken.leave = [connection] {
    if (connection) connection->close(Status(Code::kUnavailable, "it was lost"), /*flush=*/false);
  };
  return taken;
}

Status Link::inherit(Heritage heritage, std::uint32_t epoch) {
  const std::lock_guard lock(mutex_);
  const bool nothing = heritage.unanswered.empty() && heritage.kept.empty();
  if ((closed_ && !config_.losable) || closing_) {
    return nothing ? Status() : Status(Code::kUnavailable, hasLeft());
  }
  epoch_ = epoch;
  settles_ = true;
  for (Cursor& cursor : heritage.unanswered) {
    cursor.moved = cursor.owed = true;
    Queue& queue = queues_[cursor.operation->info().lane];
    const std::uint64_t seq = cursor.operation->info().seq;
    const auto place =
        std::find_if(queue.cursors.begin(), queue.cursors.end(),
                     [seq](const Cursor& other) { return other.operation->info().seq > seq; });
    queue.cursors.insert(place, std::move(cursor));
    ++queue.moved;
    ++queue.owed;
  }
  for (Kept& kept : heritage.kept) {
    kept.frame.again = true;
    kept.frame.epoch = epoch;
    kept.frame.acked = 0;
    kept.frame.has_checksum = config_.checksum && kept.payload.nbytes() > 0;
    if (kept.frame.has_checksum) kept.frame.checksum = wire::crc32c(kept.payload);
    told_.emplace_back(kept.frame, kept.payload);
    // (A worker stays; with checksums it may have to be told once more.)
    if (config_.losable || config_.checksum) kept_.push_back(std::move(kept));
  }
  return {};
}

// ------------------------------------------------------------------ damage on the way

void Link::queueResend(const wire::SlotId& slot) {
  wire::Frame frame;
  frame.kind = wire::FrameKind::kResend;
  frame.slot = slot;
  told_.emplace_back(std::move(frame), Payload());
}

bool Link::askAgain(const wire::SlotId& slot) {
  {
    const std::lock_guard lock(mutex_);
    if (++damaged_in_row_ > kDamagedInRowMax || closed_ || closing_) return false;
    queueResend(slot);
  }
  pump(std::numeric_limits<std::size_t>::max());
  return true;
}

void Link::onResend(const wire::SlotId& slot) {
  Awaited cancelled;
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || closing_) return;
    const auto found = awaited_.find(slot);
    if (found != awaited_.end() && found->second.operation) {
      told_.emplace_back(found->second.piece.frame, found->second.sent);
    } else if (found != awaited_.end()) {
      takeAnswered(slot, cancelled);  // the owner never had it, and will say nothing
      queueResend(slot);
    } else {
      // What a lost owner had answered. Where it is not kept any more, all have it.
      const auto kept = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& one) {
        return one.frame.again && one.frame.slot == slot;
      });
      if (kept != kept_.end()) {
        told_.emplace_back(kept->frame, kept->payload);
      } else {
        queueResend(slot);
      }
    }
  }
  pump(std::numeric_limits<std::size_t>::max());
}

void Link::enterEpoch(std::uint32_t epoch) {
  const std::lock_guard lock(mutex_);
  epoch_ = epoch;
  settles_ = true;  // there is nothing to move here
}

bool Link::tell(wire::Frame frame) {
  const std::lock_guard lock(mutex_);
  if (closed_ || closing_) return false;
  told_.emplace_back(std::move(frame), Payload());
  return true;
}

std::uint64_t Link::rearm() {
  const std::lock_guard lock(mutex_);
  REDUCER_CHECK((closing_ || closed_) && !connection_);
  opened_ = true;
  closing_ = closed_ = welcome_ = false;
  down_ = fatal_ = {};
  waiting_since_ = {};
  return ++generation_;
}

}  // namespace reducer::collective
