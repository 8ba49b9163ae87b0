// One connection, seen from either end.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "transport/net/dialer.h"
#include "transport/net/fork.h"
#include "transport/tcp/factory.h"
#include "transport/tcp/inbox.h"
#include "transport/tcp/loop.h"
#include "transport/tcp/outbox.h"
#include "transport/transport.h"

namespace reducer::transport::tcp {

class Core;
struct ListenerState;

/// Thread safety: every public method, from any thread.
///
/// There are two roles, each held by one thread at a time. The *writer* owns the outbox: whoever
/// finds nobody writing becomes it, writes until all is sent, and leaves what others have queued
/// meanwhile to itself. When the socket takes no more it goes, and the role waits for the event
/// that says there is room. The *reader* owns the inbox and is the only one who calls the handler.
/// The stream is over when the reader has seen the end and nobody writes. No handler and no
/// payload's release is called with mutex_ held: each may lead back here.
class Stream final : public Source,
                     public net::Caller,
                     public std::enable_shared_from_this<Stream> {
 public:
  /// `listener`: that accepted it, with the `guest` that its peer is at first, or null.
  Stream(Core& core, std::string peer, std::shared_ptr<ListenerState> listener,
         std::shared_ptr<net::Guest> guest);

  /// The end that was connected to. Calls the acceptor.
  void accept(net::Fd fd);
  /// The end that connects.
  void dial(std::shared_ptr<Handler> handler, Duration timeout, TcpTransport::Fallback fallback);

  void send(const wire::Frame& frame, Payload payload);
  void close(const Status& reason, bool flush);
  /// close() without flush, also for a stream that is closing already.
  void abort(const Status& reason);

  /// The peer is a guest no more.
  void admit(std::size_t message_bytes);

  const std::string& peer() const { return peer_; }
  /// The listener that accepted it, or null.
  const ListenerState* listener() const { return listener_.get(); }

  void onEvents(std::uint32_t events) override;

 private:
  using Early = std::deque<std::pair<wire::Frame, Payload>>;

  bool orphaned() const { return net::forkGeneration() != generation_; }

  // The dialer's thread.
  void onSocket(net::Fd fd) override;
  void onStranger(const std::string& why) override;
  void onTlsWanted() override;
  void onExpired(const std::string& last_error) override;
  void succeed(const std::shared_ptr<Connection>& successor);

  /// As the writer, until all is sent or the role waits.
  void write();
  /// The writer has sent all. False: it is the writer no more.
  bool goOn();
  /// Nothing can be sent any more. What has come may still be read.
  void mute(int error);
  /// Becomes the reader, if nobody is; else that one takes another turn.
  void pump();
  void readOn();
  void receive();
  /// Hands what has come to the handler, until the turn is over.
  void deliver(TimePoint turn_end);
  void onGoodbye(const Payload& message);
  void refuse(const std::string& why);
  /// Nothing goes in or out any more. The reader finishes, once nobody writes.
  void end(const Status& reason);
  void endSoon(const Status& reason);
  void finishIfQuiet();
  void watchLinger();
  void onLinger(std::uint64_t progress);
  Status lost();

  Core& core_;  // gone before the stream may be, but not before it is over
  const std::uint64_t generation_ = net::forkGeneration();
  const std::string peer_;
  const std::shared_ptr<ListenerState> listener_;
  const std::shared_ptr<net::Guest> guest_;
  Duration timeout_{};
  TimePoint started_;
  TcpTransport::Fallback fallback_;

  // The reader's.
  std::shared_ptr<Handler> handler_;
  Inbox inbox_;
  bool deaf_ = false;       // what comes is not looked at
  bool cut_short_ = false;  // whole messages may be in the inbox

  std::atomic<int> turns_{1};       // 0: nobody reads. Whoever makes the stream does, at first
  std::atomic<bool> hung_{false};   // an end or an error waits to be read
  std::atomic<bool> stuck_{false};  // the writer's role waits for room
  std::atomic<bool> closing_{
      false};  // no frame goes in or out any more, but what is queued if flush_
  std::atomic<bool> established_{false};
  std::atomic<std::uint64_t> written_{0};  // messages; shows that there is progress

  // The writer's.
  Outbox outbox_;

  std::mutex mutex_;
  net::Fd fd_;  // from established_ to over_
  std::uint64_t source_ = 0;
  std::deque<Outgoing> queue_;
  Early early_;  // until there is a connection
  bool writing_ = false;
  bool mute_ = false;
  int error_ = 0;  // that sending met
  bool flush_ = false;
  bool said_goodbye_ = false;
  bool ended_ = false;
  bool over_ = false;
  bool settled_ = false;  // reason_ is: it was closed from here
  bool moved_ = false;    // the fallback has the handler
  std::shared_ptr<Connection> successor_;
  Status reason_;
};

/// What users hold: the stream closes when the last reference is dropped.
class StreamConnection final : public Connection {
 public:
  explicit StreamConnection(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}
  ~StreamConnection() override { stream_->close(Status(), /*flush=*/true); }
  void send(const wire::Frame& frame, Payload payload) override {
    stream_->send(frame, std::move(payload));
  }
  void close(const Status& reason, bool flush) override { stream_->close(reason, flush); }
  std::string peer() const override { return stream_->peer(); }
  void admit(std::size_t message_bytes) override { stream_->admit(message_bytes); }

 private:
  const std::shared_ptr<Stream> stream_;
};

}  // namespace reducer::transport::tcp
