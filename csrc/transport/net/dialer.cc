#include "transport/net/dialer.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <string_view>
#include <utility>

#include "transport/net/fork.h"

namespace reducer::transport::net {
namespace {

using std::chrono::milliseconds;

// A reducer that starts a moment after its workers is found soon; one that is absent for long costs
// little.
constexpr Duration kFirstBackoff = milliseconds(20);
constexpr Duration kLastBackoff = milliseconds(500);
constexpr Duration kPatienceMax = std::chrono::hours(24 * 365);  // so that sums do not overflow
// After accept() failed for lack of descriptors or memory.
constexpr auto kAcceptPause = milliseconds(50);
// A connection that has not said by then what it carries is closed: as long as a reducer waits for
// a hello.
constexpr Duration kSpeakWithin = std::chrono::seconds(10);
// Who has not answered the greeting by then is taken for a stranger. A busy host may take long.
constexpr Duration kAnswerWithin = std::chrono::seconds(5);

// The same as kTlsOnly for who speaks HTTP/2 (RFC 2817). gRPC tells its user of an HTTP/1 server
// with this status. (After a GOAWAY it would try again at once, without end.)
constexpr std::string_view kTlsOnlyHttp2 =
    "HTTP/1.1 426 Upgrade Required\r\n"
    "Upgrade: TLS/1.2\r\n"
    "Connection: Upgrade, close\r\n"
    "Content-Length: 0\r\n\r\n";

// So often a connection may be reset before the greeting is answered; then it is a stranger's.
constexpr int kResetsMax = 5;

}  // namespace

Status noAnswer(const std::string& address, Duration timeout, const std::string& last_error) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g s", std::chrono::duration<double>(timeout).count());
  return Status(
      Code::kUnavailable,
      address + " did not answer within " + seconds +
          (last_error.empty() ? "" : " (last error: " + last_error + ")") +
          "; is a reducer (`reducer serve`) or worker running there, and may this host reach it?");
}

Status tlsWanted(const std::string& address) {
  return Status(Code::kInvalidArgument,
                address +
                    " takes connections by TLS only, and this process has none; set "
                    "REDUCER_TLS_CA (and REDUCER_TLS_CERT and REDUCER_TLS_KEY) as there");
}

Dialer::Dialer(std::string congestion_control)
    : congestion_control_(std::move(congestion_control)),
      wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  thread_ = std::thread([this] { work(); });
  pthread_setname_np(thread_.native_handle(), "reducer-dial");
  guests_->onLeft([this] { wake(); });
}

Dialer::~Dialer() { stop(); }

void Dialer::stop() {
  guests_->onLeft(nullptr);
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  accepted_.notify_all();
  wake();
  if (thread_.joinable()) thread_.join();
}

void Dialer::wake() {
  const std::uint64_t one = 1;
  (void)!::write(wake_fd_.get(), &one, sizeof one);
}

std::uint64_t Dialer::startListening(Fd fd, OnAccept on_accept, Hearing hearing) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    id = next_id_++;
    listening_.push_back(
        {id, std::move(fd), std::make_shared<OnAccept>(std::move(on_accept)), hearing});
  }
  wake();
  return id;
}

void Dialer::stopListening(std::uint64_t id) {
  std::unique_lock lock(mutex_);
  std::erase_if(listening_, [id](const Listening& one) { return one.id == id; });
  std::erase_if(arrivals_, [id](const Arrival& one) { return one.listener == id; });
  accepted_.wait(lock, [&] { return accepting_ != id; });
  lock.unlock();
  wake();
}

void Dialer::dial(std::shared_ptr<Caller> caller, const std::string& address, Duration timeout,
                  Way way) {
  Call call;
  call.way = way;
  call.caller = std::move(caller);
  call.address = address;
  call.retry_at = Clock::now();
  call.deadline = call.retry_at + std::min<Duration>(timeout, kPatienceMax);
  call.backoff = kFirstBackoff;
  {
    const std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
  }
  wake();
}

void Dialer::retry(const Caller* caller, const std::string& why) {
  {
    const std::lock_guard lock(mutex_);
    for (Call& call : calls_) {
      if (call.caller.get() == caller) failed(call, why, Clock::now());
    }
  }
  wake();
}

