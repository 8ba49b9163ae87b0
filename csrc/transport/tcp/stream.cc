#include "transport/tcp/stream.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <string>
#include <utility>

#include "common/limits.h"
#include "transport/tcp/core.h"
#include "wire/utf8.h"

namespace reducer::transport::tcp {
namespace {

// A closed stream waits for its peer as long as that takes messages, and then this long. Without a
// connection there is less hope.
constexpr Duration kLinger = std::chrono::seconds(5);
constexpr Duration kLingerUnconnected = std::chrono::seconds(2);

// After so many bytes in a row other connections come first, and after so long, looked at after
// every few frames: tiny ones can be dear.
constexpr std::size_t kTurnBytes = std::size_t{2} << 20;
constexpr Duration kTurn = std::chrono::milliseconds(2);
constexpr int kFramesALook = 16;

/// True if there is room, or an error that the next write will meet.
bool writable(int fd) {
  pollfd polled{fd, POLLOUT, 0};
  return ::poll(&polled, 1, 0) != 0;
}

}  // namespace

Stream::Stream(Core& core, std::string peer, std::shared_ptr<ListenerState> listener,
               std::shared_ptr<net::Guest> guest)
    : core_(core),
      peer_(std::move(peer)),
      listener_(std::move(listener)),
      guest_(std::move(guest)),
      inbox_(core.blocks()) {
  if (guest_) inbox_.limit(kMaxStrangerBytes);
}

// ------------------------------------------------------------------ the beginning

void Stream::accept(net::Fd fd) {
  const auto self = shared_from_this();
  {
    const std::lock_guard lock(mutex_);
    fd_ = std::move(fd);
    established_ = true;
  }
  // Whoever closes the listener sets `closed` and then looks for its streams: here it is the other
  // way round.
  if (!listener_->closed) handler_ = listener_->acceptor(std::make_shared<StreamConnection>(self));
  if (!handler_) abort(Status(Code::kUnavailable, "nobody listens here any more"));
  {
    const std::lock_guard lock(mutex_);
    source_ = core_.loop().add(fd_.get(), self);
  }
  core_.loop().post([self] { self->readOn(); });
}

void Stream::dial(std::shared_ptr<Handler> handler, Duration timeout,
                  TcpTransport::Fallback fallback) {
  handler_ = std::move(handler);
  fallback_ = std::move(fallback);
  timeout_ = timeout;
  started_ = Clock::now();
  turns_ = 0;
  core_.dialer().dial(shared_from_this(), peer_, timeout, net::Dialer::Way::kGreeted);
}

void Stream::onSocket(net::Fd fd) {
  core_.dialer().forget(this);
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    fd_ = std::move(fd);
    for (auto& [frame, payload] : early_) queue_.emplace_back(frame, std::move(payload));
    early_.clear();
    established_ = true;
    source_ = core_.loop().add(fd_.get(), shared_from_this());
    writing_ = true;
  }
  if (goOn()) write();
}

void Stream::onTlsWanted() { endSoon(net::tlsWanted(peer_)); }

void Stream::admit(std::size_t message_bytes) {
  inbox_.limit(message_bytes);
  if (guest_) guest_->leave();
}

void Stream::onExpired(const std::string& last_error) {
  endSoon(net::noAnswer(peer_, timeout_, last_error));
}

void Stream::onStranger(const std::string& why) {
  if (!fallback_) return core_.dialer().retry(this, why);
  if (!core_.dialer().forget(this)) return;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    moved_ = true;
  }
  const Duration left = std::max(started_ + timeout_ - Clock::now(), Duration::zero());
  const std::shared_ptr<Connection> successor = fallback_(handler_, left, why);
  if (!successor) {
    {
      const std::lock_guard lock(mutex_);
      moved_ = false;
    }
    return endSoon(Status(Code::kAborted, "the transport was shut down"));
  }
  succeed(successor);
}

// What was sent so far goes first.
void Stream::succeed(const std::shared_ptr<Connection>& successor) {
  handler_ = nullptr;
  bool closing = false;
  bool flush = false;
  while (true) {
    Early early;
    {
      const std::lock_guard lock(mutex_);
      early.swap(early_);
      if (early.empty()) {
        successor_ = successor;
        over_ = true;
        closing = closing_;
        flush = flush_;
        break;
      }
    }
    for (auto& [frame, payload] : early) successor->send(frame, std::move(payload));
  }
  if (closing) successor->close(reason_, flush);
  core_.forget(shared_from_this());
}

// ------------------------------------------------------------------ sending

