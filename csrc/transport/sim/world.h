// What lies behind SimNetwork: hosts, the ends of connections, what is on its way, and the queue of
// events.
//
// One mutex guards all of it. No handler, task, tick or destructor of a caller's object runs while
// it is held: what has to be released meanwhile goes to Held::trash.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "transport/sim/nic.h"
#include "transport/sim/random.h"
#include "transport/sim/sim.h"
#include "transport/transport.h"

namespace reducer::transport::sim {

struct Endpoint;

/// A simulated process.
struct Host {
  std::string name;
  bool gone = false;  ///< killed, or its transport was destroyed: nothing of it runs any more
  bool destroyed = false;
  bool paused = false;
  Duration extra{};  ///< of all that is sent to it or from it
  std::uint16_t last_port = 49151;
  std::map<std::uint64_t, std::shared_ptr<Endpoint>> endpoints;    ///< not yet closed, by id
  std::deque<std::shared_ptr<const std::function<void()>>> tasks;  ///< an event each
  std::unique_ptr<Nic> nic;                                        ///< null: no NIC model

  std::uint16_t nextPort() { return last_port = last_port == 65535 ? 49152 : last_port + 1; }
};

struct ListenerState {
  std::shared_ptr<Host> host;
  std::string address;
  std::shared_ptr<const Acceptor> acceptor;
};

struct TimerState {
  std::shared_ptr<Host> host;
  Duration interval{};
  std::shared_ptr<const std::function<void(TimePoint)>> tick;
  bool cancelled = false;
  bool running = false;
  std::thread::id runner;
};

struct Transit {
  TimePoint due;
  Item item;
};

/// One end of a connection. Items wait in `inbound` until they are due, then in `ready` while a
/// call of this endpoint's handler runs (`running`): the thread that runs it takes them all.
struct Endpoint {
  std::uint64_t id = 0;
  std::shared_ptr<Host> host;
  std::string own_address;
  std::string peer_address;
  std::shared_ptr<Handler> handler;
  std::shared_ptr<ListenerState> listener;  ///< of an accepted connection
  std::shared_ptr<Endpoint> peer;           ///< until closed
  std::shared_ptr<Flow> flow;               ///< through the NICs; null: none, or nothing sent yet

  Fifo<Transit> inbound;
  TimePoint last_due;
  Fifo<Item> ready;
  bool running = false;
  std::thread::id runner;

  bool connecting = false;
  Fifo<Message> unsent;  ///< while connecting
  TimePoint deadline;
  Duration timeout{};

  bool closing = false;  ///< the reason is settled, no frame goes in or out any more; onClosed may
                         ///< still be due
  bool closed = false;   ///< onClosed was called or will never be
  Status reason;
};

/// Releases what the mutex's holder let go of, after the mutex.
struct Trash {
  std::vector<Item> items;
  std::vector<std::shared_ptr<const void>> objects;
  void add(Message&& message) { items.push_back({Item::Kind::kMessage, std::move(message), {}}); }
  template <class T>
  void add(std::shared_ptr<T>&& object) {
    if (object) objects.push_back(std::move(object));
  }
  bool empty() const { return items.empty() && objects.empty(); }
  void clear() {
    items.clear();
    objects.clear();
  }
};

class World;

/// The mutex, held.
struct Held {
  explicit Held(World& world);
  Trash trash;  // destroyed after the lock
  std::unique_lock<std::mutex> lock;
  void unlock() {
    lock.unlock();
    trash.clear();
  }
};

class World : public std::enable_shared_from_this<World> {
 public:
  explicit World(SimOptions options);
  ~World();

  void startThreads();
  /// Ends the threads and lets go of everything; all hosts are gone afterwards.
  void stop();

  // For SimNetwork (world.cc).
  std::shared_ptr<Host> addHost(const std::string& name, double bytes_per_second = 0);
  SimHostCounters counters(const std::string& name);
  bool step();
  bool runUntil(const std::function<bool()>& done, Duration limit);
  TimePoint now();
  void kill(const std::string& name);
  void pause(const std::string& name);
  void resume(const std::string& name);
  void sever(const std::string& one, const std::string& other);
  void cut(const std::string& one, const std::string& other);
  void mend(const std::string& one, const std::string& other);
  void name(const std::string& name, const std::string& host);
  void slow(const std::string& name, Duration extra);

  // For the transports (world.cc).
  Result<std::shared_ptr<ListenerState>> listen(const std::shared_ptr<Host>& host,
                                                const std::string& address, Acceptor acceptor);
  void unlisten(const std::shared_ptr<ListenerState>& listener);
  std::shared_ptr<TimerState> every(const std::shared_ptr<Host>& host, Duration interval,
                                    std::function<void(TimePoint)> tick);
  void cancel(TimerState& timer);
  void post(const std::shared_ptr<Host>& host, std::function<void()> task);
  void destroyHost(const std::shared_ptr<Host>& host);

  // Connections (wires.cc).
  std::shared_ptr<Endpoint> connect(const std::shared_ptr<Host>& host, const std::string& address,
                                    std::shared_ptr<Handler> handler, Duration timeout);
  void send(Endpoint& endpoint, Message message);
  void close(const std::shared_ptr<Endpoint>& endpoint, const Status& reason, bool flush);

 private:
  friend struct Held;
  using EndpointList = std::vector<std::shared_ptr<Endpoint>>;

