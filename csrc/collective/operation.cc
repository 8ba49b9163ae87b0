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

Piece Exchange::piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) {
  const Transfer& t = transfers_[transfer];
  const Span span = t.plan.span(round, position);
  Piece piece;
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