void Stream::send(const wire::Frame& frame, Payload payload) {
  if (orphaned() || closing_) return;
  const bool established = established_;
  Outgoing message;  // what is dropped is released after the lock
  if (established) message = Outgoing(frame, std::move(payload));
  std::unique_lock lock(mutex_);
  if (closing_ || mute_) return;
  if (!established) {
    if (const auto successor = successor_) {
      lock.unlock();
      return successor->send(frame, std::move(payload));
    }
    if (!established_) {
      early_.emplace_back(frame, std::move(payload));
      return;
    }
    message = Outgoing(frame, std::move(payload));
  }
  if (writing_) {
    queue_.push_back(std::move(message));
    return;
  }
  writing_ = true;
  outbox_.add(std::move(message));
  lock.unlock();
  write();
}

void Stream::write() {
  const int fd = fd_.get();  // stays: the stream is not over while there is a writer
  do {
    Outbox::Sent sent = outbox_.flush(fd);
    written_ = outbox_.bytesSent();
    if (sent == Outbox::Sent::kBroken) return mute(errno);
    if (sent == Outbox::Sent::kAll) continue;
    // The role is anybody's from here on. If room came before that was known, nobody will be told:
    // so look again.
    stuck_ = true;
    if (!writable(fd) || !stuck_.exchange(false)) return;
  } while (goOn());
}

bool Stream::goOn() {
  bool ended = false;
  {
    const std::lock_guard lock(mutex_);
    if (!queue_.empty()) {
      outbox_.add(std::move(queue_));
      queue_.clear();
    }
    if (!outbox_.empty()) return true;
    if (flush_ && !said_goodbye_) {
      said_goodbye_ = true;
      outbox_.add(Outgoing::goodbye(reason_));
      return true;
    }
    if (said_goodbye_) (void)::shutdown(fd_.get(), SHUT_WR);
    writing_ = false;
    ended = ended_;
  }
  if (ended) pump();
  return false;
}

void Stream::mute(int error) {
  outbox_.clear();
  std::deque<Outgoing> dropped;
  {
    const std::lock_guard lock(mutex_);
    mute_ = true;
    error_ = error;
    dropped.swap(queue_);
    writing_ = false;
    // The peer has to know, whatever the error was. What has come can still be read.
    if (fd_) (void)::shutdown(fd_.get(), SHUT_RDWR);
  }
  dropped.clear();
  hung_ = true;
  pump();
}

// ------------------------------------------------------------------ receiving

void Stream::onEvents(std::uint32_t events) {
  constexpr std::uint32_t kOver = EPOLLHUP | EPOLLERR;
  if ((events & (EPOLLOUT | kOver)) != 0 && stuck_.exchange(false)) write();
  if ((events & (EPOLLRDHUP | kOver)) != 0) hung_ = true;
  if ((events & (EPOLLIN | EPOLLRDHUP | kOver)) != 0) pump();
}

void Stream::pump() {
  if (turns_.fetch_add(1) == 0) readOn();
}

void Stream::readOn() {
  int seen = 0;
  do {
    seen = turns_;
    receive();
    finishIfQuiet();
  } while (!turns_.compare_exchange_strong(seen, 0));
}

void Stream::receive() {
  int fd = -1;
  {
    const std::lock_guard lock(mutex_);
    if (ended_ || over_ || !established_) return;
    fd = fd_.get();
  }
  const TimePoint turn_end = Clock::now() + kTurn;
  std::size_t taken = 0;
  if (std::exchange(cut_short_, false)) deliver(turn_end);
  while (taken < kTurnBytes && !cut_short_) {
    iovec pieces[Inbox::kPiecesMax];
    msghdr header{};
    header.msg_iov = pieces;
    header.msg_iovlen = inbox_.space(pieces);
    std::size_t room = 0;
    for (std::size_t i = 0; i < header.msg_iovlen; ++i) room += pieces[i].iov_len;
    const ssize_t got = ::recvmsg(fd, &header, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
      const std::lock_guard lock(mutex_);
      if (got < 0) error_ = errno;
      break;
    }
    const auto nbytes = static_cast<std::size_t>(got);
    taken += nbytes;
    if (!deaf_) {
      inbox_.received(nbytes);
      deliver(turn_end);
    }
    // Less than there was room for: that was all. What comes now is told by another event.
    if (nbytes < room && !hung_ && !cut_short_) return;
  }
  if (taken < kTurnBytes && !cut_short_) return end(lost());
  core_.loop().post([self = shared_from_this()] { self->pump(); });
}

