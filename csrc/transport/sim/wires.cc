// Connections of the simulated network: how they come about, carry frames, and end.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "transport/address.h"
#include "transport/sim/world.h"
#include "wire/frame.h"

namespace reducer::transport::sim {
namespace {

constexpr Duration kRetryInterval = std::chrono::milliseconds(20);

std::string inSeconds(Duration duration) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", std::chrono::duration<double>(duration).count());
  return text;
}

/// How the other end learns of the reason for which this one closed.
Status asSeenByPeer(const Endpoint& endpoint) {
  if (endpoint.reason.ok()) return {};
  return Status(Code::kUnavailable,
                endpoint.own_address + " closed the connection: " + endpoint.reason.message());
}

}  // namespace

// ------------------------------------------------------------------ connecting

std::shared_ptr<Endpoint> World::makeEndpoint(const std::shared_ptr<Host>& host) {
  auto endpoint = std::make_shared<Endpoint>();
  endpoint->id = next_endpoint_++;
  endpoint->host = host;
  host->endpoints[endpoint->id] = endpoint;
  return endpoint;
}

std::shared_ptr<Endpoint> World::connect(const std::shared_ptr<Host>& host,
                                         const std::string& address,
                                         std::shared_ptr<Handler> handler, Duration timeout) {
  Held held(*this);
  auto endpoint = makeEndpoint(host);
  endpoint->own_address = host->name + ":" + std::to_string(host->nextPort());
  endpoint->peer_address = address;
  if (host->gone) {
    host->endpoints.erase(endpoint->id);
    letGo(held, *endpoint);
    held.trash.add(std::move(handler));
    return endpoint;
  }
  endpoint->handler = std::move(handler);
  endpoint->timeout = timeout;
  endpoint->deadline = nowHeld() + timeout;
  endpoint->last_due = nowHeld();
  if (!parseAddress(address)) {
    endpoint->closing = true;
    endpoint->reason = Status(Code::kInvalidArgument, "'" + address + "' is not HOST:PORT");
    pushEvent(Event::Kind::kEnd, endpoint, nowHeld());
    return endpoint;
  }
  endpoint->connecting = true;
  pushEvent(Event::Kind::kAttempt, endpoint, std::min(nowHeld() + delay(), endpoint->deadline));
  return endpoint;
}

bool World::attempt(Held& held, const std::shared_ptr<Endpoint>& from) {
  if (!from->connecting || from->closed || from->host->gone) return false;
  const auto found = listeners_.find(lookUp(from->peer_address));
  if (found != listeners_.end() && !areApart(*found->second->host, *from->host)) {
    establish(held, from, found->second);
    return true;
  }
  const TimePoint now = nowHeld();
  if (now < from->deadline) {
    pushEvent(Event::Kind::kAttempt, from, std::min(now + kRetryInterval, from->deadline));
    return false;
  }
  // Also where close() was waiting to flush: what was queued has not been sent.
  from->closing = true;
  from->reason = Status(Code::kUnavailable,
                        from->peer_address + " did not answer within " + inSeconds(from->timeout) +
                            "; is the process there running, and is the address right?");
  from->ready.push_back({Item::Kind::kEnd, {}, {}});
  run(held, from);
  return true;
}

void World::establish(Held& held, const std::shared_ptr<Endpoint>& from,
                      const std::shared_ptr<ListenerState>& listener) {
  auto to = makeEndpoint(listener->host);
  to->own_address = from->peer_address;
  to->peer_address = from->own_address;
  to->listener = listener;
  to->last_due = nowHeld();
  to->peer = from;
  from->peer = to;
  from->connecting = false;
  for (Message& message : from->unsent) transmit(held, *from, std::move(message));
  from->unsent.clear();
  if (from->closing) {
    tellPeer(held, *from, asSeenByPeer(*from), /*flush=*/true);
    pushEvent(Event::Kind::kEnd, from, to->last_due);
  }
  to->ready.push_back({Item::Kind::kAccept, {}, {}});
  run(held, to);
}