  struct Event {
    enum class Kind { kArrive, kEnd, kAttempt, kTick, kTask, kRelease, kSent, kReach, kReceived };
    TimePoint at;
    std::uint64_t order = 0;  // among events of one time
    Kind kind = Kind::kTask;
    std::shared_ptr<void> subject;  // what the kind is about: an endpoint, timer, host or flow
    template <class T>
    std::shared_ptr<T> of() const {
      return std::static_pointer_cast<T>(subject);
    }
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return a.at != b.at ? a.at > b.at : a.order > b.order;
    }
  };
  /// Calls in progress, so that a destructor can wait for those of its host.
  struct Call {
    const Host* host;
    std::thread::id thread;
  };

  // Events (world.cc).
  TimePoint nowHeld() const;
  void pushEvent(Event::Kind kind, std::shared_ptr<void> subject, TimePoint at);
  /// Does the next event, if any is due until `end`. False if it was void: what it announced is
  /// gone.
  bool stepOnce(TimePoint end, bool& any);
  Event popEvent();
  bool handle(Held& held, const Event& event);
  bool handleTick(Held& held, const std::shared_ptr<TimerState>& timer);
  void runTask(Held& held, Host& host);
  void work();
  /// Runs `call` without the mutex, as a call of `host`.
  template <class F>
  void callOut(Held& held, const Host* host, F&& call);
  void waitForCallsOf(Held& held, const Host* host);
  /// The host of this name that is not gone, or none.
  std::shared_ptr<Host> findHost(const std::string& name) const;
  Duration delay();

  // Connections (wires.cc).
  std::shared_ptr<Endpoint> makeEndpoint(const std::shared_ptr<Host>& host);
  bool isHeld(const Endpoint& endpoint) const;
  bool areApart(const Host& one, const Host& other) const;
  std::string lookUp(const std::string& address) const;
  /// Endpoints of each that have their other end, or had it, at the other.
  EndpointList between(const std::string& one, const std::string& other) const;
  bool arrive(Held& held, const std::shared_ptr<Endpoint>& to, TimePoint at);
  bool attempt(Held& held, const std::shared_ptr<Endpoint>& from);
  void establish(Held& held, const std::shared_ptr<Endpoint>& from,
                 const std::shared_ptr<ListenerState>& listener);
  void transmit(Held& held, Endpoint& from, Message message);
  void tellPeer(Held& held, Endpoint& from, const Status& status, bool flush);
  void settle(Held& held, Endpoint& endpoint, const Status& reason, bool flush);
  void run(Held& held, const std::shared_ptr<Endpoint>& endpoint);
  void accept(Held& held, const std::shared_ptr<Endpoint>& endpoint);
  void deliver(Held& held, const std::shared_ptr<Endpoint>& endpoint, Message message);
  void refuse(const std::shared_ptr<Endpoint>& endpoint, const Status& why);
  void finish(Held& held, const std::shared_ptr<Endpoint>& endpoint);
  void letGo(Held& held, Endpoint& endpoint);
  void discard(Held& held, Endpoint& endpoint);
  void retime(const std::shared_ptr<Endpoint>& to);
  /// Closes and calls onClosed before it returns (but for an endpoint whose handler this very
  /// thread is in).
  void closeNow(Held& held, const EndpointList& endpoints, const Status& reason);
  Payload carry(Message message, std::uint64_t seed) const;

  // NICs (nic.cc).
  std::unique_ptr<Nic> makeNic(double bytes_per_second);
  TimePoint worked(Nic& nic, const Item& item);
  void enterNic(Endpoint& from, Item item);
  void release(const std::shared_ptr<Flow>& flow);
  void reach(const std::shared_ptr<Flow>& flow);
  void takeTurns(const std::shared_ptr<Flow>& flow, Nic::Side side);
  void serveTurns(const std::shared_ptr<Host>& host, Nic::Side side);
  void serve(const std::shared_ptr<Host>& host, const std::shared_ptr<Flow>& flow, Nic::Side side);
  void served(Held& held, const std::shared_ptr<Host>& host, Nic::Side side);
  void leaveNic(Held& held, Flow& flow, std::uint32_t segment);
  static void drop(Held& held, Flow& flow);
  static void clearNic(Held& held, Host& host);

  const SimOptions options_;
  std::mutex mutex_;
  std::condition_variable wake_;  // an event came, or the end
  std::condition_variable idle_;  // a call ended
  Random random_;
  TimePoint virtual_now_;
  std::priority_queue<Event, std::vector<Event>, Later> events_;
  std::uint64_t next_order_ = 0;
  std::uint64_t next_endpoint_ = 0;
  std::map<std::string, std::shared_ptr<Host>> hosts_;
  std::vector<std::shared_ptr<Host>> replaced_;         // gone, and their names are others' now
  std::shared_ptr<Processor> processor_;                // the last that was made
  std::set<std::pair<std::string, std::string>> cuts_;  // by names, in order
  std::map<std::string, std::string> names_;            // of hosts
  std::map<std::string, std::shared_ptr<ListenerState>> listeners_;  // by address
  std::vector<Call> calls_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

/// The handle that callers have; `endpoint` closes when it is dropped.
std::shared_ptr<Connection> makeConnection(std::shared_ptr<World> world,
                                           std::shared_ptr<Endpoint> endpoint);

template <class F>
void World::callOut(Held& held, const Host* host, F&& call) {
  calls_.push_back({host, std::this_thread::get_id()});
  held.unlock();
  std::forward<F>(call)();
  held.lock.lock();
  for (std::size_t i = calls_.size(); i-- > 0;) {
    if (calls_[i].host == host && calls_[i].thread == std::this_thread::get_id()) {
      calls_.erase(calls_.begin() + static_cast<std::ptrdiff_t>(i));
      break;
    }
  }
  idle_.notify_all();
}

}  // namespace reducer::transport::sim
