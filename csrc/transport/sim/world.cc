#include "transport/sim/world.h"

#include <algorithm>

#include "common/check.h"
#include "transport/address.h"

namespace reducer::transport::sim {

Held::Held(World& world) : lock(world.mutex_) {}

// Virtual time does not begin at zero, so that a time before the beginning can be expressed.
World::World(SimOptions options)
    : options_(options), random_(options.seed), virtual_now_(std::chrono::hours(1)) {
  REDUCER_CHECK(options.threads >= 0);
  REDUCER_CHECK(options.latency_min >= Duration::zero() &&
                options.latency_max >= options.latency_min);
  REDUCER_CHECK(options.threads == 0 || options.nic.bytes_per_second <= 0);
}

World::~World() { REDUCER_CHECK(threads_.empty()); }

void World::startThreads() {
  for (int i = 0; i < options_.threads; ++i) threads_.emplace_back([this] { work(); });
}

void World::stop() {
  {
    const Held held(*this);
    stopping_ = true;
    wake_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  Held held(*this);
  for (; !events_.empty(); events_.pop()) held.trash.add(std::shared_ptr(events_.top().subject));
  for (const auto& host : replaced_) clearNic(held, *host);
  for (const auto& [name, host] : hosts_) {
    host->gone = true;
    for (const auto& [id, endpoint] : host->endpoints) letGo(held, *endpoint);
    host->endpoints.clear();
    for (auto& task : host->tasks) held.trash.add(std::move(task));
    host->tasks.clear();
    clearNic(held, *host);
  }
  for (auto& [address, listener] : listeners_) held.trash.add(std::move(listener->acceptor));
  listeners_.clear();
}

// ------------------------------------------------------------------ events

TimePoint World::nowHeld() const { return options_.threads > 0 ? Clock::now() : virtual_now_; }

TimePoint World::now() {
  const Held held(*this);
  return nowHeld();
}

Duration World::delay() {
  const Duration spread = options_.latency_max - options_.latency_min;
  return options_.latency_min + Duration(random_.upTo(static_cast<std::uint64_t>(spread.count())));
}

void World::pushEvent(Event::Kind kind, std::shared_ptr<void> subject, TimePoint at) {
  events_.push({at, next_order_++, kind, std::move(subject)});
  wake_.notify_one();
}

World::Event World::popEvent() {
  Event event =
      std::move(const_cast<Event&>(events_.top()));  // its time and order stay as they are
  events_.pop();
  return event;
}

bool World::handle(Held& held, const Event& event) {
  switch (event.kind) {
    case Event::Kind::kArrive:
      return arrive(held, event.of<Endpoint>(), event.at);
    case Event::Kind::kAttempt:
      return attempt(held, event.of<Endpoint>());
    case Event::Kind::kEnd: {
      const auto endpoint = event.of<Endpoint>();
      if (endpoint->closed || endpoint->host->gone) return false;
      endpoint->ready.push_back({Item::Kind::kEnd, {}, endpoint->reason});
      run(held, endpoint);
      return true;
    }
    case Event::Kind::kTick:
      return handleTick(held, event.of<TimerState>());
    case Event::Kind::kTask: {
      const auto host = event.of<Host>();
      if (host->gone || host->tasks.empty()) return false;
      runTask(held, *host);
      return true;
    }
    case Event::Kind::kRelease:
      release(event.of<Flow>());
      return true;
    case Event::Kind::kSent:
      served(held, event.of<Host>(), Nic::kOut);
      return true;
    case Event::Kind::kReach:
      reach(event.of<Flow>());
      return true;
    case Event::Kind::kReceived:
      served(held, event.of<Host>(), Nic::kIn);
      return true;
  }
  return false;
}

bool World::handleTick(Held& held, const std::shared_ptr<TimerState>& timer) {
  if (timer->cancelled || timer->host->gone) return false;
  auto tick = timer->tick;
  const TimePoint now = nowHeld();
  timer->running = true;
  timer->runner = std::this_thread::get_id();
  callOut(held, timer->host.get(), [&] {
    (*tick)(now);
    tick.reset();
  });
  timer->running = false;
  if (timer->cancelled) return true;
  pushEvent(Event::Kind::kTick, timer, nowHeld() + timer->interval);
  return true;
}

void World::runTask(Held& held, Host& host) {
  auto task = std::move(host.tasks.front());
  host.tasks.pop_front();
  callOut(held, &host, [&] {
    (*task)();
    task.reset();
  });
}

bool World::stepOnce(TimePoint end, bool& any) {
  REDUCER_CHECK(options_.threads == 0);
  Held held(*this);
  any = !events_.empty() && events_.top().at <= end;
  if (!any) return false;
  const Event event = popEvent();
  virtual_now_ = std::max(virtual_now_, event.at);
  return handle(held, event);
}

bool World::step() {
  bool any = true;
  while (any) {
    if (stepOnce(TimePoint::max(), any)) return true;
  }
  return false;
}

bool World::runUntil(const std::function<bool()>& done, Duration limit) {
  const TimePoint end = now() + limit;
  bool any = true;
  while (!done()) {
    if (!any) {
      const Held held(*this);
      virtual_now_ = std::max(virtual_now_, end);
      return false;
    }
    while (!stepOnce(end, any) && any) {
    }
  }
  return true;
}

void World::work() {
  Held held(*this);
  while (!stopping_) {
    if (events_.empty()) {
      wake_.wait(held.lock);
      continue;
    }
    const TimePoint at = events_.top().at;
    if (at > Clock::now()) {
      wake_.wait_until(held.lock, at);
      continue;
    }
    const Event event = popEvent();
    // The wake-up for several events may have come to this thread alone; the rest is for another.
    if (!events_.empty()) wake_.notify_one();
    handle(held, event);
    if (!held.trash.empty()) {
      held.unlock();
      held.lock.lock();
    }
  }
}

void World::waitForCallsOf(Held& held, const Host* host) {
  const std::thread::id me = std::this_thread::get_id();
  idle_.wait(held.lock, [&] {
    return std::none_of(calls_.begin(), calls_.end(),
                        [&](const Call& call) { return call.host == host && call.thread != me; });
  });
}

// ------------------------------------------------------------------ hosts

std::shared_ptr<Host> World::findHost(const std::string& name) const {
  const auto found = hosts_.find(name);
  return found == hosts_.end() || found->second->gone ? nullptr : found->second;
}

std::shared_ptr<Host> World::addHost(const std::string& name, double bytes_per_second) {
  const Held held(*this);
  REDUCER_CHECK(findHost(name) == nullptr);  // a name may be used again once its host is gone
  auto host = std::make_shared<Host>();
  host->name = name;
  host->nic = makeNic(bytes_per_second);
  std::shared_ptr<Host>& place = hosts_[name];
  if (place) replaced_.push_back(std::move(place));
  place = host;
  return host;
}

void World::destroyHost(const std::shared_ptr<Host>& host) {
  Held held(*this);
  std::erase_if(listeners_, [&](auto& entry) { return entry.second->host == host; });
  host->gone = true;
  EndpointList endpoints;
  for (const auto& [id, endpoint] : host->endpoints) endpoints.push_back(endpoint);
  closeNow(held, endpoints,
           Status(Code::kAborted, "the transport of " + host->name + " was destroyed"));
  while (!host->tasks.empty()) runTask(held, *host);
  host->destroyed = true;
  waitForCallsOf(held, host.get());
}

void World::kill(const std::string& name) {
  Held held(*this);
  const std::shared_ptr<Host> host = findHost(name);
  REDUCER_CHECK(host != nullptr);
  std::erase_if(listeners_, [&](auto& entry) { return entry.second->host == host; });
  const bool was_paused = std::exchange(host->paused, false);
  host->gone = true;
  for (const auto& [id, endpoint] : host->endpoints) {
    if (was_paused && endpoint->peer) {  // what it sent meanwhile has not left it
      for (Transit& transit : endpoint->peer->inbound) {
        held.trash.items.push_back(std::move(transit.item));
      }
      endpoint->peer->inbound.clear();
    }
    if (endpoint->flow) drop(held, *endpoint->flow);
    tellPeer(held, *endpoint,
             Status(Code::kUnavailable, "lost the connection to " + endpoint->own_address +
                                            ": its process or host went away"),
             /*flush=*/false);
    if (!endpoint->closing) endpoint->reason = Status(Code::kAborted, "the host was killed");
    endpoint->closing = true;
    endpoint->connecting = false;
    discard(held, *endpoint);
    held.trash.add(std::move(endpoint->peer));
    held.trash.add(std::move(endpoint->flow));
  }
  waitForCallsOf(held, host.get());
}

void World::pause(const std::string& name) {
  const Held held(*this);
  const std::shared_ptr<Host> host = findHost(name);
  REDUCER_CHECK(host != nullptr);
  host->paused = true;
}

void World::resume(const std::string& name) {
  const Held held(*this);
  const std::shared_ptr<Host> resumed = findHost(name);
  REDUCER_CHECK(resumed != nullptr);
  resumed->paused = false;
  for (const auto& [host_name, host] : hosts_) {
    for (const auto& [id, endpoint] : host->endpoints) {
      const bool touched = host == resumed || (endpoint->peer && endpoint->peer->host == resumed);
      if (touched && !isHeld(*endpoint)) retime(endpoint);
    }
  }
}

World::EndpointList World::between(const std::string& one, const std::string& other) const {
  EndpointList all;
  for (const auto& [own, others] : {std::pair(one, other), std::pair(other, one)}) {
    const std::shared_ptr<Host> host = findHost(own);
    if (!host) continue;
    for (const auto& [id, endpoint] : host->endpoints) {
      if (endpoint->peer && endpoint->peer->host->name == others) all.push_back(endpoint);
    }
  }
  return all;
}

void World::name(const std::string& name, const std::string& host) {
  const Held held(*this);
  names_[name] = host;
}

std::string World::lookUp(const std::string& address) const {
  const std::string dialled = dialledOf(address);
  const std::size_t colon = dialled.rfind(':');
  const auto found = names_.find(dialled.substr(0, colon));
  return found == names_.end() ? dialled : found->second + dialled.substr(colon);
}

void World::sever(const std::string& one, const std::string& other) {
  EndpointList broken;
  {
    const Held held(*this);
    broken = between(one, other);
  }
  for (const auto& endpoint : broken) {
    close(endpoint, Status(Code::kUnavailable, "connection reset"), /*flush=*/false);
  }
}

void World::cut(const std::string& one, const std::string& other) {
  const Held held(*this);
  cuts_.insert(std::minmax(one, other));
}

void World::mend(const std::string& one, const std::string& other) {
  const Held held(*this);
  cuts_.erase(std::minmax(one, other));
  for (const auto& endpoint : between(one, other)) {
    if (!isHeld(*endpoint)) retime(endpoint);
  }
}

bool World::areApart(const Host& one, const Host& other) const {
  return one.paused || other.paused ||
         (!cuts_.empty() && cuts_.contains(std::minmax(one.name, other.name)));
}

void World::slow(const std::string& name, Duration extra) {
  const Held held(*this);
  if (const std::shared_ptr<Host> host = findHost(name)) host->extra = extra;
}

// ------------------------------------------------------------------ listeners, timers, tasks

Result<std::shared_ptr<ListenerState>> World::listen(const std::shared_ptr<Host>& host,
                                                     const std::string& address,
                                                     Acceptor acceptor) {
  const auto parsed = parseAddress(address);
  const std::string cannot = "cannot listen at '" + address + "': ";
  if (!parsed) return Status(Code::kUnavailable, cannot + "it is not HOST:PORT");
  if (parsed->host != host->name) {
    return Status(Code::kUnavailable, cannot + "this host is " + host->name);
  }
  const Held held(*this);
  if (host->gone) return Status(Code::kUnavailable, cannot + "the host is gone");
  auto listener = std::make_shared<ListenerState>();
  listener->host = host;
  listener->address = address;
  while (parsed->port == 0 &&
         (listener->address == address || listeners_.contains(listener->address))) {
    listener->address = host->name + ":" + std::to_string(host->nextPort());
  }
  if (listeners_.contains(listener->address)) {
    return Status(Code::kUnavailable, cannot + "the port is in use; choose another, or 0 for any");
  }
  listener->acceptor = std::make_shared<const Acceptor>(std::move(acceptor));
  listeners_[listener->address] = listener;
  return listener;
}

void World::unlisten(const std::shared_ptr<ListenerState>& listener) {
  Held held(*this);
  const auto found = listeners_.find(listener->address);
  if (found != listeners_.end() && found->second == listener) listeners_.erase(found);
  EndpointList accepted;
  for (const auto& [id, endpoint] : listener->host->endpoints) {
    if (endpoint->listener == listener) accepted.push_back(endpoint);
  }
  closeNow(held, accepted,
           Status(Code::kAborted, "the listener at " + listener->address + " was closed"));
  held.trash.add(std::move(listener->acceptor));
}

std::shared_ptr<TimerState> World::every(const std::shared_ptr<Host>& host, Duration interval,
                                         std::function<void(TimePoint)> tick) {
  REDUCER_CHECK(interval > Duration::zero());
  auto timer = std::make_shared<TimerState>();
  timer->host = host;
  timer->interval = interval;
  timer->tick = std::make_shared<const std::function<void(TimePoint)>>(std::move(tick));
  const Held held(*this);
  pushEvent(Event::Kind::kTick, timer, nowHeld() + interval);
  return timer;
}

void World::cancel(TimerState& timer) {
  Held held(*this);
  timer.cancelled = true;
  idle_.wait(held.lock,
             [&] { return !timer.running || timer.runner == std::this_thread::get_id(); });
  held.trash.add(std::move(timer.tick));
}

void World::post(const std::shared_ptr<Host>& host, std::function<void()> task) {
  auto shared = std::make_shared<const std::function<void()>>(std::move(task));
  Held held(*this);
  if (host->destroyed || stopping_) {
    held.trash.add(std::move(shared));
    return;
  }
  host->tasks.push_back(std::move(shared));
  pushEvent(Event::Kind::kTask, host, nowHeld());
}

}  // namespace reducer::transport::sim