// ------------------------------------------------------------------ sending and closing

void World::send(Endpoint& endpoint, Message message) {
  Held held(*this);
  if (endpoint.closing || endpoint.closed) {
    held.trash.add(std::move(message));
  } else if (endpoint.connecting) {
    endpoint.unsent.push_back(std::move(message));
  } else {
    transmit(held, endpoint, std::move(message));
  }
}

void World::transmit(Held& held, Endpoint& from, Message message) {
  const std::shared_ptr<Endpoint>& to = from.peer;
  if (!to || to->closed || to->host->gone) {
    held.trash.add(std::move(message));
    return;
  }
  if (from.host->nic) {
    enterNic(from, {Item::Kind::kMessage, std::move(message), {}});
    return;
  }
  to->last_due = std::max(to->last_due, nowHeld() + delay() + from.host->extra + to->host->extra);
  to->inbound.push_back({to->last_due, {Item::Kind::kMessage, std::move(message), {}}});
  pushEvent(Event::Kind::kArrive, to, to->last_due);
}

/// The other end learns of the end after all that was sent, or, without flush, ahead of part of it.
void World::tellPeer(Held& held, Endpoint& from, const Status& status, bool flush) {
  const std::shared_ptr<Endpoint>& to = from.peer;
  if (!to || to->closed || to->host->gone) return;
  if (from.flow && flush && !from.flow->parcels.empty()) {
    enterNic(from, {Item::Kind::kEnd, {}, status});
    return;
  }
  if (from.flow && !flush) drop(held, *from.flow);
  TimePoint when = nowHeld() + delay();
  if (flush) when = std::max(when, to->last_due);
  while (!to->inbound.empty() && to->inbound.back().due > when) {
    held.trash.items.push_back(std::move(to->inbound.back().item));
    to->inbound.pop_back();
  }
  to->last_due = when;
  to->inbound.push_back({when, {Item::Kind::kEnd, {}, status}});
  pushEvent(Event::Kind::kArrive, to, when);
}

void World::close(const std::shared_ptr<Endpoint>& endpoint, const Status& reason, bool flush) {
  Held held(*this);
  if (endpoint->closing || endpoint->closed) return;
  if (endpoint->connecting && flush && !endpoint->unsent.empty()) {
    endpoint->closing = true;
    endpoint->reason = reason;
    return;  // establish() or attempt() goes on
  }
  TimePoint when = nowHeld();
  if (flush && endpoint->peer) when = std::max(when, endpoint->peer->last_due);
  settle(held, *endpoint, reason, flush);
  pushEvent(Event::Kind::kEnd, endpoint, when);
}

/// Nothing goes in or out any more, and the other end will be told; onClosed is still to come.
void World::settle(Held& held, Endpoint& endpoint, const Status& reason, bool flush) {
  if (endpoint.closing) return;
  endpoint.closing = true;
  endpoint.reason = reason;
  endpoint.connecting = false;
  for (Message& message : endpoint.unsent) held.trash.add(std::move(message));
  endpoint.unsent.clear();
  tellPeer(held, endpoint, asSeenByPeer(endpoint), flush);
}

void World::closeNow(Held& held, const EndpointList& endpoints, const Status& reason) {
  for (const auto& endpoint : endpoints) {
    if (!endpoint->closed) settle(held, *endpoint, reason, /*flush=*/false);
  }
  for (const auto& endpoint : endpoints) {
    const bool mine = endpoint->running && endpoint->runner == std::this_thread::get_id();
    if (!mine) idle_.wait(held.lock, [&] { return !endpoint->running; });
    if (endpoint->closed) continue;
    endpoint->ready.push_back({Item::Kind::kEnd, {}, {}});
    run(held, endpoint);
  }
}

// ------------------------------------------------------------------ arriving

