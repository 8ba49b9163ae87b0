// What all connections of a transport share: the loop, the dialer, and who is there.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>

#include "transport/net/dialer.h"
#include "transport/net/fork.h"
#include "transport/tcp/factory.h"
#include "transport/tcp/inbox.h"
#include "transport/tcp/loop.h"
#include "transport/tcp/timer.h"

namespace reducer::transport::tcp {

class Stream;

struct ListenerState {
  std::string address;
  Acceptor acceptor;
  std::uint64_t dialer_id = 0;
  std::atomic<bool> closed{false};
};

/// Thread safety: every method, from any thread.
class Core {
 public:
  explicit Core(const TcpOptions& options);
  /// Cancels everything, waits until every onClosed was called, and joins the threads. Not from a
  /// transport thread.
  ~Core();

  bool orphaned() const noexcept { return net::forkGeneration() != generation_; }
  Loop& loop() { return *loop_; }
  std::shared_ptr<Helper> helper() { return loop_; }
  net::Dialer& dialer() { return dialer_; }
  BlockPool& blocks() { return blocks_; }

  Result<std::shared_ptr<ListenerState>> listen(const std::string& address, Acceptor acceptor,
                                                TcpTransport::Http2 http2);
  /// Closes its connections; none of its calls is running afterwards.
  void unlisten(const std::shared_ptr<ListenerState>& listener);
  std::shared_ptr<Stream> connect(const std::string& address, std::shared_ptr<Handler> handler,
                                  Duration timeout, TcpTransport::Fallback fallback);

  /// The stream is over.
  void forget(const std::shared_ptr<Stream>& stream);
  void keep(std::shared_ptr<TimerState> timer);
  void forget(const std::shared_ptr<TimerState>& timer);

 private:
  void take(net::Fd fd, const net::SocketAddress& peer, std::shared_ptr<net::Guest> guest,
            const std::shared_ptr<ListenerState>& listener);

  const std::uint64_t generation_ = net::forkGeneration();
  BlockPool blocks_;
  const std::shared_ptr<Loop> loop_;  // helpers may hold it longer
  net::Dialer dialer_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // no new streams
  std::unordered_set<std::shared_ptr<Stream>> streams_;
  std::unordered_set<std::shared_ptr<TimerState>> timers_;
};

}  // namespace reducer::transport::tcp