bool Dialer::forget(const Caller* caller) {
  std::vector<Call> forgotten;  // released after the lock
  {
    const std::lock_guard lock(mutex_);
    const auto gone = std::partition(calls_.begin(), calls_.end(),
                                     [&](const Call& call) { return call.caller.get() != caller; });
    std::move(gone, calls_.end(), std::back_inserter(forgotten));
    calls_.erase(gone, calls_.end());
  }
  return !forgotten.empty();
}

void Dialer::failed(Call& call, std::string why, TimePoint now) {
  call.fd.reset();
  if (call.way == Way::kCaller) call.way = Way::kSocket;
  call.last_error = std::move(why);
  call.state = Call::State::kWaiting;
  call.retry_at = now;
  if (!call.candidates.empty()) return;  // the name has another address: at once
  call.retry_at += call.backoff;
  call.backoff = std::min(call.backoff * 2, kLastBackoff);
}

void Dialer::attempt(std::unique_lock<std::mutex>& lock, std::size_t index, TimePoint now) {
  if (calls_[index].way == Way::kCaller) return connected(lock, calls_[index]);
  // The look-up may take long: it runs without the lock, on a copy, and finds its call again by the
  // caller.
  if (calls_[index].candidates.empty()) {
    const std::shared_ptr<Caller> caller = calls_[index].caller;
    const std::string address = calls_[index].address;
    lock.unlock();
    auto resolved = resolve(address);
    lock.lock();
    const auto found = std::find_if(calls_.begin(), calls_.end(),
                                    [&](const Call& call) { return call.caller == caller; });
    if (found == calls_.end()) return;
    if (!resolved.ok()) return failed(*found, resolved.status().message(), now);
    found->candidates = std::move(resolved).value();
    std::reverse(found->candidates.begin(), found->candidates.end());
    index = static_cast<std::size_t>(found - calls_.begin());
  }
  Call& call = calls_[index];
  const SocketAddress target = call.candidates.back();
  call.candidates.pop_back();
  auto started = startConnect(target, congestion_control_);
  if (!started.ok()) return failed(call, started.status().message(), now);
  call.fd = std::move(started).value();
  call.state = Call::State::kConnecting;
}

void Dialer::decided(std::unique_lock<std::mutex>& lock, int fd) {
  const auto call = std::find_if(calls_.begin(), calls_.end(),
                                 [fd](const Call& one) { return one.fd.get() == fd; });
  if (call == calls_.end()) return spoke(lock, fd);
  if (call->state == Call::State::kGreeting) return answered(lock, *call);
  if (std::string error = connectError(fd); !error.empty()) {
    return failed(*call, std::move(error), Clock::now());
  }
  if (call->way != Way::kGreeted) return connected(lock, *call);
  // A new connection's buffer has room for these. The answer comes whole, or the stream has ended.
  if (::send(fd, kGreeting.data(), kGreeting.size(), MSG_NOSIGNAL) != kGreetingBytes) {
    return failed(*call, "the connection broke at once", Clock::now());
  }
  wakeAt(fd, kGreetingBytes);
  call->state = Call::State::kGreeting;
  call->answer_by = Clock::now() + kAnswerWithin;
}

void Dialer::connected(std::unique_lock<std::mutex>& lock, Call& call) {
  call.state = Call::State::kHandedOver;
  call.last_error = "the connection was accepted, but no reducer answered on it";
  Fd socket = std::move(call.fd);
  const std::shared_ptr<Caller> caller = call.caller;
  lock.unlock();
  caller->onSocket(std::move(socket));
  lock.lock();
}

void Dialer::answered(std::unique_lock<std::mutex>& lock, Call& call) {
  char answer[kGreetingBytes];
  const ssize_t nbytes = ::recv(call.fd.get(), answer, sizeof answer, 0);
  if (nbytes < 0 && errno == EAGAIN) return;
  if (nbytes < 0 && ++call.resets < kResetsMax) {
    return failed(call, "it does not speak the tcp transport, or is too busy: " + errorText(errno),
                  Clock::now());
  }
  const std::string_view text(answer, nbytes < 0 ? 0 : static_cast<std::size_t>(nbytes));
  if (text == kAccepted) {
    wakeAt(call.fd.get(), 1);
    return connected(lock, call);
  }
  if (text == kTlsOnly) return tlsWanted(lock, call);
  if (text == kBusy) {
    return failed(call, kCrowded, Clock::now());
  }
  estranged(lock, call,
            text.empty() ? "it closed the connection" : "it answers in another protocol");
}

