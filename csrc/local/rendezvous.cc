#include "local/rendezvous.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <thread>
#include <utility>

namespace reducer::local {
namespace {

constexpr std::uint32_t kMagic = 0x52'44'53'48;  // "RDSH"
constexpr std::uint32_t kVersion = 1;
// Between two attempts to find place 0, which may not have begun to listen yet.
constexpr Duration kKnockPause = std::chrono::milliseconds(2);
// Beside the ranks, let in or turned away at a time.
constexpr std::uint32_t kStrangers = 16;

int sliceMs(const Watch& watch, TimePoint now) {
  const Duration most = std::clamp(watch.deadline() - now, Duration::zero(), kSlice);
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(most).count());
}

bool sameUser(int socket) {
  ucred peer{};
  socklen_t nbytes = sizeof peer;
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &nbytes) == 0 && peer.uid == geteuid();
}

/// The address in the abstract namespace, and its size; 0, with errno, if the name is too long.
socklen_t addressOf(const std::string& name, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  const std::string path = "reducer/" + name;
  if (path.size() + 1 > sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    return 0;
  }
  std::memcpy(address.sun_path + 1, path.data(), path.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
}

bool wouldBlock(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

Status failed(const std::string& what, int error) {
  return Status(Code::kUnavailable, what + ": " + std::strerror(error));
}

}  // namespace

struct Rendezvous::Message {
  std::uint32_t magic = kMagic;
  std::uint32_t version = kVersion;
  enum Kind : std::uint32_t { kHello, kOffer, kAnswer, kMissing, kVerdict };
  Kind kind = kHello;
  std::uint32_t place = 0;
  std::uint32_t size = 0;
  std::uint64_t nbytes = 0;
  std::int32_t code = 0;  // Code
  std::array<char, 480> text{};

  bool valid() const { return magic == kMagic && version == kVersion; }
  Status status() const {
    if (code == 0) return {};
    return Status(static_cast<Code>(code),
                  std::string(text.data(), strnlen(text.data(), text.size())));
  }
  void set(const Status& status) {
    code = static_cast<std::int32_t>(status.code());
    const std::size_t nbytes_text = std::min(status.message().size(), text.size() - 1);
    std::memcpy(text.data(), status.message().data(), nbytes_text);
  }

  /// With a descriptor, if `fd` is one.
  bool sendTo(int socket, int fd = -1) const {
    iovec part{const_cast<Message*>(this), sizeof *this};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (fd >= 0) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* const head = CMSG_FIRSTHDR(&message);
      head->cmsg_level = SOL_SOCKET;
      head->cmsg_type = SCM_RIGHTS;
      head->cmsg_len = CMSG_LEN(sizeof fd);
      std::memcpy(CMSG_DATA(head), &fd, sizeof fd);
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof *this);
  }

  enum class Got { kMessage, kNothing, kEnd };
  Got receiveFrom(int socket, OwnFd* fd = nullptr) {
    iovec part{this, sizeof *this};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t nbytes_got = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (nbytes_got < 0) return wouldBlock(errno) ? Got::kNothing : Got::kEnd;
    for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr;
         head = CMSG_NXTHDR(&message, head)) {
      if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
      int got = -1;
      std::memcpy(&got, CMSG_DATA(head), sizeof got);
      OwnFd owned(got);
      if (fd != nullptr) *fd = std::move(owned);
    }
    if (nbytes_got != static_cast<ssize_t>(sizeof *this) || !valid()) return Got::kEnd;
    return Got::kMessage;
  }
};

Rendezvous::Rendezvous(Config config) : config_(std::move(config)) {
  if (config_.place == 0) listen();
}

void Rendezvous::listen() {
  if (config_.size == 1) return;
  socket_ = OwnFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address;
  const socklen_t nbytes = addressOf(config_.name, address);
  if (!socket_ || nbytes == 0 ||
      bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), nbytes) != 0 ||
      ::listen(socket_.get(), static_cast<int>(config_.size)) != 0) {
    refusal_ = failed("a local socket cannot be opened", errno);
    socket_.reset();
  }
}

void Rendezvous::makeSegment() {
  if (segment_ || !refusal_.ok()) return;
  auto segment = Segment::create(config_.nbytes);
  if (!segment.ok()) {
    refusal_ = segment.status();
    return;
  }
  segment_ = std::move(segment).value();
  if (!segment_->occupy(0)) refusal_ = Status(Code::kUnavailable, "locking shared memory failed");
}

