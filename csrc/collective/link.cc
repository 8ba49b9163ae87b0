#include "collective/link.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "wire/lane.h"

namespace reducer::collective {
namespace {

// Pieces under way per lane, however small: bounds the owner's slots.
constexpr std::size_t kAwaitedMax = 1024;

}  // namespace

Link::Link(Config config, std::weak_ptr<LinkEvents> events)
    : config_(std::move(config)), events_(std::move(events)) {}

void Link::open() {
  {
    const std::lock_guard lock(mutex_);
    if (opened_ || closing_) return;
    opened_ = true;
  }
  std::shared_ptr<transport::Connection> connection = config_.connect(shared_from_this());
  wire::Frame hello;
  hello.kind = wire::FrameKind::kHello;
  hello.hello = config_.hello;
  connection->send(hello, {});
  bool abandoned = false;
  {
    const std::lock_guard lock(mutex_);
    abandoned = closing_;
    connection_ = connection;
  }
  if (abandoned) connection->close(Status(), /*flush=*/false);
}

Status Link::enqueue(Cursor cursor) {
  const std::lock_guard lock(mutex_);
  if (closed_ || closing_) {
    return Status(Code::kUnavailable,
                  down_.ok() ? hasLeft() : config_.name + " is gone: " + down_.message());
  }
  queues_[cursor.operation->info().lane].cursors.push_back(std::move(cursor));
  return {};
}

std::size_t Link::costOf(const Piece& piece) const {
  return config_.in_process ? piece.payload.nbytes() : piece.frame.length;
}

// Takes the next piece that the window lets through out of the queues. Called with the lock held.
bool Link::nextPiece(Awaited& awaited, Payload& payload) {
  for (auto it = queues_.begin(); it != queues_.end(); ++it) {
    Queue& queue = it->second;
    while (!queue.cursors.empty() && queue.cursors.front().operation->finished()) {
      queue.cursors.pop_front();
    }
    if (queue.cursors.empty() || queue.outstanding >= kAwaitedMax) continue;
    Cursor& cursor = queue.cursors.front();
    if (!cursor.operation->ready(cursor)) continue;
    // Making a piece is cheap, and the one that does not fit is made again later.
    Piece piece = cursor.operation->piece(cursor.transfer, cursor.position, cursor.round);
    const std::size_t cost = costOf(piece);
    const std::size_t window = cursor.window_bytes != 0
                                   ? std::min(cursor.window_bytes, config_.window_bytes)
                                   : config_.window_bytes;
    if (queue.outstanding_bytes > 0 && queue.outstanding_bytes + cost > window) continue;
    awaited.operation = cursor.operation;
    awaited.cost = cost;
    if (++cursor.round == cursor.end) queue.cursors.pop_front();
    ++queue.outstanding;
    queue.outstanding_bytes += cost;
    outstanding_bytes_ += cost;
    outstanding_bytes_max_ = std::max(outstanding_bytes_max_, outstanding_bytes_);
    payload = std::move(piece.payload);
    piece.payload = {};
    awaited.piece = std::move(piece);
    return true;
  }
  return false;
}

bool Link::pump(std::size_t pieces_max) {
  {
    const std::lock_guard lock(mutex_);
    if (queues_.empty() && cancels_.empty()) return false;
  }
  open();
  std::unique_lock lock(mutex_);
  if (pumping_) {
    pump_again_ = true;
    return false;
  }
  pumping_ = true;
  std::size_t sent = 0;
  do {
    pump_again_ = false;
    while (!cancels_.empty() && connection_ && !closed_) {
      const wire::Frame frame = std::move(cancels_.front());
      cancels_.pop_front();
      const std::shared_ptr<transport::Connection> connection = connection_;
      lock.unlock();
      connection->send(frame, {});
      lock.lock();
    }
    while (sent < pieces_max && connection_ && !closed_) {
      Awaited awaited;
      Payload payload;
      if (!nextPiece(awaited, payload)) break;
      if (config_.checksum && payload.nbytes() > 0) {
        awaited.piece.frame.has_checksum = true;
        awaited.piece.frame.checksum = wire::crc32c(payload);
      }
      pushed_bytes_ += payload.nbytes();
      const wire::Frame frame = awaited.piece.frame;
      awaited_.emplace(frame.slot, std::move(awaited));
      const std::shared_ptr<transport::Connection> connection = connection_;
      lock.unlock();
      connection->send(frame, std::move(payload));
      ++sent;
      lock.lock();
    }
  } while (pump_again_ && (sent < pieces_max || !cancels_.empty()));
  pumping_ = false;
  return sent > 0;
}

void Link::onFrame(wire::Frame frame, Payload payload) {
  switch (frame.kind) {
    case wire::FrameKind::kResult:
      onResult(frame, payload);
      break;
    case wire::FrameKind::kError:
      onError(frame);
      break;
    case wire::FrameKind::kWelcome: {
      const std::lock_guard lock(mutex_);
      welcome_ = true;
      break;
    }
    case wire::FrameKind::kArrived:
      if (const auto events = events_.lock()) events->onArrived(frame.slot);
      break;
    case wire::FrameKind::kLeft:
      if (const auto events = events_.lock()) events->onLeft(frame.pusher);
      break;
    default:
      break;  // a reducer has nothing else to say
  }
}

bool Link::takeAnswered(const wire::SlotId& slot, Awaited& awaited) {
  const auto found = awaited_.find(slot);
  if (found == awaited_.end()) return false;
  awaited = std::move(found->second);
  awaited_.erase(found);
  const std::uint64_t lane = wire::operationLane(slot.lane);
  Queue& queue = queues_[lane];
  --queue.outstanding;
  queue.outstanding_bytes -= awaited.cost;
  outstanding_bytes_ -= awaited.cost;
  forgetIfEmpty(lane);
  return true;
}

void Link::forgetIfEmpty(std::uint64_t lane) {
  const auto queue = queues_.find(lane);
  if (lane == wire::kCollectiveLane || queue == queues_.end()) return;
  if (queue->second.outstanding == 0 && queue->second.cursors.empty()) queues_.erase(queue);
}

void Link::onResult(const wire::Frame& frame, const Payload& payload) {
  Awaited awaited;
  {
    const std::lock_guard lock(mutex_);
    if (!takeAnswered(frame.slot, awaited)) return;
    pulled_bytes_ += payload.nbytes();
  }
  Status wrong;
  const bool pulls = awaited.piece.out != nullptr;
  if (payload.nbytes() != 0 && payload.nbytes() != awaited.piece.frame.length) {
    wrong = Status(Code::kInternal, config_.name + " answered a chunk of " +
                                        std::to_string(awaited.piece.frame.length) +
                                        " bytes with " + std::to_string(payload.nbytes()));
  } else if (pulls && payload.nbytes() != awaited.piece.frame.length) {
    wrong = Status(Code::kInternal, config_.name + " answered a chunk without its bytes");
  } else if (frame.has_checksum && wire::crc32c(payload) != frame.checksum) {
    wrong =
        Status(Code::kInternal, "a result of " + config_.name +
                                    " arrived with a wrong checksum: memory or network damage it");
  }
  if (!awaited.operation) {
    // Cancelled: only its place in the window was waited for.
  } else if (!wrong.ok()) {
    if (const auto events = events_.lock()) events->onOperationError(frame.slot, wrong);
  } else if (!awaited.operation->finished()) {
    awaited.operation->accept(awaited.piece, payload);
  }
  awaited.operation.reset();
  pump(std::numeric_limits<std::size_t>::max());
}

void Link::onError(const wire::Frame& frame) {
  const Status status(frame.code == Code::kOk ? Code::kInternal : frame.code, frame.text);
  if (frame.fatal) {
    const std::lock_guard lock(mutex_);
    fatal_ = status;  // onClosed follows
    return;
  }
  Awaited awaited;
  {
    const std::lock_guard lock(mutex_);
    takeAnswered(frame.slot, awaited);
  }
  if (const auto events = events_.lock()) events->onOperationError(frame.slot, status);
  awaited.operation.reset();
  pump(std::numeric_limits<std::size_t>::max());
}

void Link::cancel(const Operation& operation, const Status& why) {
  const std::uint64_t lane = operation.info().lane;
  std::vector<std::shared_ptr<Operation>> dropped;  // released outside of the lock
  const std::lock_guard lock(mutex_);
  const auto queue = queues_.find(lane);
  if (queue != queues_.end()) {
    std::erase_if(queue->second.cursors, [&](Cursor& cursor) {
      if (cursor.operation.get() != &operation) return false;
      dropped.push_back(std::move(cursor.operation));
      return true;
    });
  }
  for (auto& [slot, awaited] : awaited_) {
    if (awaited.operation.get() == &operation) dropped.push_back(std::move(awaited.operation));
  }
  forgetIfEmpty(lane);
  if (closed_ || !connection_) return;
  wire::Frame frame;
  frame.kind = wire::FrameKind::kCancel;
  frame.slot.lane = lane;
  frame.slot.seq = operation.info().seq;
  frame.call = operation.info().call;
  frame.code = why.code();
  frame.text = why.message();
  cancels_.push_back(std::move(frame));
}

std::size_t Link::waiting(const Operation& operation) {
  const std::lock_guard lock(mutex_);
  std::size_t pieces = std::count_if(awaited_.begin(), awaited_.end(), [&](const auto& entry) {
    return entry.second.operation.get() == &operation;
  });
  const auto queue = queues_.find(operation.info().lane);
  if (queue == queues_.end()) return pieces;
  for (const Cursor& cursor : queue->second.cursors) {
    if (cursor.operation.get() == &operation) pieces += cursor.end - cursor.round;
  }
  return pieces;
}

bool Link::connected() {
  const std::lock_guard lock(mutex_);
  return welcome_ && !closed_;
}

void Link::close() {
  std::shared_ptr<transport::Connection> connection;
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
    connection = connection_;
    if (!opened_) closed_ = true;
  }
  if (!connection) {
    if (const auto events = events_.lock()) events->onLinkClosed();
    return;
  }
  wire::Frame bye;
  bye.kind = wire::FrameKind::kBye;
  connection->send(bye, {});
  connection->close(Status(), /*flush=*/true);
}

bool Link::closed() {
  const std::lock_guard lock(mutex_);
  return closed_;
}

void Link::onClosed(const Status& reason) {
  Status why = reason;
  std::shared_ptr<transport::Connection> connection;
  bool expected = false;
  {
    const std::lock_guard lock(mutex_);
    if (!fatal_.ok()) why = fatal_;
    down_ = why;
    closed_ = true;
    expected = closing_;
    connection.swap(connection_);
  }
  const auto events = events_.lock();
  if (!events) return;
  if (!expected) events->onLinkDown(config_.owner, why);
  events->onLinkClosed();
}

std::size_t Link::outstandingBytesMax() {
  const std::lock_guard lock(mutex_);
  return outstanding_bytes_max_;
}

std::uint64_t Link::pushedBytes() {
  const std::lock_guard lock(mutex_);
  return pushed_bytes_;
}

std::uint64_t Link::pulledBytes() {
  const std::lock_guard lock(mutex_);
  return pulled_bytes_;
}

}  // namespace reducer::collective
