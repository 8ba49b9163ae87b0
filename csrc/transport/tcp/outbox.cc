#include "transport/tcp/outbox.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>

#include "common/limits.h"
#include "wire/utf8.h"

namespace reducer::transport::tcp {
namespace {

constexpr std::size_t kPiecesMax = 64;

std::array<std::byte, 8> prefixOf(std::size_t header_nbytes, std::size_t payload_nbytes) {
  std::array<std::byte, 8> prefix;
  const std::size_t sizes[] = {header_nbytes, payload_nbytes};
  for (std::size_t i = 0; i < prefix.size(); ++i) {
    prefix[i] = static_cast<std::byte>(sizes[i / 4] >> (8 * (i % 4)));
  }
  return prefix;
}

/// A list of pieces for sendmsg, without the first `skip` bytes.
struct Gathered {
  void add(const void* data, std::size_t nbytes) {
    if (skip >= nbytes) {
      skip -= nbytes;
      return;
    }
    if (count == kPiecesMax) return;
    // The kernel does not write to what it sends.
    auto* begin = static_cast<std::byte*>(const_cast<void*>(data)) + skip;
    pieces[count++] = {begin, nbytes - skip};
    total += nbytes - skip;
    skip = 0;
  }
  bool full() const { return count == kPiecesMax; }

  iovec pieces[kPiecesMax];
  std::size_t count = 0;
  std::size_t total = 0;
  std::size_t skip = 0;
};

}  // namespace

Outgoing::Outgoing(const wire::Frame& frame, Payload content)
    : header(wire::encodeHeader(frame, content.nbytes())), payload(std::move(content)) {
  prefix = prefixOf(header.size(), payload.nbytes());
}

Outgoing Outgoing::goodbye(const Status& reason) {
  Outgoing message;
  const auto text = std::make_shared<std::string>(1, static_cast<char>(reason.code()));
  *text += wire::toUtf8(reason.message(), kMaxTextBytes);
  message.payload = Payload(std::as_bytes(std::span(*text)), text);
  message.prefix = prefixOf(0, text->size());
  return message;
}

void Outbox::add(std::deque<Outgoing>&& messages) {
  if (messages_.empty()) {
    messages_.swap(messages);
    return;
  }
  std::move(messages.begin(), messages.end(), std::back_inserter(messages_));
  messages.clear();
}

void Outbox::clear() {
  std::deque<Outgoing> dropped;
  dropped.swap(messages_);
  offset_ = 0;
}

Outbox::Sent Outbox::flush(int fd) {
  while (!messages_.empty()) {
    Gathered gathered;
    gathered.skip = offset_;
    for (const Outgoing& message : messages_) {
      gathered.add(message.prefix.data(), message.prefix.size());
      gathered.add(message.header.data(), message.header.size());
      for (const Bytes& piece : message.payload.pieces()) gathered.add(piece.data(), piece.size());
      if (gathered.full()) break;
    }
    msghdr header{};
    header.msg_iov = gathered.pieces;
    header.msg_iovlen = gathered.count;
    const ssize_t sent = ::sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN ? Sent::kBlocked : Sent::kBroken;
    }
    drop(static_cast<std::size_t>(sent));
  }
  return Sent::kAll;
}

void Outbox::drop(std::size_t nbytes) {
  sent_ += nbytes;
  nbytes += offset_;
  while (!messages_.empty()) {
    const Outgoing& first = messages_.front();
    const std::size_t whole = first.prefix.size() + first.header.size() + first.payload.nbytes();
    if (nbytes < whole) break;
    nbytes -= whole;
    const Outgoing done = std::move(messages_.front());
    messages_.pop_front();
    offset_ = 0;
  }
  offset_ = nbytes;
}

}  // namespace reducer::transport::tcp
