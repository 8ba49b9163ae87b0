#include "collective/link.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/check.h"
#include "engine/describe.h"
#include "wire/lane.h"

namespace reducer::collective {
namespace {

// Pieces under way per lane, however small: bounds the owner's slots.
constexpr std::size_t kAwaitedMax = 1024;

// After a hello, or, where the owner was there before, after the first attempt to reach it.
constexpr Duration kWelcomeWithin = std::chrono::seconds(10);

// Of an owner that comes back. Less than the leader waits (kReturnWithin), so that it hears why.
constexpr Duration kReachWithin = std::chrono::seconds(8);

}  // namespace

Link::Link(Config config, std::weak_ptr<LinkEvents> events)
    : config_(std::move(config)), events_(std::move(events)) {}

// What a connection tells, with the link's word on whether it still counts.
class Link::Ear final : public transport::Handler {
 public:
  Ear(std::shared_ptr<Link> link, std::uint64_t generation)
      : link_(std::move(link)), generation_(generation) {}
  void onFrame(wire::Frame frame, Payload payload) override {
    if (link_->isCurrent(generation_)) link_->onFrame(std::move(frame), std::move(payload));
  }
  void onClosed(const Status& reason) override { link_->onClosed(generation_, reason); }

 private:
  const std::shared_ptr<Link> link_;
  const std::uint64_t generation_;
};

void Link::open() {
  {
    const std::lock_guard lock(mutex_);
    if (opened_ || closing_) return;
    opened_ = true;
  }
  connect(generation_);
}

void Link::connect(std::uint64_t generation, bool by_name) {
  const Duration timeout =
      generation == 0 ? config_.connect_timeout : std::min(config_.connect_timeout, kReachWithin);
  std::shared_ptr<transport::Connection> connection =
      config_.connect(std::make_shared<Ear>(shared_from_this(), generation), timeout, by_name);
  wire::Frame hello;
  hello.kind = wire::FrameKind::kHello;
  hello.hello = config_.hello;
  connection->send(hello, {});
  bool abandoned = false;
  {
    const std::lock_guard lock(mutex_);
    abandoned = closing_ || closed_ || !isCurrent(generation);
    if (!abandoned) connection_ = connection;
  }
  if (abandoned) connection->close(Status(), /*flush=*/false);
}

void Link::beat(TimePoint now) {
  if (config_.in_process) return;
  const Duration heartbeat = std::chrono::milliseconds(config_.hello.heartbeat_ms);
  std::shared_ptr<transport::Connection> connection;
  auto verdict = transport::Pulse::Verdict::kNothing;
  Status why;
  {
    const std::lock_guard lock(mutex_);
    if (closing_ || closed_ || !connection_) return;
    connection = connection_;
    if (welcome_ && heartbeat > Duration::zero()) {
      verdict = pulse_.feel(now, heartbeat);
      if (verdict == transport::Pulse::Verdict::kSilent) why = transport::Pulse::silence(heartbeat);
    } else if (!welcome_) {
      if (waiting_since_ == TimePoint()) waiting_since_ = now;
      const Duration patience =
          kWelcomeWithin + (generation_ == 0 ? config_.connect_timeout : Duration::zero());
      if (now - waiting_since_ < patience) return;
      verdict = transport::Pulse::Verdict::kSilent;
      why = Status(Code::kUnavailable,
                   "it did not take this rank in within " + engine::seconds(patience));
    }
  }
  if (verdict == transport::Pulse::Verdict::kSilent) {
    connection->close(why, /*flush=*/false);
  } else if (verdict == transport::Pulse::Verdict::kSpeak) {
    wire::Frame frame;
    frame.kind = wire::FrameKind::kBeat;
    connection->send(frame, {});
  }
}

Status Link::enqueue(std::span<std::pair<OwnerIndex, Cursor>> cursors) {
  const std::lock_guard lock(mutex_);
  // For a lost owner pieces wait until it is known where they go.
  if (closing_ || (closed_ && !config_.losable)) {
    return Status(Code::kUnavailable,
                  down_.ok() ? hasLeft() : config_.name + " is gone: " + down_.message());
  }
  for (auto& [owner, cursor] : cursors) {
    Queue& queue = queues_[cursor.operation->info().lane];
    if (cursor.moved) ++queue.moved;
    queue.cursors.push_back(std::move(cursor));
  }
  return {};
}

std::size_t Link::costOf(const Piece& piece) const {
  return config_.in_process ? piece.payload.nbytes() : piece.frame.length;
}

// By operation, and within the one that is next by key, where pieces have moved here.
std::deque<Cursor>::iterator Link::next(Queue& queue) {
  auto best = queue.cursors.begin();
  if (queue.moved == 0) return best;
  const std::uint64_t seq = best->operation->info().seq;
  std::uint64_t least = best->operation->key(*best);
  for (auto it = std::next(best); it != queue.cursors.end(); ++it) {
    if (it->operation->info().seq != seq) break;
    const std::uint64_t key = it->operation->key(*it);
    if (key >= least) continue;
    least = key;
    best = it;
  }
  return best;
}

void Link::drop(Queue& queue, std::deque<Cursor>::iterator cursor) {
  if (cursor->moved) --queue.moved;
  if (cursor->owed) --queue.owed;
  queue.cursors.erase(cursor);
}

bool Link::mayGo(const Queue& queue, std::uint64_t key, bool moves) const {
  if (queue.outstanding < kAwaitedMax) return true;
  if (!moves || epoch_ == 0) return false;
  const auto before = std::distance(queue.in_flight.begin(), queue.in_flight.lower_bound(key));
  return static_cast<std::size_t>(before) < kAwaitedMax;
}

// What stands behind a piece that came late must not keep it waiting: it may itself wait for that
// piece on another rank.
std::size_t Link::inFlightBefore(const Queue& queue, std::uint64_t key) const {
  if (epoch_ == 0) return queue.outstanding_bytes;
  std::size_t nbytes = 0;
  for (const auto& [other, cost] : queue.in_flight) {
    if (other > key) break;
    nbytes += cost;
  }
  return nbytes;
}

std::uint64_t Link::acked() {
  const auto found = queues_.find(wire::kCollectiveLane);
  if (found == queues_.end()) return sent_beyond_;
  Queue& queue = found->second;
  std::uint64_t key = queue.in_flight.empty() ? sent_beyond_ : queue.in_flight.begin()->first;
  if (queue.moved > 0) {
    const auto cursor = next(queue);
    key = std::min(key, cursor->operation->key(*cursor));
  }
  return key;
}

// Takes the next piece that the window lets through out of the queues. Called with the lock held.
bool Link::nextPiece(Awaited& awaited, Payload& payload) {
  for (auto it = queues_.begin(); it != queues_.end(); ++it) {
    Queue& queue = it->second;
    while (!queue.cursors.empty() && queue.cursors.front().operation->finished()) {
      drop(queue, queue.cursors.begin());
    }
    if (queue.cursors.empty()) continue;
    const auto place = next(queue);
    Cursor& cursor = *place;
    const bool moves = config_.failover && it->first == wire::kCollectiveLane;
    const std::uint64_t key = moves ? cursor.operation->key(cursor) : 0;
    if (!mayGo(queue, key, moves) || !cursor.operation->ready(cursor)) continue;
    // Making a piece is cheap, and the one that does not fit is made again later.
    Piece piece = cursor.operation->piece(cursor.transfer, cursor.position, cursor.at());
    const std::size_t cost = costOf(piece);
    const std::size_t window = cursor.window_bytes != 0
                                   ? std::min(cursor.window_bytes, config_.window_bytes)
                                   : config_.window_bytes;
    const std::size_t before = moves ? inFlightBefore(queue, key) : queue.outstanding_bytes;
    if (before > 0 && before + cost > window) continue;
    awaited.operation = cursor.operation;
    awaited.operation->record().started();
    awaited.cost = cost;
    awaited.key = key;
    payload = std::move(piece.payload);
    piece.payload = {};
    if (moves) {
      // Before this piece is counted: it is not answered, and nothing from it on is.
      piece.frame.epoch = epoch_;
      piece.frame.acked = std::min(acked(), key);
      awaited.origin = Cursor{nullptr,     cursor.transfer, cursor.position,
                              cursor.at(), cursor.at() + 1, cursor.window_bytes};
      if (config_.losable && piece.out == nullptr) awaited.payload = payload;
      queue.in_flight.emplace(key, cost);
      sent_beyond_ = std::max(sent_beyond_, key + 1);
    }
    if (++cursor.round == cursor.end) drop(queue, place);
    ++queue.outstanding;
    queue.outstanding_bytes += cost;
    outstanding_bytes_ += cost;
    outstanding_bytes_max_ = std::max(outstanding_bytes_max_, outstanding_bytes_);
    awaited.piece = std::move(piece);
    return true;
  }
  return false;
}

bool Link::pump(std::size_t pieces_max) {
  {
    const std::lock_guard lock(mutex_);
    if (queues_.empty() && told_.empty() && !settles_) return false;
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
    while (!told_.empty() && connection_ && !closed_) {
      auto [frame, payload] = std::move(told_.front());
      told_.pop_front();
      const std::shared_ptr<transport::Connection> connection = connection_;
      lock.unlock();
      connection->send(frame, std::move(payload));
      lock.lock();
    }
    while (sent < pieces_max && connection_ && !closed_) {
      Awaited awaited;
      Payload payload;
      if (!nextPiece(awaited, payload)) break;
      if (config_.checksum && payload.nbytes() > 0) {
        awaited.piece.frame.has_checksum = true;
        awaited.piece.frame.checksum = wire::crc32c(payload);
        awaited.sent = payload;
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
    if (settles_ && told_.empty() && connection_ && !closed_) {
      const auto queue = queues_.find(wire::kCollectiveLane);
      if (queue == queues_.end() || queue->second.owed == 0) {
        settles_ = false;
        wire::Frame frame;
        frame.kind = wire::FrameKind::kSettled;
        frame.epoch = epoch_;
        frame.acked = acked();
        const std::shared_ptr<transport::Connection> connection = connection_;
        lock.unlock();
        connection->send(frame, {});
        lock.lock();
      }
    }
  } while (pump_again_ && (sent < pieces_max || !told_.empty() || settles_));
  pumping_ = false;
  return sent > 0;
}

void Link::onFrame(wire::Frame frame, Payload payload) {
  pulse_.heard();
  switch (frame.kind) {
    case wire::FrameKind::kResult:
      onResult(frame, payload);
      break;
    case wire::FrameKind::kError:
      onError(frame);
      break;
    case wire::FrameKind::kResend:
      onResend(frame.slot);
      break;
    case wire::FrameKind::kWelcome: {
      {
        const std::lock_guard lock(mutex_);
        welcome_ = ever_welcome_ = true;
        reached_ = frame.hello.host;
      }
      if (const auto events = events_.lock()) events->onWelcome(config_.owner);
      break;
    }
    case wire::FrameKind::kArrived:
      if (const auto events = events_.lock()) events->onArrived(frame.slot);
      break;
    case wire::FrameKind::kEpoch:
    case wire::FrameKind::kBack:
    case wire::FrameKind::kHold:
      if (config_.owner != 0) break;  // rank 0's reducer alone keeps the list
      if (const auto events = events_.lock()) events->onNews(frame);
      break;
    case wire::FrameKind::kLate:
      if (const auto events = events_.lock()) events->onLate(frame);
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
  queue.in_flight.erase(awaited.key);
  forgetIfEmpty(lane);
  return true;
}

void Link::forgetIfEmpty(std::uint64_t lane) {
  const auto queue = queues_.find(lane);
  if (lane == wire::kCollectiveLane || queue == queues_.end()) return;
  if (queue->second.outstanding == 0 && queue->second.cursors.empty()) queues_.erase(queue);
}

Status Link::check(const Piece& piece, const wire::Frame& result, const Payload& payload) const {
  if (payload.nbytes() != 0 && payload.nbytes() != piece.frame.length) {
    return Status(Code::kInternal, config_.name + " answered a chunk of " +
                                       std::to_string(piece.frame.length) + " bytes with " +
                                       std::to_string(payload.nbytes()));
  }
  if (piece.out != nullptr && payload.nbytes() != piece.frame.length) {
    return Status(Code::kInternal, config_.name + " answered a chunk without its bytes");
  }
  return {};
}

void Link::onResult(const wire::Frame& frame, const Payload& payload) {
  Status wrong;
  if (frame.has_checksum && wire::crc32c(payload) != frame.checksum) {
    if (askAgain(frame.slot)) return;
    wrong =
        Status(Code::kInternal, "a result of " + config_.name +
                                    " arrived with a wrong checksum: memory or network damage it");
  }
  Awaited awaited;
  {
    const std::lock_guard lock(mutex_);
    if (!takeAnswered(frame.slot, awaited)) return;
    if (wrong.ok()) damaged_in_row_ = 0;
    pulled_bytes_ += payload.nbytes();
    if (Status status = check(awaited.piece, frame, payload); !status.ok()) wrong = status;
    if (wrong.ok()) keep(awaited, payload);
    prune(frame);
  }
  if (!awaited.operation) {
    // Cancelled: only its place in the window was waited for.
  } else if (!wrong.ok()) {
    if (const auto events = events_.lock()) events->onOperationError(frame.slot, wrong, kAllRanks);
  } else if (!awaited.operation->finished()) {
    awaited.operation->record().answered();
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
  if (const auto events = events_.lock()) {
    events->onOperationError(frame.slot, status, frame.pusher);
  }
  awaited.operation.reset();
  pump(std::numeric_limits<std::size_t>::max());
}

void Link::cancel(const Operation& operation, const Status& why) {
  const std::uint64_t lane = operation.info().lane;
  std::vector<std::shared_ptr<Operation>> dropped;  // released outside of the lock
  std::vector<Payload> released;
  const std::lock_guard lock(mutex_);
  const auto queue = queues_.find(lane);
  if (queue != queues_.end()) {
    std::erase_if(queue->second.cursors, [&](Cursor& cursor) {
      if (cursor.operation.get() != &operation) return false;
      if (cursor.moved) --queue->second.moved;
      if (cursor.owed) --queue->second.owed;
      dropped.push_back(std::move(cursor.operation));
      return true;
    });
  }
  for (auto& [slot, awaited] : awaited_) {
    if (awaited.operation.get() != &operation) continue;
    dropped.push_back(std::move(awaited.operation));
    released.push_back(std::move(awaited.payload));
    released.push_back(std::move(awaited.sent));
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
  told_.emplace_back(std::move(frame), Payload());
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

bool Link::wasConnected() {
  const std::lock_guard lock(mutex_);
  return ever_welcome_;
}

std::string Link::reached() {
  const std::lock_guard lock(mutex_);
  return reached_;
}

bool Link::isDown() {
  const std::lock_guard lock(mutex_);
  return closed_ && !closing_;
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

void Link::onClosed(std::uint64_t generation, const Status& reason) {
  Status why = reason;
  std::shared_ptr<transport::Connection> connection;
  bool expected = false;
  {
    const std::lock_guard lock(mutex_);
    if (!isCurrent(generation)) return;
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