bool World::isHeld(const Endpoint& endpoint) const {
  return endpoint.host->paused || (endpoint.peer && areApart(*endpoint.host, *endpoint.peer->host));
}

bool World::arrive(Held& held, const std::shared_ptr<Endpoint>& to, TimePoint at) {
  // Events outlive what they announced: a cut, a pause or an end may have come between.
  if (to->closed || to->inbound.empty() || to->inbound.front().due > at || isHeld(*to))
    return false;
  to->ready.push_back(to->inbound.pop_front().item);
  run(held, to);
  return true;
}

/// After a pause: what has waited sets out now.
void World::retime(const std::shared_ptr<Endpoint>& to) {
  TimePoint due = nowHeld();
  for (Transit& transit : to->inbound) {
    due = std::max({due, transit.due, nowHeld() + delay()});
    transit.due = due;
    pushEvent(Event::Kind::kArrive, to, due);
  }
  to->last_due = std::max(to->last_due, due);
}

/// Works off what is ready, unless a thread is at it (perhaps this one, further up).
void World::run(Held& held, const std::shared_ptr<Endpoint>& endpoint) {
  if (endpoint->running) return;
  endpoint->running = true;
  endpoint->runner = std::this_thread::get_id();
  while (!endpoint->ready.empty()) {
    Item item = endpoint->ready.pop_front();
    if (endpoint->closed) {
      held.trash.items.push_back(std::move(item));
    } else if (item.kind == Item::Kind::kEnd) {
      if (!endpoint->closing) endpoint->reason = std::move(item.end);
      finish(held, endpoint);
    } else if (endpoint->closing) {
      held.trash.items.push_back(std::move(item));
    } else if (item.kind == Item::Kind::kAccept) {
      accept(held, endpoint);
    } else {
      deliver(held, endpoint, std::move(item.message));
    }
  }
  endpoint->running = false;
  idle_.notify_all();
}

void World::accept(Held& held, const std::shared_ptr<Endpoint>& endpoint) {
  std::shared_ptr<const Acceptor> acceptor = endpoint->listener->acceptor;
  std::shared_ptr<Handler> handler;
  callOut(held, endpoint->host.get(), [&] {
    handler = (*acceptor)(makeConnection(shared_from_this(), endpoint));
    acceptor.reset();
  });
  if (endpoint->closed) {
    held.trash.add(std::move(handler));
  } else if (handler) {
    endpoint->handler = std::move(handler);
  } else {
    settle(held, *endpoint, Status(Code::kUnavailable, "the connection was not accepted"),
           /*flush=*/false);
    endpoint->ready.push_back({Item::Kind::kEnd, {}, {}});
  }
}

void World::deliver(Held& held, const std::shared_ptr<Endpoint>& endpoint, Message message) {
  const std::uint64_t seed = random_.next();
  std::shared_ptr<Handler> handler = endpoint->handler;
  callOut(held, endpoint->host.get(), [&] {
    const Payload arrived = carry(std::exchange(message, {}), seed);
    auto decoded = wire::decode(arrived);
    if (decoded.ok()) {
      wire::Decoded whole = std::move(decoded).value();
      handler->onFrame(std::move(whole.frame), std::move(whole.payload));
    } else {
      refuse(endpoint, decoded.status());
    }
    handler.reset();
  });
}

void World::refuse(const std::shared_ptr<Endpoint>& endpoint, const Status& why) {
  wire::Frame error;
  error.kind = wire::FrameKind::kError;
  error.fatal = true;
  error.code = why.code();
  error.text = endpoint->peer_address + " sent to " + endpoint->own_address +
               " what cannot be read: " + why.message();
  send(*endpoint, {wire::encodeHeader(error, 0), {}});
  close(endpoint, Status(why.code(), error.text), /*flush=*/true);
}