void Dialer::estranged(std::unique_lock<std::mutex>& lock, Call& call, const std::string& why) {
  call.state = Call::State::kHandedOver;
  call.last_error = "it does not speak the tcp transport: " + why;
  call.fd.reset();
  const std::shared_ptr<Caller> caller = call.caller;
  const std::string text = call.last_error;
  lock.unlock();
  caller->onStranger(text);
  lock.lock();
}

void Dialer::tlsWanted(std::unique_lock<std::mutex>& lock, Call& call) {
  const std::shared_ptr<Caller> caller = call.caller;
  std::erase_if(calls_, [&](const Call& one) { return one.caller == caller; });
  lock.unlock();
  caller->onTlsWanted();
  lock.lock();
}

bool Dialer::expire(std::unique_lock<std::mutex>& lock, TimePoint now) {
  const auto silent = std::find_if(calls_.begin(), calls_.end(), [now](const Call& call) {
    return call.state == Call::State::kGreeting && call.answer_by <= now;
  });
  if (silent != calls_.end()) {
    // Busy, stopped, or behind a long look-up of its own: who speaks something else says so.
    failed(*silent, "it does not answer the greeting", now);
    return true;
  }
  const auto late = std::find_if(calls_.begin(), calls_.end(),
                                 [now](const Call& call) { return call.deadline <= now; });
  if (late == calls_.end()) return false;
  Call call = std::move(*late);
  calls_.erase(late);
  lock.unlock();
  call.caller->onExpired(call.last_error);
  call = {};
  lock.lock();
  return true;
}

void Dialer::acceptAll(std::unique_lock<std::mutex>& lock, std::uint64_t id, int fd) {
  while (!stopping_) {
    const auto one = std::find_if(listening_.begin(), listening_.end(),
                                  [id](const Listening& listening) { return listening.id == id; });
    if (one == listening_.end()) return;
    auto [socket, peer] = acceptFrom(fd);
    if (!socket) {
      const bool out_of_something =
          errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
      if (out_of_something) accepted_.wait_for(lock, kAcceptPause, [this] { return stopping_; });
      return;
    }
    std::shared_ptr<Guest> guest = guests_->enter(toString(peer));
    if (!guest) {
      (void)!::send(socket.get(), kBusy.data(), kBusy.size(), MSG_NOSIGNAL);
      continue;
    }
    wakeAt(socket.get(), kGreetingBytes);
    arrivals_.push_back(
        {std::move(socket), peer, std::move(guest), id, Clock::now() + kSpeakWithin});
  }
}

void Dialer::handOn(std::unique_lock<std::mutex>& lock, const Listening& one, Arrival arrival,
                    Speech speech) {
  const std::shared_ptr<OnAccept> on_accept = one.on_accept;
  if (speech != Speech::kFrames) {
    // gRPC does not tell when it has lost a connection.
    Fd same(fcntl(arrival.fd.get(), F_DUPFD_CLOEXEC, 0));
    if (!same) return;
    closeInChildren(same.get());
    watched_.push_back({std::move(same), arrival.guest});
  }
  accepting_ = one.id;
  lock.unlock();
  (*on_accept)(std::move(arrival.fd), arrival.peer, speech, std::move(arrival.guest));
  lock.lock();
  accepting_ = 0;
  accepted_.notify_all();
}

