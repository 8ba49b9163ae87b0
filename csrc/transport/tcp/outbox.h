// Frames that are being written to a socket.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "common/payload.h"
#include "common/status.h"
#include "wire/frame.h"

namespace reducer::transport::tcp {

/// A message on its way out (inbox.h has the layout): the payload's own memory is sent.
struct Outgoing {
  Outgoing() = default;
  Outgoing(const wire::Frame& frame, Payload content);
  /// The last message.
  static Outgoing goodbye(const Status& reason);

  std::array<std::byte, 8> prefix{};
  std::vector<std::byte> header;
  Payload payload;
};

/// Not thread safe: it belongs to whoever writes.
class Outbox {
 public:
  void add(Outgoing message) { messages_.push_back(std::move(message)); }
  void add(std::deque<Outgoing>&& messages);
  bool empty() const { return messages_.empty(); }
  void clear();

  enum class Sent { kAll, kBlocked, kBroken };
  /// Writes until nothing is left or the socket takes no more: one call for as many messages as
  /// fit. Payloads are released as they leave, which may lead back to the connection. kBroken:
  /// errno says why.
  Sent flush(int fd);

  std::uint64_t bytesSent() const { return sent_; }

 private:
  /// The first bytes of the queue have left.
  void drop(std::size_t nbytes);

  std::deque<Outgoing> messages_;
  std::size_t offset_ = 0;  // of the first message: so much has left
  std::uint64_t sent_ = 0;
};

}  // namespace reducer::transport::tcp