Status Rendezvous::run(Watch& watch) {
  if (decided_) return {};
  if (config_.place == 0) makeSegment();
  if (config_.size == 1) {
    decided_ = true;
  } else if (Status status = config_.place == 0 ? host(watch) : visit(watch); !status.ok()) {
    return status;
  }
  if (!refusal_.ok()) segment_.reset();
  guests_.clear();
  socket_.reset();
  return {};
}

// ------------------------------------------------------------------ place 0

Status Rendezvous::host(Watch& watch) {
  bool slept = false;
  // Nobody can be told: the others find nobody, and say so when their time is over.
  if (!socket_) decided_ = true;
  while (!decided_) {
    const TimePoint now = Clock::now();
    if (Status status = watch.look(now, slept); !status.ok()) return status;
    std::vector<pollfd> polled{{socket_.get(), POLLIN, 0}};
    for (const Guest& guest : guests_) polled.push_back({guest.socket.get(), POLLIN, 0});
    slept = poll(polled.data(), polled.size(), sliceMs(watch, now)) == 0;
    if (!admit()) {  // poll() goes on saying that somebody is at the door
      std::this_thread::sleep_for(kKnockPause);
      slept = true;
    }
    for (Guest& guest : guests_) hear(guest);
    if (slept) tellMissing();
    std::erase_if(guests_, [](const Guest& guest) { return guest.gone && !guest.greeted; });
    conclude();
  }
  return {};
}

/// False: nobody can come in for now. All are then refused, as soon as they can be told.
bool Rendezvous::admit() {
  // Not for ever: strangers could come faster than they are turned away.
  for (std::uint32_t i = 0; i < config_.size + kStrangers; ++i) {
    OwnFd guest(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!guest && (wouldBlock(errno) || errno == ECONNABORTED)) return true;
    if (!guest) {
      if (refusal_.ok()) refusal_ = failed("a rank of this host cannot be let in", errno);
      return false;
    }
    if (!sameUser(guest.get())) continue;
    guests_.emplace_back().socket = std::move(guest);
  }
  return true;
}

void Rendezvous::hear(Guest& guest) {
  Message message;
  while (!guest.gone) {
    const Message::Got got = message.receiveFrom(guest.socket.get());
    if (got == Message::Got::kNothing) return;
    if (got == Message::Got::kEnd || message.size != config_.size || message.place == 0 ||
        message.place >= config_.size) {
      guest.gone = true;
      guest.socket.reset();
      return;
    }
    if (guest.greeted) {
      guest.answered = message.kind == Message::kAnswer;
      if (refusal_.ok() && message.code != 0) refusal_ = message.status();
      continue;
    }
    guest.greeted = true;
    guest.place = message.place;
    Message offer;
    offer.kind = Message::kOffer;
    offer.nbytes = config_.nbytes;
    offer.set(refusal_);
    if (!offer.sendTo(guest.socket.get(), segment_ ? segment_->fd() : -1)) guest.gone = true;
  }
}

/// When everybody has answered, or gone: a guest that is gone is a rank that died or closed its
/// group, about which the network's side of the group knows more.
void Rendezvous::conclude() {
  std::size_t answers = 0;
  for (const Guest& guest : guests_) answers += guest.answered || guest.gone ? 1 : 0;
  if (answers + 1 < config_.size) return;
  for (const Guest& guest : guests_) {
    if (guest.gone && refusal_.ok()) {
      refusal_ = Status(Code::kUnavailable, "a rank of this host left while it was set up");
    }
  }
  Message verdict;
  verdict.kind = Message::kVerdict;
  verdict.set(refusal_);
  for (const Guest& guest : guests_) verdict.sendTo(guest.socket.get());
  decided_ = true;
}

/// The others cannot see each other: when nothing has come for a while they are told who is missing
/// (the first of them, if they are many), for their errors.
void Rendezvous::tellMissing() {
  std::vector<std::uint32_t> places = missing();
  if (places == told_missing_) return;
  Message note;
  note.kind = Message::kMissing;
  note.size = static_cast<std::uint32_t>(std::min(places.size(), note.text.size() / 4));
  if (note.size > 0) std::memcpy(note.text.data(), places.data(), note.size * sizeof places[0]);
  for (const Guest& guest : guests_) {
    if (guest.greeted && !guest.gone) note.sendTo(guest.socket.get());
  }
  told_missing_ = std::move(places);
}