// The first bytes of an accepted connection, or its end.
void Dialer::spoke(std::unique_lock<std::mutex>& lock, int fd) {
  const auto found = std::find_if(arrivals_.begin(), arrivals_.end(),
                                  [fd](const Arrival& one) { return one.fd.get() == fd; });
  if (found == arrivals_.end()) {
    for (const Watched& one : watched_) {
      if (one.fd.get() == fd) one.guest->leave();
    }
    return;
  }
  char begin[kGreetingBytes];
  const ssize_t nbytes = ::recv(fd, begin, sizeof begin, MSG_PEEK);
  if (nbytes < 0 && errno == EAGAIN) return;
  Arrival arrival = std::move(*found);
  arrivals_.erase(found);
  const auto listening = std::find_if(listening_.begin(), listening_.end(),
                                      [&](const auto& one) { return one.id == arrival.listener; });
  const std::string_view text(begin, nbytes < 0 ? 0 : static_cast<std::size_t>(nbytes));
  if (listening == listening_.end()) return;
  const auto answer = [fd](std::string_view word) {
    (void)!::send(fd, word.data(), word.size(), MSG_NOSIGNAL);
    char read[kGreetingBytes];
    (void)!::recv(fd, read, sizeof read, 0);
  };
  // What has come is read first: a close that leaves some unread makes the kernel drop the answer.
  const auto refuse = [this, fd](std::string_view word) {
    char read[4096];
    for (int i = 0; i < 16 && ::recv(fd, read, sizeof read, MSG_DONTWAIT) > 0; ++i) {
    }
    if (!word.empty()) (void)!::send(fd, word.data(), word.size(), MSG_NOSIGNAL);
    guests_->refuse();
  };
  const Hearing hearing = listening->hearing;
  if (hearing == Hearing::kTls) {
    wakeAt(fd, 1);
    if (text.starts_with(kTlsRecord)) {
      return handOn(lock, *listening, std::move(arrival), Speech::kTls);
    }
    if (text == kGreeting) return refuse(kTlsOnly);
    if (text == kHttp2) return refuse(kTlsOnlyHttp2);
  } else if (text == kHttp2) {
    wakeAt(fd, 1);
    return handOn(lock, *listening, std::move(arrival), Speech::kHttp2);
  } else if (text == kGreeting && hearing == Hearing::kFramesAndHttp2) {
    wakeAt(fd, 1);
    answer(kAccepted);
    return handOn(lock, *listening, std::move(arrival), Speech::kFrames);
  }
  refuse({});
}

Duration Dialer::untilNext(TimePoint now) {
  Duration wait = std::chrono::hours(1);
  for (const Call& call : calls_) {
    wait = std::min(wait, call.deadline - now);
    if (call.state == Call::State::kWaiting) wait = std::min(wait, call.retry_at - now);
    if (call.state == Call::State::kGreeting) wait = std::min(wait, call.answer_by - now);
  }
  for (const Arrival& arrival : arrivals_) wait = std::min(wait, arrival.deadline - now);
  return std::max(wait, Duration::zero());
}

void Dialer::listPolled(std::vector<pollfd>& polled, std::vector<std::uint64_t>& listeners) const {
  polled.assign(1, {wake_fd_.get(), POLLIN, 0});
  listeners.assign(1, 0);
  for (const Listening& one : listening_) {
    polled.push_back({one.fd.get(), POLLIN, 0});
    listeners.push_back(one.id);
  }
  for (const Call& call : calls_) {
    if (call.state == Call::State::kConnecting) polled.push_back({call.fd.get(), POLLOUT, 0});
    if (call.state == Call::State::kGreeting) polled.push_back({call.fd.get(), POLLIN, 0});
  }
  for (const Arrival& arrival : arrivals_) polled.push_back({arrival.fd.get(), POLLIN, 0});
  for (const Watched& one : watched_) polled.push_back({one.fd.get(), POLLRDHUP, 0});
}

void Dialer::work() {
  std::vector<pollfd> polled;
  std::vector<std::uint64_t> listeners;
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const TimePoint now = Clock::now();
    while (expire(lock, now)) {
    }
    const std::size_t late =
        std::erase_if(arrivals_, [now](const Arrival& one) { return one.deadline <= now; });
    for (std::size_t i = 0; i < late; ++i) guests_->refuse();
    std::erase_if(watched_, [](const Watched& one) { return one.guest->hasLeft(); });
    for (std::size_t i = 0; i < calls_.size(); ++i) {
      if (calls_[i].state == Call::State::kWaiting && calls_[i].retry_at <= now)
        attempt(lock, i, now);
    }
    listPolled(polled, listeners);
    const Duration wait = untilNext(Clock::now());
    lock.unlock();
    const auto wait_ms = std::chrono::ceil<milliseconds>(wait).count();
    const int events = ::poll(polled.data(), polled.size(), static_cast<int>(wait_ms));
    lock.lock();
    if (events <= 0) continue;
    if (polled[0].revents != 0) {
      std::uint64_t count = 0;
      (void)!::read(wake_fd_.get(), &count, sizeof count);
    }
    for (std::size_t i = 1; i < polled.size() && !stopping_; ++i) {
      if (polled[i].revents == 0) continue;
      if (i < listeners.size()) {
        acceptAll(lock, listeners[i], polled[i].fd);
      } else {
        decided(lock, polled[i].fd);
      }
    }
  }
}

}  // namespace reducer::transport::net
