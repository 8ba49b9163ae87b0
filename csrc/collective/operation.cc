#include "collective/operation.h"

#include <algorithm>
#include <limits>

namespace reducer::collective {
wire::Frame Operation::frame() const {
  wire::Frame frame;
  frame.kind = wire::FrameKind::kPush;
  frame.slot.lane = info_.lane;
  frame.slot.seq = info_.seq;
  frame.call = info_.call;
  frame.timeout_ms = static_cast<std::uint32_t>(std::clamp<std::int64_t>(
      info_.options.timeout.count(), 1, std::numeric_limits<std::int32_t>::max()));
  return frame;
}

void Operation::describe(recorder::Entry& entry) const {
  entry.group = info_.group;
  entry.two_levels = info_.two_levels;
  entry.lane = info_.lane;
  entry.seq = info_.seq;
  entry.call = info_.call;
  entry.algorithm = info_.way;
  entry.queued = Clock::now();
}

Exchange::Exchange(Info info, std::vector<Transfer> transfers, std::weak_ptr<Links> links)
    : Operation(std::move(info)),
      transfers_(std::move(transfers)),
      links_(std::move(links)),
      paces_(transfers_.size()) {
  for (std::size_t i = 0; i < transfers_.size(); ++i) {
    const Plan& plan = transfers_[i].plan;
    if (transfers_[i].depth == nullptr || plan.rounds <= Depth::kLeast) continue;
    paces_[i] = std::make_unique<Pace>(plan, transfers_[i].depth);
  }
}

bool Exchange::ready(const Cursor& cursor) const {
  const auto& pace = paces_[cursor.transfer];
  return !pace || pace->open(cursor.at());
}

std::uint64_t Exchange::key(const Cursor& cursor) const {
  const Transfer& t = transfers_[cursor.transfer];
  return pieceKey(info().seq, t.first_chunk + t.plan.chunk(cursor.at(), cursor.position));
}

void Exchange::accept(const Piece& piece, const Payload& result) {
  Operation::accept(piece, result);
  const auto& pace = paces_[piece.transfer];
  if (!pace) return;
  const auto links = links_.lock();
  if (links && pace->answered(piece.round, links->now())) {
    links->pump(transfers_[piece.transfer].plan.owners);
  }
}

Piece Exchange::piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) {
  const Transfer& t = transfers_[transfer];
  const Span span = t.plan.span(round, position);
  if (paces_[transfer]) {
    if (const auto links = links_.lock()) paces_[transfer]->begun(round, links->now());
  }
  Piece piece;
  piece.transfer = transfer;
  piece.round = round;
  piece.frame = frame();
  piece.frame.slot.lane = t.lane;
  piece.frame.slot.chunk = t.first_chunk + t.plan.chunk(round, position);
  piece.frame.pusher = t.pusher;
  piece.frame.puller = t.puller;
  piece.frame.offset = span.offset;
  piece.frame.length = span.length;
  if (t.in != nullptr && span.length > 0) {
    piece.payload = Payload(Bytes(t.in + span.offset, span.length), shared_from_this());
  }
  if (t.out != nullptr) piece.out = t.out + span.offset;
  return piece;
}

}  // namespace reducer::collective