std::vector<std::uint32_t> Rendezvous::missing() const {
  std::vector<std::uint32_t> places;
  if (decided_) return places;
  if (config_.place != 0) {
    if (!socket_) places.push_back(0);
    return socket_ ? told_missing_ : places;
  }
  for (std::uint32_t place = 1; place < config_.size; ++place) {
    const bool here = std::any_of(guests_.begin(), guests_.end(), [place](const Guest& guest) {
      return guest.greeted && guest.place == place;
    });
    if (!here) places.push_back(place);
  }
  return places;
}

std::string Rendezvous::trouble() const { return refusal_.ok() ? trouble_ : refusal_.message(); }

// ------------------------------------------------------------------ the others

bool Rendezvous::knock() {
  trouble_.clear();
  OwnFd door(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address;
  const socklen_t nbytes = door ? addressOf(config_.name, address) : 0;
  if (nbytes == 0 ||
      connect(door.get(), reinterpret_cast<const sockaddr*>(&address), nbytes) != 0) {
    // That place 0 is not there yet, or busy, is no more than waiting says.
    if (!wouldBlock(errno) && errno != ECONNREFUSED && errno != ENOENT) {
      trouble_ = std::string("a local socket cannot be connected: ") + std::strerror(errno);
    }
    return false;
  }
  if (!sameUser(door.get())) {
    trouble_ = "a process of another user has taken the local socket's name";
    return false;
  }
  Message hello;
  hello.place = config_.place;
  hello.size = config_.size;
  if (!hello.sendTo(door.get())) return false;
  socket_ = std::move(door);
  return true;
}

Status Rendezvous::visit(Watch& watch) {
  bool slept = false;
  while (!decided_) {
    if (socket_ && hearHost()) continue;  // first what has been said: it may be the verdict
    const TimePoint now = Clock::now();
    if (Status status = watch.look(now, slept); !status.ok()) return status;
    if (!socket_ && !knock()) {
      std::this_thread::sleep_for(std::min(kKnockPause, watch.deadline() - now));
      slept = true;
      continue;
    }
    pollfd polled{socket_.get(), POLLIN, 0};
    slept = poll(&polled, 1, sliceMs(watch, now)) == 0;
  }
  return {};
}

/// False: nothing was said.
bool Rendezvous::hearHost() {
  Message message;
  OwnFd fd;
  const Message::Got got = message.receiveFrom(socket_.get(), &fd);
  if (got == Message::Got::kNothing) return false;
  if (got == Message::Got::kEnd) {
    refusal_ =
        Status(Code::kUnavailable, "the rank of this host that makes it left while it was set up");
    decided_ = true;
  } else if (message.kind == Message::kMissing) {
    told_missing_.resize(std::min<std::size_t>(message.size, message.text.size() / 4));
    if (!told_missing_.empty()) {
      std::memcpy(told_missing_.data(), message.text.data(), told_missing_.size() * 4);
    }
    std::erase_if(told_missing_, [this](std::uint32_t place) { return place >= config_.size; });
  } else if (message.kind == Message::kVerdict) {
    refusal_ = message.status();
    decided_ = true;
  } else if (message.kind == Message::kOffer) {
    take(message, std::move(fd));
  }
  return true;
}

void Rendezvous::take(const Message& offer, OwnFd fd) {
  Message answer;
  answer.kind = Message::kAnswer;
  answer.place = config_.place;
  answer.size = config_.size;
  Status status = offer.status();
  if (status.ok() && offer.nbytes != config_.nbytes) {
    status =
        Status(Code::kMismatch,
               "the ranks of this host were set up with different REDUCER_CHUNK_BYTES: place "
               "0 shares " +
                   std::to_string(offer.nbytes) + " bytes, place " + std::to_string(config_.place) +
                   " expects " + std::to_string(config_.nbytes));
  }
  if (status.ok()) {
    auto segment =
        fd ? Segment::open(fd.get(), offer.nbytes)
           : Result<std::unique_ptr<Segment>>(Status(
                 Code::kResourceExhausted,
                 "place " + std::to_string(config_.place) +
                     " did not get the descriptor of shared memory (are too many files open?)"));
    status = segment.ok() ? Status() : segment.status();
    if (status.ok()) {
      segment_ = std::move(segment).value();
      if (!segment_->occupy(config_.place)) {
        status = Status(Code::kUnavailable, "locking shared memory failed");
      }
    }
  }
  answer.set(status);
  answer.sendTo(socket_.get());
}

}  // namespace reducer::local