/// Copies a message into fresh memory, as a network does, in pieces and at alignments that the seed
/// gives; the sender's memory is free afterwards. Without copies: what was sent.
Payload World::carry(Message message, std::uint64_t seed) const {
  const std::size_t total = message.header.size() + message.payload.nbytes();
  if (total == 0) return {};
  if (!options_.copies) {
    const auto whole = std::make_shared<const Message>(std::move(message));
    std::vector<Bytes> parts;
    parts.reserve(1 + whole->payload.pieces().size());
    if (!whole->header.empty()) parts.emplace_back(whole->header);
    parts.insert(parts.end(), whole->payload.pieces().begin(), whole->payload.pieces().end());
    return Payload(std::move(parts), whole);
  }
  Random random(seed);
  struct Place {
    std::size_t offset;
    std::size_t nbytes;
  };
  std::vector<Place> places;
  std::size_t room = 0;
  for (std::size_t left = total; left > 0; left -= places.back().nbytes) {
    const std::size_t max = options_.piece_bytes_max;
    const std::size_t nbytes =
        max == 0 ? left : std::min<std::size_t>(left, 1 + random.upTo(max - 1));
    if (max != 0) room += random.upTo(15);
    places.push_back({room, nbytes});
    room += nbytes;
  }
  const std::shared_ptr<std::byte[]> memory(new std::byte[room]);
  std::size_t place = 0;
  std::size_t filled = 0;
  const auto put = [&](Bytes bytes) {
    while (!bytes.empty()) {
      const std::size_t part = std::min(bytes.size(), places[place].nbytes - filled);
      std::memcpy(memory.get() + places[place].offset + filled, bytes.data(), part);
      bytes = bytes.subspan(part);
      filled += part;
      if (filled == places[place].nbytes) ++place, filled = 0;
    }
  };
  put(message.header);
  for (const Bytes& piece : message.payload.pieces()) put(piece);
  if (const std::uint64_t one_in = options_.damages_one_in;
      one_in > 0 && message.payload.nbytes() > 0 && random.upTo(one_in - 1) == 0) {
    std::size_t at = message.header.size() + random.upTo(message.payload.nbytes() - 1);
    for (const Place& each : places) {
      if (at < each.nbytes) {
        memory[each.offset + at] ^= std::byte{1};
        break;
      }
      at -= each.nbytes;
    }
  }
  std::vector<Bytes> pieces;
  pieces.reserve(places.size());
  for (const Place& each : places) pieces.emplace_back(memory.get() + each.offset, each.nbytes);
  return Payload(std::move(pieces), memory);
}

// ------------------------------------------------------------------ ending

void World::finish(Held& held, const std::shared_ptr<Endpoint>& endpoint) {
  std::shared_ptr<Handler> handler = std::move(endpoint->handler);
  const Status reason = endpoint->reason;
  endpoint->host->endpoints.erase(endpoint->id);
  letGo(held, *endpoint);
  callOut(held, endpoint->host.get(), [&] {
    if (handler) handler->onClosed(reason);
    handler.reset();
  });
}

/// The endpoint is closed now, and keeps nothing of what callers made.
void World::letGo(Held& held, Endpoint& endpoint) {
  endpoint.closing = true;
  endpoint.closed = true;
  endpoint.connecting = false;
  held.trash.add(std::move(endpoint.handler));
  held.trash.add(std::move(endpoint.peer));
  held.trash.add(std::move(endpoint.flow));
  discard(held, endpoint);
}

/// Drops all that is on its way to or waits at this end.
void World::discard(Held& held, Endpoint& endpoint) {
  for (Transit& transit : endpoint.inbound) held.trash.items.push_back(std::move(transit.item));
  for (Item& item : endpoint.ready) held.trash.items.push_back(std::move(item));
  for (Message& message : endpoint.unsent) held.trash.add(std::move(message));
  endpoint.inbound.clear();
  endpoint.ready.clear();
  endpoint.unsent.clear();
}

}  // namespace reducer::transport::sim
