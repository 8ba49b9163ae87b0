#include "transport/sim/nic.h"

#include "common/check.h"
#include "transport/sim/world.h"

namespace reducer::transport::sim {
namespace {

bool hasWork(const Flow& flow, Nic::Side side) {
  return side == Nic::kOut ? flow.sending < flow.released : !flow.reached.empty();
}

std::uint32_t nextSegment(Flow& flow, Nic::Side side, std::size_t quantum) {
  if (side == Nic::kIn) return flow.reached.front();
  const std::uint32_t left = flow.parcels[flow.sending].to_send;
  return static_cast<std::uint32_t>(std::min<std::size_t>(left, quantum));
}

std::size_t sizeOf(const Item& item) {
  return item.message.header.size() + item.message.payload.nbytes();
}

}  // namespace

std::unique_ptr<Nic> World::makeNic(double bytes_per_second) {
  if (options_.nic.bytes_per_second <= 0) return nullptr;
  auto nic = std::make_unique<Nic>();
  for (Port& port : nic->ports) {
    port.bytes_per_second = bytes_per_second > 0 ? bytes_per_second : options_.nic.bytes_per_second;
    port.burst_bytes = static_cast<double>(options_.nic.burst_bytes);
  }
  const ProcessorModel& model = options_.processor;
  if (model.cores > 0) {
    if (!processor_ || !model.shared) {
      processor_ = std::make_shared<Processor>();
      processor_->free_at.assign(static_cast<std::size_t>(model.cores), TimePoint());
    }
    nic->processor = processor_;
  }
  return nic;
}

/// When a host's processor is done with an item that it gets now.
TimePoint World::worked(Nic& nic, const Item& item) {
  if (!nic.processor || item.kind != Item::Kind::kMessage) return nowHeld();
  const auto bytes_time = static_cast<Duration::rep>(options_.processor.ns_per_byte *
                                                     static_cast<double>(sizeOf(item)));
  const Duration work = options_.processor.per_frame + Duration(bytes_time);
  nic.counters.working += work;
  return nic.processor->serve(nowHeld(), work);
}

// ------------------------------------------------------------------ leaving

void World::enterNic(Endpoint& from, Item item) {
  if (!from.flow) {
    from.flow = std::make_shared<Flow>();
    from.flow->to = from.peer;
    from.flow->from_host = from.host;
    from.flow->to_host = from.peer->host;
  }
  const std::shared_ptr<Flow>& flow = from.flow;
  Nic& nic = *from.host->nic;
  flow->last_release = std::max(flow->last_release, worked(nic, item));
  const std::uint32_t nbytes = onWire(options_.nic, sizeOf(item));
  if (item.kind == Item::Kind::kMessage) ++nic.counters.sent_frames;
  flow->parcels.push_back({std::move(item), nbytes, nbytes});
  if (flow->last_release <= nowHeld()) {
    release(flow);
  } else {
    pushEvent(Event::Kind::kRelease, flow, flow->last_release);
  }
}

void World::release(const std::shared_ptr<Flow>& flow) {
  if (flow->dropped) return;
  ++flow->released;
  takeTurns(flow, Nic::kOut);
}

/// A segment has come to the receiver's port.
void World::reach(const std::shared_ptr<Flow>& flow) {
  const std::uint32_t segment = flow->under_way.pop_front();
  if (flow->dropped) return;
  Nic& nic = *flow->to_host->nic;
  Port& port = nic.ports[Nic::kIn];
  flow->reached.push_back(segment);
  port.waiting_bytes += segment;
  takeTurns(flow, Nic::kIn);
  nic.counters.waiting_bytes_max = std::max(nic.counters.waiting_bytes_max, port.waiting_bytes);
}

// ------------------------------------------------------------------ turns

void World::takeTurns(const std::shared_ptr<Flow>& flow, Nic::Side side) {
  if (flow->queued[side]) return;
  flow->queued[side] = true;
  const std::shared_ptr<Host>& host = side == Nic::kOut ? flow->from_host : flow->to_host;
  Port& port = host->nic->ports[side];
  port.turns.push_back(flow);
  if (!port.serving) serveTurns(host, side);
}

void World::serveTurns(const std::shared_ptr<Host>& host, Nic::Side side) {
  Port& port = host->nic->ports[side];
  while (!port.serving && !port.turns.empty()) {
    const std::shared_ptr<Flow> flow = port.turns.pop_front();
    if (!flow->dropped && hasWork(*flow, side)) {
      serve(host, flow, side);
    } else {
      flow->queued[side] = false;
    }
  }
}

/// A segment of `flow`, whose turn it is, begins to go through the port.
void World::serve(const std::shared_ptr<Host>& host, const std::shared_ptr<Flow>& flow,
                  Nic::Side side) {
  const auto quantum = static_cast<std::uint32_t>(options_.nic.quantum_bytes);
  Nic& nic = *host->nic;
  Port& port = nic.ports[side];
  const std::uint32_t segment = nextSegment(*flow, side, quantum);
  if (flow->credit[side] < segment) flow->credit[side] += quantum;
  flow->credit[side] -= segment;
  port.serving = flow;
  port.segment = segment;
  const Duration time = port.take(nowHeld(), segment);
  if (side == Nic::kIn) {
    flow->reached.pop_front();
    port.waiting_bytes -= segment;
    nic.counters.receiving += time;
    nic.counters.received_bytes += segment;
    pushEvent(Event::Kind::kReceived, host, nowHeld() + time);
    return;
  }
  Parcel& parcel = flow->parcels[flow->sending];
  parcel.to_send -= segment;
  if (parcel.to_send == 0) ++flow->sending;
  nic.counters.sending += time;
  nic.counters.sent_bytes += segment;
  flow->under_way.push_back(segment);
  // It goes through the other port while it leaves this one, and not before its last byte has left.
  // A token bucket lets it pass as a whole.
  const Duration through = flow->to_host->nic->ports[Nic::kIn].timeOf(segment);
  const Duration behind = port.burst_bytes > 0 ? time : time - through;
  flow->last_reach =
      std::max(flow->last_reach, nowHeld() + delay() + std::max(Duration::zero(), behind));
  pushEvent(Event::Kind::kReach, flow, flow->last_reach);
  pushEvent(Event::Kind::kSent, host, nowHeld() + time);
}

/// The port is done with a segment.
void World::served(Held& held, const std::shared_ptr<Host>& host, Nic::Side side) {
  Port& port = host->nic->ports[side];
  const std::shared_ptr<Flow> flow = std::move(port.serving);
  const std::uint32_t segment = port.segment;
  port.serving = nullptr;
  const bool more = !flow->dropped && hasWork(*flow, side);
  if (more && flow->credit[side] >= nextSegment(*flow, side, options_.nic.quantum_bytes)) {
    serve(host, flow, side);
  } else {
    flow->queued[side] = more;
    if (more) {
      port.turns.push_back(flow);
    } else {
      flow->credit[side] = 0;
    }
    serveTurns(host, side);
  }
  // Last, because handlers run in it.
  if (side == Nic::kIn && !flow->dropped) leaveNic(held, *flow, segment);
}

// ------------------------------------------------------------------ arriving

void World::leaveNic(Held& held, Flow& flow, std::uint32_t segment) {
  Parcel& first = flow.parcels.front();
  first.to_receive -= segment;
  if (first.to_receive > 0) return;
  Parcel parcel = flow.parcels.pop_front();
  --flow.released;
  --flow.sending;
  const std::shared_ptr<Endpoint> to = flow.to;
  if (to->closed || to->host->gone) {
    held.trash.items.push_back(std::move(parcel.item));
    return;
  }
  Nic& nic = *to->host->nic;
  if (parcel.item.kind == Item::Kind::kMessage) ++nic.counters.received_frames;
  to->last_due = std::max(to->last_due, worked(nic, parcel.item));
  to->inbound.push_back({to->last_due, std::move(parcel.item)});
  if (to->last_due <= nowHeld()) {
    arrive(held, to, nowHeld());
  } else {
    pushEvent(Event::Kind::kArrive, to, to->last_due);
  }
}

/// What has not arrived never will.
void World::drop(Held& held, Flow& flow) {
  if (flow.dropped) return;
  flow.dropped = true;
  Port& port = flow.to_host->nic->ports[Nic::kIn];
  for (const std::uint32_t segment : flow.reached) port.waiting_bytes -= segment;
  for (Parcel& parcel : flow.parcels) held.trash.items.push_back(std::move(parcel.item));
  flow.reached.clear();
  flow.parcels.clear();
}

void World::clearNic(Held& held, Host& host) {
  if (!host.nic) return;
  for (Port& port : host.nic->ports) {
    held.trash.add(std::move(port.serving));
    for (std::shared_ptr<Flow>& flow : port.turns) held.trash.add(std::move(flow));
    port.turns.clear();
  }
}

SimHostCounters World::counters(const std::string& name) {
  const Held held(*this);
  const std::shared_ptr<Host> host = findHost(name);
  REDUCER_CHECK(host != nullptr);
  SimHostCounters counters;
  if (host->nic) counters = host->nic->counters;
  counters.connections = host->endpoints.size();
  return counters;
}

}  // namespace reducer::transport::sim