void Stream::deliver(TimePoint turn_end) {
  deaf_ = true;
  for (int frames = 1; !closing_; ++frames) {
    if (frames % kFramesALook == 0 && Clock::now() > turn_end) {
      deaf_ = false;
      cut_short_ = true;
      return;
    }
    Payload message;
    std::string bad;
    switch (inbox_.next(message, bad)) {
      case Inbox::Next::kMore:
        deaf_ = false;
        return;
      case Inbox::Next::kBad:
        return refuse(bad);
      case Inbox::Next::kGoodbye:
        return onGoodbye(message);
      case Inbox::Next::kFrame:
        break;
    }
    auto decoded = wire::decode(message);
    message = {};
    if (!decoded.ok()) return refuse(decoded.status().message());
    handler_->onFrame(std::move(decoded.value().frame), std::move(decoded.value().payload));
  }
}

void Stream::onGoodbye(const Payload& message) {
  std::string text(message.nbytes(), '\0');
  message.copyTo(reinterpret_cast<std::byte*>(text.data()));
  const int code = static_cast<unsigned char>(text[0]);
  if (code == static_cast<int>(Code::kOk)) return end(Status());
  end(Status(code <= static_cast<int>(Code::kInternal) ? static_cast<Code>(code) : Code::kInternal,
             wire::withoutControls(text.substr(1))));
}

void Stream::refuse(const std::string& why) {
  wire::Frame error;
  error.kind = wire::FrameKind::kError;
  error.fatal = true;
  error.code = Code::kInvalidArgument;
  error.text = peer_ + " sent what cannot be read: " + why;
  send(error, {});
  close(Status(error.code, error.text), /*flush=*/true);
}

Status Stream::lost() {
  const std::lock_guard lock(mutex_);
  return Status(Code::kUnavailable, "the connection to " + peer_ + " was lost" +
                                        (error_ == 0 ? ": it ended without a goodbye, as it does "
                                                       "when a process dies"
                                                     : ": " + net::errorText(error_)));
}

// ------------------------------------------------------------------ closing

void Stream::close(const Status& reason, bool flush) {
  if (orphaned()) return;
  std::shared_ptr<Connection> successor;
  bool at_once = false;
  bool write_now = false;
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
    settled_ = true;
    reason_ = reason;
    flush_ = flush && (established_ || moved_ || !early_.empty());
    successor = successor_;
    if (!moved_) {
      at_once = !flush_ || mute_;
      write_now = !at_once && established_ && !writing_;
      if (write_now) writing_ = true;
    }
  }
  if (successor) return successor->close(reason, flush);
  if (at_once) return endSoon(reason);
  if (write_now && goOn()) write();
  watchLinger();
}

void Stream::abort(const Status& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (over_ || moved_) return;
  }
  endSoon(reason);
}

void Stream::end(const Status& reason) {
  std::deque<Outgoing> dropped;
  Early early;
  {
    const std::lock_guard lock(mutex_);
    if (ended_ || over_ || moved_) return;
    ended_ = true;
    closing_ = true;
    flush_ = false;
    if (!std::exchange(settled_, true)) reason_ = reason;
    dropped.swap(queue_);
    early.swap(early_);
    if (fd_) (void)::shutdown(fd_.get(), SHUT_RDWR);  // whoever writes will notice
  }
}

// From a thread that need not be the loop's.
void Stream::endSoon(const Status& reason) {
  end(reason);
  core_.dialer().forget(this);
  core_.loop().post([self = shared_from_this()] { self->pump(); });
}

void Stream::finishIfQuiet() {
  net::Fd fd;
  Status reason;
  {
    const std::lock_guard lock(mutex_);
    if (!ended_ || over_) return;
    // A writer that is at work will come back here. One that waits for room does so in vain.
    if (writing_ && !stuck_.exchange(false)) return;
    over_ = true;
    reason = reason_;
    fd = std::move(fd_);
  }
  outbox_.clear();
  if (guest_) guest_->leave();
  if (fd) core_.loop().remove(source_, fd.get());
  fd.reset();
  fallback_ = nullptr;
  const auto self = shared_from_this();
  if (const auto handler = std::move(handler_)) handler->onClosed(reason);
  handler_ = nullptr;
  core_.forget(self);
}

void Stream::watchLinger() {
  const Duration wait = established_ ? kLinger : kLingerUnconnected;
  core_.loop().schedule(Clock::now() + wait, [weak = weak_from_this(), progress = written_.load()] {
    if (const auto self = weak.lock()) self->onLinger(progress);
  });
}

void Stream::onLinger(std::uint64_t progress) {
  {
    const std::lock_guard lock(mutex_);
    if (over_ || moved_) return;
  }
  if (established_ && written_ != progress) return watchLinger();
  endSoon(reason_);
}

}  // namespace reducer::transport::tcp
